"""What the tests of the bottleneck adapter op share."""

import torch

import peft_fast
from peft_fast import eager, reference
from peft_fast.ops import bottleneck_adapter
from peft_fast.testing import BottleneckAdapterInputs, assert_within_budget

BACKENDS = ["eager", "triton"]
NORMS = {
    "plain": {},
    "before": {"norm_before": True},
    "after": {"norm_after": True},
    "both": {"norm_before": True, "norm_after": True},
}
SEED = 29


def forward_backward(op, inputs: BottleneckAdapterInputs, **kwargs) -> dict[str, torch.Tensor]:
    """y and the gradient of every tensor of the call, by name."""
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}
    y = op(inputs.x, residual=inputs.residual, **inputs.parameters, **kwargs)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), inputs.dy), strict=True))


def mask_of(backend: str, inputs: BottleneckAdapterInputs, dropout_p: float) -> torch.Tensor | None:
    if not dropout_p:
        return None
    shape, threshold = inputs.dy.shape, reference.drop_threshold(dropout_p)
    if backend == "eager":
        return eager.dropout_mask(torch.tensor([SEED]), shape, threshold)
    from peft_fast.kernels.dropout import dropout_mask

    return dropout_mask(torch.tensor([SEED]), shape, threshold)


def assert_op_within_budget(backend: str, *calls: BottleneckAdapterInputs, dropout_p: float = 0.0, **options) -> None:
    """Every result of the calls, taken together, within the error budget."""
    results = []
    for inputs in calls:
        with peft_fast.backend(backend):
            seed = torch.tensor([SEED])
            actual = forward_backward(bottleneck_adapter, inputs, dropout_p=dropout_p, seed=seed, **options)
        masked = options | {"dropout_p": dropout_p, "keep_mask": mask_of(backend, inputs, dropout_p)}
        expected = forward_backward(reference.bottleneck_adapter, inputs, **masked)
        truth = forward_backward(reference.bottleneck_adapter, inputs.to(torch.float64), **masked)
        assert actual.keys() == truth.keys()
        assert all(actual[name].shape == truth[name].shape for name in truth)
        results.append((actual, truth, expected))
    (M, K), R = inputs.x.shape, inputs.parameters["down_weight"].shape[0]
    length = max(M, K, R, inputs.dy.shape[1])
    if inputs.parameters.keys() & {"norm_before", "norm_after"}:
        length *= 16  # the statistics of a row enter all of it
    for name in truth:
        values = [torch.cat([result[name].flatten() for result in kind]) for kind in zip(*results, strict=True)]
        if name == "scaling" and inputs.dy.dtype == torch.float64:  # one sum of M·N terms that cancel
            terms = inputs.dy.norm() * truth["y"].norm()
            assert (values[0] - values[1]).abs().max() <= 4 * torch.finfo(torch.float64).eps * terms, name
        else:
            assert_within_budget(*values, length=length, name=name)

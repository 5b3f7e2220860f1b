"""What the tests of the bottleneck adapter op share."""

import torch

from peft_fast.testing import BottleneckAdapterInputs

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

"""What the tests of the prefix attention op share: calls, their masks and rules, and the truth they are held to."""

import math
from collections.abc import Callable

import torch

import peft_fast
from peft_fast import reference
from peft_fast.ops import prefix_attention
from peft_fast.testing import PrefixAttentionInputs, assert_within_budget, error_budget, largest_error

SEED = 29


def keep_mask(backend: str, inputs: PrefixAttentionInputs, dropout_p: float, **options) -> torch.Tensor | None:
    if not dropout_p:
        return None
    call = {"attn_mask": None, "is_causal": False, "sliding_window": None, "softcap": None, "scale": None} | options
    attn_mask = call.pop("attn_mask")
    call["scale"] = call["scale"] or inputs.query.shape[-1] ** -0.5
    tensors = [inputs.query, inputs.key, inputs.value, inputs.prefix_key, inputs.prefix_value, attn_mask, inputs.gate]
    names = ("is_causal", "sliding_window", "softcap", "scale")
    rules = [reference.drop_threshold(dropout_p), torch.tensor([SEED]), *(call[name] for name in names)]
    plan = "eager" if backend == "eager" else "split"
    return torch.ops.peft_fast.attention_dropout_mask(*tensors, *rules, plan)


def forward_backward(op, inputs: PrefixAttentionInputs, **options) -> dict[str, torch.Tensor]:
    """y and the gradient of every tensor of the call, by name."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves().items()}
    mask = options.get("attn_mask")
    y = op(**leaves, **options)
    if mask is not None and mask.requires_grad:
        leaves["attn_mask"] = mask
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), inputs.dy), strict=True))


def wide(options: dict) -> dict:
    """The options for a reference in float64."""
    mask = options.get("attn_mask")
    if mask is None or mask.dtype == torch.bool:
        return options
    return options | {"attn_mask": mask.detach().double().requires_grad_(mask.requires_grad)}


def assert_op_within_budget(
    backend: str,
    *calls: PrefixAttentionInputs,
    dropout_p: float = 0.0,
    draw: Callable[[int], PrefixAttentionInputs] | None = None,
    **options,
) -> None:
    """Every result of the calls, taken together, within the error budget.

    `draw` gives calls of other seeds. What exceeds the budget in these is held to it in 100 more, ours and eager's: the
    largest error of few calls is that of a single row, in which one of the two may have been lucky.
    """

    def results_of(inputs: PrefixAttentionInputs) -> tuple[dict[str, torch.Tensor], ...]:
        with peft_fast.backend(backend):
            seed = torch.tensor([SEED])
            actual = forward_backward(prefix_attention, inputs, dropout_p=dropout_p, seed=seed, **options)
        dropout = {"dropout_p": dropout_p, "keep_mask": keep_mask(backend, inputs, dropout_p, **options)}
        expected = forward_backward(reference.prefix_attention, inputs, **dropout, **options)
        truth = forward_backward(reference.prefix_attention, inputs.to(torch.float64), **dropout, **wide(options))
        assert actual.keys() == truth.keys()
        assert all(actual[name].shape == truth[name].shape for name in truth)
        return actual, truth, expected

    def joined(results: list[tuple[dict[str, torch.Tensor], ...]], name: str) -> list[torch.Tensor]:
        return [torch.cat([result[name].flatten() for result in kind]) for kind in zip(*results, strict=True)]

    results, more = [results_of(inputs) for inputs in calls], []
    (Z, H, S, _), T, P = calls[0].query.shape, calls[0].key.shape[2], calls[0].prefix_key.shape[1]
    length = max(T + P, Z * H * S)
    for name in results[0][1]:
        values = joined(results, name)
        if draw and largest_error(*values[:2]) > error_budget(*values[1:], length):
            more = more or [results_of(draw(seed)) for seed in range(len(calls), len(calls) + 100)]
            values = joined(results + more, name)
        assert_within_budget(*values, length=length, name=name)


def boolean_mask(Z: int, S: int, T: int) -> torch.Tensor:
    """(Z, 1, S, T) with whole rows, and the last keys of all of them, masked."""
    mask = torch.rand(Z, 1, S, T, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :, : S // 4] = False
    mask[..., -3:] = False
    return mask


def additive(mask: torch.Tensor, dtype: torch.dtype, least: float) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, least)


RULES = {
    "causal": {"is_causal": True},
    "window": {"sliding_window": 9},
    "causal-window": {"is_causal": True, "sliding_window": 9},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.3, "is_causal": True},
}


MASKS = {
    "none": lambda dtype: None,
    "bool": lambda dtype: boolean_mask(2, 66, 86),
    "padding": lambda dtype: torch.arange(86) < torch.tensor([[86], [57]])[:, None, None],
    "all-masked": lambda dtype: torch.zeros(2, 1, 1, 86, dtype=torch.bool),
    "infinite": lambda dtype: additive(boolean_mask(2, 66, 86), dtype, -math.inf),
    "least": lambda dtype: additive(boolean_mask(2, 66, 86), dtype, torch.finfo(dtype).min),
    "bias": lambda dtype: torch.randn(1, 4, 66, 86, generator=torch.Generator().manual_seed(4)).to(dtype),
    "row": lambda dtype: torch.randn(86, generator=torch.Generator().manual_seed(5)).to(dtype),
}

"""Dropout on the CPU, for the frozen model around the adapters: the same numbers from fewer random words.

    y = mask ∘ x / (1 - p)     dx = mask ∘ dy / (1 - p)

`F.dropout` on the CPU draws one Bernoulli variable after the other and keeps a float for each element until backward.
Here the mask is made from a seed (`eager.drop`), and nothing but the seed is kept.
"""

import torch
from torch import Tensor

from peft_fast import eager, reference, support


class _Dropout(torch.autograd.Function):
    """Saves the seed."""

    @staticmethod
    def forward(ctx, x, threshold, seed):
        ctx.save_for_backward(seed)
        ctx.threshold = threshold
        return eager.drop(x, threshold, seed)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return apply_dropout(dy, ctx.threshold, seed), None, None


def apply_dropout(x: Tensor, threshold: int, seed: Tensor | None = None) -> Tensor:
    """drop(x) with p = threshold / 2^16, for an x (..., K) on the CPU that is not empty."""
    if seed is None:
        seed = eager.draw_seed(x.device)
    if support.runs_plainly(x):
        return _Dropout.apply(x, threshold, seed)
    rows = (x.shape[:-1].numel(), x.shape[-1])
    mask = torch.ops.peft_fast.dropout_mask(seed, rows, threshold, "eager").view(x.shape)
    return x * mask * reference.keep_scale(threshold)

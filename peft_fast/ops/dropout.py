"""Dropout on the CPU, for the frozen model around the adapters: the same numbers from fewer random words.

    y = mask ∘ x / (1 - p)     dx = mask ∘ dy / (1 - p)

`F.dropout` on the CPU draws one Bernoulli variable after the other and keeps a float for each element until backward.
Here the mask is made from a seed (`eager.drop`), and nothing but the seed is kept. Where calls are watched or stand for
a batch the mask is an op of its own; it is the same one, since checkpointing may repeat a call in other company.

Inductor's code draws its numbers one by one too: with a sum and LayerNorm behind (32x48x384 on an Intel) it took three
times as long as this. Compiled, that op is all there is of ours: the compiler fuses the products with it, and keeps a
byte for each element, as it does of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fast import eager, reference, support


class _Dropout(torch.autograd.Function):
    """Saves the seed. The mask lies in memory as y does."""

    @staticmethod
    def forward(ctx, x, threshold, seed, strides):
        ctx.save_for_backward(seed)
        ctx.threshold = threshold
        if _is_plain(x):
            y = eager.drop(x, threshold, seed, strides)
            ctx.strides = y.stride()
            return y
        ctx.strides = torch.empty_like(x).stride() if strides is None else strides
        return x * _mask(x.shape, ctx.strides, threshold, seed) * reference.keep_scale(threshold)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        if support.is_batched(dy) or support.in_transform():
            mask = _mask(dy.shape, ctx.strides, ctx.threshold, seed)
            return dy * mask * reference.keep_scale(ctx.threshold), None, None, None
        if not torch.is_grad_enabled() and _is_plain(dy):
            return eager.drop(dy, ctx.threshold, seed, ctx.strides), None, None, None
        return _Dropout.apply(dy, ctx.threshold, seed, ctx.strides), None, None, None


def _is_plain(x: Tensor) -> bool:
    """Whether x is what lies in its memory, and nothing watches or transforms the call."""
    return support.runs_plainly(x) and x.layout is torch.strided and not x.is_neg() and not x._is_zerotensor()


def _mask(shape: torch.Size, strides: Sequence[int], threshold: int, seed: Tensor) -> Tensor:
    elements = torch.ops.peft_fast.dropout_mask(seed, (shape.numel(), 1), threshold, "eager")
    return elements.as_strided(shape, strides)


def apply_dropout(x: Tensor, threshold: int, seed: Tensor | None = None) -> Tensor:
    """drop(x) with p = threshold / 2^16, for a dense x on the CPU that is not empty; compiled for any x there."""
    seed = eager.draw_seed(x.device) if seed is None else seed
    if torch.compiler.is_compiling():
        mask = torch.ops.peft_fast.dropout_mask(seed, (x.numel(), 1), threshold, "eager")
        return x * mask.view(x.shape) * reference.keep_scale(threshold)
    return _Dropout.apply(x, threshold, seed, None)

"""Matmuls of the eager backend: operands in the factors' wide type, skinny products in the form that the BLAS likes.

`traced` is true where calls are being recorded. Nothing is then written in place into what a call gave: selective
checkpointing keeps it, a batch may stand for it.
"""

from typing import Any

import torch
from torch import Tensor

# The CPU's BLAS multiplies a tall matrix by a narrow one at a fraction of its speed; see `narrow_mm` and `tall_mm`.
NARROW = range(2, 16)
BATCHED_ELEMENTS = 1 << 16


def wide_dtype(factor: Tensor) -> torch.dtype:
    return torch.float64 if factor.dtype is torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`to` takes microseconds even where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def narrow_mm(x: Tensor, factor: Tensor, scale: Any, traced: str) -> Tensor:
    """scale · x F; x (M, K), F (K, R).

    A number is the matmul's alpha, since multiplying by one costs as much as two small matmuls. Batches of rows take
    two thirds of the time of one product where R is below 16, as Fᵀ xᵀ, and with many rows nine tenths up to 32.
    """
    (M, K), R = x.shape, factor.shape[1]
    narrow = R in NARROW and (traced or M * K >= BATCHED_ELEMENTS)  # a graph must not depend on M
    if traced:
        return (torch.mm(factor.t(), x.t()).t() if narrow else torch.mm(x, factor)) * scale
    ignored = x.new_empty(1)
    # R = 1 is no matmul, and batches of it round more.
    batches = _batches(x, 8, 32 if narrow else 128) if M * K >= BATCHED_ELEMENTS and 2 <= R <= 32 else 0
    if not batches:
        if narrow:
            return torch.addmm(ignored, factor.t(), x.t(), beta=0, alpha=scale).t()
        return torch.addmm(ignored, x, factor, beta=0, alpha=scale)
    x = x.view(batches, -1, K)
    if not narrow:
        return torch.baddbmm(ignored, x, factor.expand(batches, K, R), beta=0, alpha=scale).view(M, R)
    out = torch.baddbmm(ignored, factor.t().expand(batches, R, K), x.transpose(1, 2), beta=0, alpha=scale)
    return out.transpose(1, 2).reshape(M, R)


def tall_mm(s: Tensor, x: Tensor, traced: str) -> Tensor:
    """sᵀ x; s (M, R), x (M, K). Products of batches of rows, added, take a tenth to a third less time."""
    (M, K), R = x.shape, s.shape[1]
    if traced or M * K < BATCHED_ELEMENTS or not (batches := _batches(x, 4, 64)):
        return torch.mm(s.t(), x)
    return torch.bmm(s.view(batches, -1, R).transpose(1, 2), x.view(batches, -1, K)).sum(0)


def _batches(x: Tensor, each: int, least: int) -> int:
    """A power of two of equal batches of at least `least` rows, at most `each` for each thread of the CPU and at least
    one; 0 where there is none.
    """
    rows, threads = x.shape[0], torch.get_num_threads()
    batches = 1 << (each * threads).bit_length() - 1
    while rows % batches or rows < least * batches:
        batches //= 2
        if batches < threads:
            return 0
    return batches if x.is_cpu else 0


def add_mm(out: Tensor, a: Tensor, b: Tensor, traced: str) -> Tensor:
    return torch.addmm(out, a, b) if traced else out.addmm_(a, b)

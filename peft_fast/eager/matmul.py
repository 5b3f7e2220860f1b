"""Matmuls of the eager backend: operands in the factors' wide type, skinny products in the form that the BLAS likes.

`traced` is true where calls are being recorded. Nothing is then written in place into what a call gave: selective
checkpointing keeps it, a batch may stand for it.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The CPU's BLAS multiplies a tall matrix by a narrow one at a fraction of its speed; see `narrow_mm` and `tall_mm`.
NARROW = range(2, 16)
WIDE = 32
BATCHED_ELEMENTS = 1 << 16
INTEL_BATCHED_ELEMENTS = 1 << 20
BIASED_ELEMENTS = 1 << 19  # from which on a bias costs less as one more rank, see `linear_plus`
ONE_DNN_PRODUCTS = 1 << 27


def wide_dtype(factor: Tensor) -> torch.dtype:
    return torch.float64 if factor.dtype is torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`to` takes microseconds even where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def narrow_mm(x: Tensor, factor: Tensor, scale: Any, traced: str) -> Tensor:
    """scale · x F; x (M, K), F (K, R).

    A number is the matmul's alpha, since multiplying by one costs as much as two small matmuls. Where R is below 16,
    batches of rows take two thirds of the time of one product, as Fᵀ xᵀ; with Fᵀ dense, which on Intel's CPUs takes
    half the time.
    """
    (M, K), R = x.shape, factor.shape[1]
    narrow = R in NARROW and (traced or M * K >= BATCHED_ELEMENTS)  # a graph must not depend on M
    if traced:
        return (torch.mm(factor.t(), x.t()).t() if narrow else torch.mm(x, factor)) * scale
    ignored = x.new_empty(1)
    if M == R == 1:  # matrices may be multiplied in one chain of sums, with three times the error
        return (torch.dot(x[0], factor[:, 0]) * scale).view(1, 1)
    if not narrow:
        return torch.addmm(ignored, x, factor, beta=0, alpha=scale)
    factor_t = factor.t().contiguous()
    if not (batches := _batches(x, 8, 32)):
        return torch.addmm(ignored, factor_t, x.t(), beta=0, alpha=scale).t()
    a, b = factor_t.expand(batches, R, K), x.view(batches, -1, K).transpose(1, 2)
    return torch.baddbmm(ignored, a, b, beta=0, alpha=scale).transpose(1, 2).reshape(M, R)


def tall_mm(s: Tensor, x: Tensor, traced: str) -> Tensor:
    """sᵀ x; s (M, R), x (M, K).

    Where R is below 32, products of batches of rows, added, take a tenth to a third less time than one. From there on
    (xᵀ s)ᵀ takes a fifth to a third less on AMD's CPUs, and as much more on Intel's.
    """
    (M, K), R = x.shape, s.shape[1]
    if R >= WIDE and not traced and not is_intel():
        return torch.mm(x.t(), s).t()
    if R >= WIDE or traced or M * K < BATCHED_ELEMENTS or not (batches := _batches(x, 4, 64)):
        return torch.mm(s.t(), x)
    return torch.bmm(s.view(batches, -1, R).transpose(1, 2), x.view(batches, -1, K)).sum(0)


def _batches(x: Tensor, each: int, least: int) -> int:
    """A power of two of equal batches of at least `least` rows, at most `each` for each thread of the CPU and at least
    one; 0 where there is none, and on Intel's CPUs where x fits into their larger caches.
    """
    if x.numel() <= INTEL_BATCHED_ELEMENTS and is_intel():
        return 0
    rows, threads = x.shape[0], torch.get_num_threads()
    batches = 1 << (each * threads).bit_length() - 1
    while rows % batches or rows < least * batches:
        batches //= 2
        if batches < threads:
            return 0
    return batches if x.is_cpu else 0


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, factor: Tensor, traced: str) -> Tensor:
    """x Wᵀ + bias + s F; x (M, K), weight (N, K), s (M, R), factor (R, N).

    The second product is accumulated onto the first, so that it costs no pass of its own; nor does the bias, which
    torch would copy to all rows: it is one more rank, of ones.
    """
    if _takes_one_dnn(x, weight, traced):
        return _one_dnn_linear(x, weight, bias).addmm_(s, factor)
    if bias is None:
        y = torch.mm(s, factor)
    elif traced or x.shape[0] * factor.shape[1] < BIASED_ELEMENTS or not _multiplies_exactly(x):
        y = torch.addmm(bias, s, factor)
    else:
        ones = s.new_ones(()).expand(len(s), 1)
        y = torch.mm(torch.cat([s, ones], 1), torch.cat([factor.t(), bias[:, None]], 1).t())
    return torch.addmm(y, x, weight.t()) if traced else y.addmm_(x, weight.t())


def _multiplies_exactly(x: Tensor) -> bool:
    """Whether a matmul rounds its operands no more than a sum does, so that a bias may be one."""
    return x.is_cpu and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


def add_linear(out: Tensor, x: Tensor, weight: Tensor, traced: str) -> Tensor:
    """out + x Wᵀ; out (M, N), which may be overwritten, x (M, K), weight (N, K)."""
    if traced:
        return torch.addmm(out, x, weight.t())
    if _takes_one_dnn(x, weight, traced):
        return out.add_(_one_dnn_linear(x, weight, None))
    return out.addmm_(x, weight.t())


def _one_dnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None if bias is None else bias.contiguous(), "none", [], "")


def _takes_one_dnn(x: Tensor, weight: Tensor, traced: str) -> bool:
    """Whether x Wᵀ takes less time by oneDNN than by MKL, which torch calls in fp32.

    MKL is at its best on Intel's CPUs alone. On AMD's Zen 4, within a model's step, oneDNN took 0.93 of its time, and
    as long for 2^26 products. It adds up long sums in one chain: MKL's error times 1.5 for 384 terms, 2.5 for 768,
    beyond the budget, and 3.5 for 3072. A weight that is not dense it reads a thousand times slower.
    """
    (N, K), M = weight.shape, x.shape[0]
    return (
        128 <= K <= 384
        and N >= 128
        and M * K * N >= ONE_DNN_PRODUCTS
        and not traced
        and x.dtype is torch.float32
        and _has_one_dnn()
        and torch._C._get_mkldnn_enabled()
        and x.is_cpu
        and x.is_contiguous()
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


@functools.cache
def _has_one_dnn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and not is_intel()


@functools.cache
def is_intel() -> bool:
    """Whether the CPU is Intel's, which MKL is written for."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        processor = platform.processor()
    return "GenuineIntel" in processor

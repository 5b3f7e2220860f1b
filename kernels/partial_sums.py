"""Partial sums: what several programs share each writes for itself, and a second pass adds in a fixed order.

out = Σ_splits partials     `sums`, one launch for all that a call has
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Plan, by_layout, cdiv, needs_int64, next_power_of_2, unit
from ._tl import cast, offsets

# Programs that a pass is split into: about two for each multiprocessor of a large chip. A constant, so that chips that
# share tiles also share the order of every sum, and its bits.
_PROGRAMS = 256


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(length: int, block: int, programs: int) -> tuple[int, int]:
    """(number, size) of the pieces, whole blocks each, into which `programs` programs split `length` further."""
    size = block * cdiv(cdiv(length, block), max(1, _PROGRAMS // max(1, programs)))
    return max(1, cdiv(length, max(1, size))), max(1, size)


@triton.jit
def _sum_in_order(
    block,
    partials_ptr,
    out_ptr,
    count,
    size,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = Σ partials for this block of out, if it is one; what `block` is among the blocks of what follows.

    COUNT partials at a time, so that their loads do not wait for each other.
    """
    if partials_ptr is not None:
        blocks = tl.cdiv(size, BLOCK)
        if block >= 0 and block < blocks:
            length = size // UNIT * UNIT  # no new value for `size`: a size of 1 is a constant of the compiler
            index = block.to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
            mask = index < length
            acc = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
            for first in range(0, count, COUNT):
                i = first + tl.arange(0, COUNT)
                ptrs = partials_ptr + (offsets(i, length, UNIT, True)[:, None] + index[None, :])
                acc += tl.sum(tl.load(ptrs, mask=(i < count)[:, None] & mask[None, :], other=0.0), 0)
            tl.store(out_ptr + index, cast(acc, out_ptr.dtype.element_ty), mask=mask)
        block -= blocks
    return block


@triton.jit
def _sum_partials_kernel(
    partials_0,
    out_0,
    partials_1,
    out_1,
    partials_2,
    out_2,
    partials_3,
    out_3,
    partials_4,
    out_4,
    partials_5,
    out_5,
    count_0,
    size_0,
    count_1,
    size_1,
    count_2,
    size_2,
    count_3,
    size_3,
    count_4,
    size_4,
    count_5,
    size_5,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = Σ partials over their first dimension for up to six of them; partials (count, size)."""
    block = _sum_in_order(tl.program_id(0), partials_0, out_0, count_0, size_0, BLOCK, COUNT, UNIT, WIDE)
    block = _sum_in_order(block, partials_1, out_1, count_1, size_1, BLOCK, COUNT, UNIT, WIDE)
    block = _sum_in_order(block, partials_2, out_2, count_2, size_2, BLOCK, COUNT, UNIT, WIDE)
    block = _sum_in_order(block, partials_3, out_3, count_3, size_3, BLOCK, COUNT, UNIT, WIDE)
    block = _sum_in_order(block, partials_4, out_4, count_4, size_4, BLOCK, COUNT, UNIT, WIDE)
    _sum_in_order(block, partials_5, out_5, count_5, size_5, BLOCK, COUNT, UNIT, WIDE)


# Partial sums, and the type of their sum over the first dimension or where it goes, dense.
Partials = tuple[Tensor | None, torch.dtype | Tensor]
_MOST_SUMS = 6
_SUMMED = 4096  # elements that a program adds at a time: those of many partials are of few columns


def sums(*parts: Partials) -> list[Tensor | None]:
    """The sum of each, by one launch for up to six of them; None of None."""
    outs: list[Tensor | None] = []
    tensors: list[Tensor | None] = []
    for partials, target in parts:
        out = None
        if partials is not None:
            out = target if isinstance(target, Tensor) else partials.new_empty(partials.shape[1:], dtype=target)
            if out.numel():
                tensors += (partials, out)
        outs.append(out)
    if tensors:
        tensors += [None] * (2 * _MOST_SUMS - len(tensors))
        _sum_plan(*tensors)(*tensors)
    return outs


@by_layout
def _sum_plan(*tensors: Tensor | None) -> Plan:
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
    sizes = [0 if out is None else out.numel() for _, out in pairs]
    counts = [0 if partials is None else partials.shape[0] for partials, _ in pairs]
    COUNT = min(64, next_power_of_2(max(counts)))
    BLOCK = _SUMMED // COUNT
    return Plan(
        _sum_partials_kernel,
        (sum(cdiv(size, BLOCK) for size in sizes),),
        *itertools.chain(*zip(counts, sizes, strict=True)),
        BLOCK=BLOCK,
        COUNT=COUNT,
        UNIT=unit(*sizes),
        WIDE=needs_int64(*tensors[1::2]),
        device=tensors[0].device,
        num_warps=8,
        num_stages=1,
    )

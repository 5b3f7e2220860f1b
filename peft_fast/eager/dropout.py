"""Dropout of the eager backend: masks made from a seed, so that nothing but the seed is kept for backward.

`F.dropout` on the CPU draws one Bernoulli variable after the other and costs as much as a large matmul. Here a mask is
drawn while it is applied, by C code that the machine's compiler makes (`dropout_native`); where there is none, from few
random words by numpy (`dropout_numpy`). The same seed gives the same mask in forward, in backward and in a
recomputation.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from peft_fast.eager import dropout_native, dropout_numpy
from peft_fast.reference import keep_scale

# One block of fp32 activations stays in the cache while it is masked and multiplied.
BLOCK_ELEMENTS = 1 << 20

Dropped: TypeAlias = dropout_native.Dropped | dropout_numpy.Dropped


class Mask:
    """What is dropped, as a traced graph has it: a mask of all rows."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def masked(self, x: Tensor) -> Tensor:
        return x * self.mask


def draw_seed(device: torch.device) -> Tensor:
    """A one-element int64 tensor from torch's generator on `device`, without a host sync."""
    return torch.randint(2**63 - 1, (1,), device=device)


@functools.cache
def draws_one_by_one() -> bool:
    """Whether this torch's `F.dropout` takes a number from its generator for each element on the CPU.

    Older builds took one seed of 32 bits for MKL instead on Intel's CPUs, which draws in parallel; torch turned that
    off since the numbers repeated (its issue 132395), and may come back to it.
    """
    few, many = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    torch.empty(1, device="cpu").bernoulli_(0.5, generator=few)
    torch.empty(100, device="cpu").bernoulli_(0.5, generator=many)
    return not torch.equal(few.get_state(), many.get_state())


def dropout_mask(seed: Tensor, shape: Sequence[int], threshold: int) -> Tensor:
    """The mask that `seed` stands for: a boolean (M, K) tensor on seed's device, True where x is kept."""
    mask = torch.ones(shape, dtype=torch.bool, device="cpu")
    for rows, dropped in dropped_blocks(seed, shape, threshold):
        dropped.mask_(mask[rows])
    return mask.to(seed.device)


def drop(x: Tensor, threshold: int, seed: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """drop(x) = mask ∘ x / (1 - p), new; x dense and not empty.

    The mask is `dropout_mask(seed, (n, 1), threshold)` in the order in which the result lies in memory, which is x's as
    far as x is dense, or that of `strides`.
    """
    out = torch.empty_like(x) if strides is None else x.new_empty_strided(x.shape, strides)
    functions, scale = dropout_native.library(), keep_scale(threshold)
    if functions is None or x.stride() != out.stride() or x.dtype not in dropout_native.SCALED:
        x, scale = torch.mul(x, scale, out=out), 1.0
    if functions is not None:
        (all_of_x,) = dropout_native.dropped_pieces(functions, seed, [x.shape], threshold)
        all_of_x.apply(x, out, scale)
        return out
    elements = out.as_strided((out.numel(), 1), (1, 1))
    for block, dropped in dropped_blocks(seed, elements.shape, threshold):
        dropped.mask_(elements[block])
    return out


def block_rows(M: int, K: int) -> int:
    """The height of blocks of rows of an (M, K) activation: they are about equal, and high ones are whole batches of
    `matmul`.
    """
    height = -(-M // max(1, -(-M * K // BLOCK_ELEMENTS)))
    return height if height < 64 else -(-height // 16) * 16


def dropped_blocks(seed: Tensor, shape: Sequence[int], threshold: int) -> Iterator[tuple[slice, Dropped]]:
    """What dropout with p = threshold / 2^16 drops of an (M, K) activation, in blocks of rows."""
    M, K = shape
    height = max(1, block_rows(M, K))
    blocks = [slice(start, min(start + height, M)) for start in range(0, max(M, 1), height)]  # an empty one where M = 0
    return zip(blocks, dropped_pieces(seed, [(rows.stop - rows.start, K) for rows in blocks], threshold), strict=True)


def dropped_pieces(seed: Tensor, shapes: Iterable[Sequence[int]], threshold: int) -> Iterator[Dropped]:
    """What dropout with p = threshold / 2^16 drops of one tensor after the other, of these shapes."""
    functions = dropout_native.library() if seed.is_cpu else None
    if functions is None:
        return dropout_numpy.dropped_pieces(seed, shapes, threshold)
    return dropout_native.dropped_pieces(functions, seed, shapes, threshold)


def blocks_of(
    seed: Tensor, shape: Sequence[int], threshold: int, dtype: torch.dtype, traced: str
) -> Iterable[tuple[slice, Dropped | Mask]]:
    """`dropped_blocks`, or where calls are being recorded all rows at once and the mask as one opaque op.

    `traced` names the plan whose mask that is.
    """
    if traced:
        return [(slice(None), Mask(torch.ops.peft_fast.dropout_mask(seed, shape, threshold, traced).to(dtype)))]
    return dropped_blocks(seed, shape, threshold)

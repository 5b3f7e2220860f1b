"""Dropout masks of the eager backend, made from a seed: nothing but the seed is kept for backward.

`F.dropout` on the CPU draws one Bernoulli variable after the other and costs as much as a large matmul. Here the
number of random words is what is saved, in two ways that are both exact:

    points   A Poisson process with -log(1 - q) points for each element hits an element at least once with
             probability q, independently of the others. So to drop with a small q, draw the number of points, then
             that many indices with equal probability, and drop what they hit: q words an element, not one.
    bytes    From a sixteenth on, each element has a random byte and is dropped if it lies below floor(256 p);
             points drop the small rest.

The same seed gives the same mask in forward, in backward and in a recomputation. SFC64 is the fastest of numpy's
generators, twice as fast as torch's.
"""

import functools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from peft_fast.reference import keep_scale

# One block of fp32 activations stays in the cache while it is masked and multiplied.
BLOCK_ELEMENTS = 1 << 20
MOST_KEPT_ELEMENTS = 2 * BLOCK_ELEMENTS  # of a mask whose memory a thread keeps
POINTS_PIECE = 1 << 20
BYTES_FROM = 1 << 12  # of 2^16: bytes, of a fixed cost, then cost less than points


class _Thread(threading.local):
    """What each thread keeps: its generator, and memory for masks of each type."""

    def __init__(self) -> None:
        self.stream = np.random.SFC64()
        self.generator = np.random.Generator(self.stream)
        self.state = self.stream.state
        self.memory: dict[torch.dtype, Tensor] = {}
        self.turn = 0


_thread = _Thread()


class Dropped:
    """What is dropped of one block of rows: where `keep`, (n,) bytes for its n elements, is 0 and not 1."""

    __slots__ = ("keep", "mask", "turn")
    mask: Tensor

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self.turn = -1

    def masked(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """mask ∘ x, contiguous and new, or in `out`."""
        return torch.mul(self._mask(x), x, out=out)

    def mask_(self, x: Tensor) -> None:
        """x = mask ∘ x in place; x contiguous."""
        x.mul_(self._mask(x))

    def _mask(self, x: Tensor) -> Tensor:
        """`keep` in x's type: multiplying by booleans costs three times as much, and bytes are cast in a seventh of
        their time.

        It lies where this thread's last mask lay, and is made anew should that have become another's since.
        """
        if self.turn != _thread.turn or self.mask.dtype is not x.dtype:
            self.mask = _memory_of(x).copy_(self.keep).view(x.shape)
            self.turn = _thread.turn = _thread.turn + 1
        return self.mask


def _memory_of(x: Tensor) -> Tensor:
    """Memory for x's elements in x's type, where this thread's last mask lay: new memory is not in the caches."""
    n = x.numel()
    if n > MOST_KEPT_ELEMENTS or not x.is_cpu:
        return torch.empty(n, dtype=x.dtype, device=x.device)
    kept = _thread.memory.get(x.dtype)
    if kept is None or len(kept) < n:
        with torch.inference_mode(False):  # its tensors cannot be written to elsewhere
            kept = _thread.memory[x.dtype] = torch.empty(max(n, BLOCK_ELEMENTS), dtype=x.dtype, device="cpu")
    return kept[:n]


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
    mask = torch.empty(shape, dtype=torch.int8, device="cpu")
    for rows, dropped in dropped_blocks(seed, shape, threshold):
        mask[rows] = dropped.keep.view(mask[rows].shape)
    return mask.view(torch.bool).to(seed.device)


def drop(x: Tensor, threshold: int, seed: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """drop(x) = mask ∘ x / (1 - p), new; x dense and not empty.

    The mask is `dropout_mask(seed, (n, 1), threshold)` in the order in which the result lies in memory, which is x's as
    far as x is dense, or that of `strides`.
    """
    out = torch.empty_like(x) if strides is None else torch.empty_strided(x.shape, strides, dtype=x.dtype)
    torch.mul(x, keep_scale(threshold), out=out)
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
    level = threshold >> 8 if threshold >= BYTES_FROM else 0
    points_per_element = -math.log1p(-(threshold - (level << 8)) / (65536 - (level << 8)))
    stream, generator = _seeded(seed)
    for shape in shapes:
        n = math.prod(shape)
        if level:
            keep = stream.random_raw((n + 7) // 8).view(np.int8)[:n]
            np.greater_equal(keep, np.int8(level - 128), out=keep.view(np.bool_))
        else:
            keep = np.ones(n, np.int8)
        keep[_points(stream, generator, points_per_element, n)] = 0
        yield Dropped(torch.from_numpy(keep))


def blocks_of(
    seed: Tensor, shape: Sequence[int], threshold: int, dtype: torch.dtype, traced: str
) -> Iterable[tuple[slice, Dropped | Mask]]:
    """`dropped_blocks`, or where calls are being recorded all rows at once and the mask as one opaque op.

    `traced` names the plan whose mask that is.
    """
    if traced:
        return [(slice(None), Mask(torch.ops.peft_fast.dropout_mask(seed, shape, threshold, traced).to(dtype)))]
    return dropped_blocks(seed, shape, threshold)


def _points(stream: np.random.SFC64, generator: np.random.Generator, density: float, n: int) -> np.ndarray:
    """The elements of range(n) that a Poisson process with `density` points for each hits; some more than once.

    A 32-bit word times the size of a piece picks each of its elements with the same probability, to 2^-12 of it.
    """
    index = []
    for start in range(0, max(n, 1), POINTS_PIECE):
        size = min(POINTS_PIECE, n - start)
        total = int(generator.poisson(density * size))
        words = stream.random_raw((total + 1) // 2).view(np.uint32)[:total]
        index.append(np.multiply(words, size, dtype=np.int64))
        index[-1] >>= 32
        if start:
            index[-1] += start
    return index[0] if len(index) == 1 else np.concatenate(index)


def _seeded(seed: Tensor) -> tuple[np.random.SFC64, np.random.Generator]:
    """This thread's generator, set to `seed`; setting the state takes half the time of making a generator."""
    value = int(seed.item()) & 0xFFFFFFFFFFFFFFFF
    stream = _thread.stream
    _thread.state["state"]["state"][:] = (value, value, value, 1)
    stream.state = _thread.state
    stream.random_raw(12, output=False)  # the generator's own seeding rule: mix for 12 rounds
    return stream, _thread.generator

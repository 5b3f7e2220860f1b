"""Dropout masks of the eager backend where there is no C compiler.

The number of random words is what is saved, in two ways that are both exact:

    points   A Poisson process with -log(1 - q) points for each element hits an element at least once with
             probability q, independently of the others. So to drop with a small q, draw the number of points, then
             that many indices with equal probability, and drop what they hit: q words an element, not one.
    bytes    From a sixteenth on, each element has a random byte and is dropped if it lies below floor(256 p);
             points drop the small rest.

SFC64 is the fastest of numpy's generators, twice as fast as torch's.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

POINTS_PIECE = 1 << 20
BYTES_FROM = 1 << 12  # of 2^16: bytes, of a fixed cost, then cost less than points


class _Thread(threading.local):
    """Each thread's generator."""

    def __init__(self) -> None:
        self.stream = np.random.SFC64()
        self.generator = np.random.Generator(self.stream)
        self.state = self.stream.state


_thread = _Thread()


class Dropped:
    """What is dropped of one block of rows: where `keep`, (n,) bytes for its n elements, is 0 and not 1."""

    __slots__ = ("keep", "mask")

    def __init__(self, keep: Tensor) -> None:
        self.keep = self.mask = keep

    def masked(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """mask ∘ x, contiguous and new, or in `out`."""
        return torch.mul(self._mask(x), x, out=out)

    def mask_(self, x: Tensor) -> None:
        """x = mask ∘ x in place."""
        x.mul_(self._mask(x))

    def _mask(self, x: Tensor) -> Tensor:
        """`keep` in x's type: multiplying by booleans costs three times as much, and bytes are cast in a seventh of
        their time.
        """
        if self.mask.dtype is not x.dtype:
            self.mask = self.keep.to(x.device, x.dtype)
        return self.mask.view(x.shape)


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

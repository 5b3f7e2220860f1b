"""Dropout masks of the eager backend: 16-bit random words from a generator seeded by a tensor.

Element i of a mask, counted along its rows, is decided by the i-th 16-bit word of a stream, so that the same seed
gives the same mask in forward, in backward and in a recomputation, in blocks of any height. `F.dropout` on the CPU
draws one Bernoulli variable after the other; four words from one 64-bit draw cost a tenth of that. SFC64 is the
fastest of numpy's generators, twice as fast as torch's, and all its 64 bits are random: bit 63 of an int64
`Tensor.random_()` never is.
"""

import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# One block of fp32 activations stays in the cache while it is masked and multiplied.
BLOCK_ELEMENTS = 1 << 18

_thread = threading.local()


def draw_seed(device: torch.device) -> Tensor:
    """A one-element int64 tensor from torch's generator on `device`, without a host sync."""
    return torch.randint(2**63 - 1, (1,), device=device)


def dropout_mask(seed: Tensor, shape: Sequence[int], threshold: int) -> Tensor:
    """The mask that `seed` stands for: a boolean tensor of `shape` on seed's device, True where x is kept."""
    n = math.prod(shape)
    return (_words(_seeded_stream(seed), n) >= _word_threshold(threshold)).view(shape).to(seed.device)


def keep_blocks(
    seed: Tensor, shape: Sequence[int], threshold: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The mask of an (M, K) tensor in blocks of rows: (rows, 1.0 where x is kept and 0.0 where not).

    The blocks share one buffer, which the caller may overwrite.
    """
    M, K = shape
    rows = max(4, BLOCK_ELEMENTS // max(K, 1) // 4 * 4)  # a multiple of 4: no word is left between blocks
    buffer = torch.empty(min(rows, M), K, dtype=dtype, device="cpu")
    stream = _seeded_stream(seed)
    for start in range(0, max(M, 1), rows):  # one empty block where M = 0
        keep = buffer[: M - start] if M - start < rows else buffer
        # In place and then into a float: comparing into another dtype makes a temporary, and multiplying by a bool
        # mask costs five times as much.
        keep.copy_(_words(stream, keep.numel()).view(keep.shape).ge_(_word_threshold(threshold)))
        yield slice(start, start + keep.shape[0]), keep.to(seed.device)


def _seeded_stream(seed: Tensor) -> np.random.SFC64:
    """This thread's generator, set to `seed`; setting the state takes half the time of making a generator."""
    value = int(seed.item()) & 0xFFFFFFFFFFFFFFFF
    stream = getattr(_thread, "stream", None)
    if stream is None:
        stream = _thread.stream = np.random.SFC64()
        _thread.state = stream.state
    _thread.state["state"]["state"][:] = (value, value, value, 1)
    stream.state = _thread.state
    stream.random_raw(12, output=False)  # the generator's own seeding rule: mix for 12 rounds
    return stream


def _words(stream: np.random.SFC64, n: int) -> Tensor:
    """The next n int16 words of the stream; n is a multiple of 4 but for the last call."""
    return torch.from_numpy(stream.random_raw(max(1, (n + 3) // 4))).view(torch.int16)[:n]


def _word_threshold(threshold: int) -> int:
    """Of 65536 equally likely signed words, `threshold` lie below this one."""
    return threshold - (1 << 15)

"""The masks of dropout.c: SFC64's own numbers, whatever the thread, the type and the length; and no compiler needed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_fast import eager, reference
from peft_fast.eager import dropout, dropout_native

CHUNK, GENERATORS = 4096, 8  # as in dropout.c
THRESHOLD = reference.drop_threshold(0.3)
# Below and above one chunk, and what one thread and several do.
LENGTHS = pytest.mark.parametrize("n", [1, 31, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 50_000])


def words(seed: int, n: int) -> np.ndarray:
    """The 16-bit words of the first n elements, by numpy's SFC64."""
    chunks = []
    for chunk in range(-(-n // CHUNK)):
        generators = []
        for j in range(GENERATORS):
            stream = np.random.SFC64()
            state = stream.state
            state["state"]["state"][:] = (seed & 0xFFFFFFFFFFFFFFFF, chunk, j, 1)
            stream.state = state
            stream.random_raw(18, output=False)
            generators.append(stream.random_raw(CHUNK // GENERATORS // 4))
        chunks.append(np.stack(generators, 1).reshape(-1).view(np.uint16))
    return np.concatenate(chunks)[:n]


def pieces(seed: int, *lengths: int) -> list[dropout_native.Dropped]:
    return list(dropout.dropped_pieces(torch.tensor([seed]), [(n,) for n in lengths], THRESHOLD))


@LENGTHS
@pytest.mark.parametrize("seed", [0, 12345, -1, 2**63 - 1])
def test_the_words_are_those_of_sfc64_in_pieces_of_any_length(seed, n):
    expected = words(seed, 2 * n + 5000) >= THRESHOLD
    lengths = (n, 0, 4999, n, 1)
    assert (torch.cat([piece.keep for piece in pieces(seed, *lengths)]).numpy() == expected).all()


@LENGTHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_every_type_has_the_same_mask(dtype, n):
    (piece,) = pieces(7, n)
    keep = piece.keep.bool()
    x = torch.randn(n).to(dtype)
    around = torch.ones(n + 2, dtype=dtype)
    assert piece.masked(x, out=around[1:-1]).data_ptr() == around[1:].data_ptr()
    piece.mask_(masked := x.clone())
    for result in (masked, around[1:-1], piece.masked(x)):
        assert torch.equal(result, torch.where(keep, x, torch.zeros((), dtype=dtype)))
    assert around[0] == around[-1] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scales_on_the_way(dtype):
    (piece,) = pieces(7, 50_000)
    x = torch.randn(500, 100, dtype=dtype)
    assert torch.equal(piece.masked(x.t(), scale=1.7), piece.masked(x.t() * 1.7))


def test_the_number_of_threads_does_not_matter():
    threads = torch.get_num_threads()
    (piece,) = pieces(7, 300_000)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(piece.keep)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_tensors_that_do_not_fit_are_refused():
    (piece,) = pieces(7, 10)
    for x, out in ((torch.ones(11), None), (torch.ones(10), torch.ones(11)), (torch.ones(10), torch.ones(10, 2)[:, 0])):
        with pytest.raises(ValueError, match="expected 10 elements as x has them"):
            piece.masked(x, out=out)


@pytest.mark.parametrize("compiler", ["false", "true", "no-such-compiler --flag"])
def test_no_compiler_no_library(compiler, monkeypatch):
    # One that fails, one that makes nothing, and one that is not there; `CC=` is as good as no CC.
    monkeypatch.setenv("CC", compiler)
    assert dropout_native.library.__wrapped__() is None
    monkeypatch.setenv("CC", "")
    assert dropout_native.library.__wrapped__() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_runs_in_torchs_own_threads():
    def runtimes():
        files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        return {file for file in files if "omp" in Path(file).name}

    before = runtimes()
    assert before
    assert dropout_native.library.__wrapped__() is not None
    assert runtimes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("reordered", [False, True])
def test_drop_follows_the_order_in_memory(reordered, order, dtype):
    x = torch.randn(30, 20, 10, dtype=dtype).permute(order)
    seed, scale = torch.tensor([3]), reference.keep_scale(THRESHOLD)
    strides = torch.empty(x.shape[::-1]).permute(2, 1, 0).stride() if reordered else None
    y = eager.drop(x, THRESHOLD, seed, strides)
    mask = eager.dropout_mask(seed, (x.numel(), 1), THRESHOLD).as_strided(x.shape, y.stride())
    assert y.stride() == (strides or x.stride())
    assert torch.equal(y, x * scale * mask)

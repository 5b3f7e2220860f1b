"""The masks of dropout.c: SFC64's own numbers, whatever the thread, the type and the length; and no compiler needed."""

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_fast import eager, reference
from peft_fast.eager import dropout, dropout_native
from peft_fast.ops.dropout import apply_dropout

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


def keep(piece: dropout_native.Dropped) -> torch.Tensor:
    return piece.masked(torch.ones(piece.n, dtype=torch.bool))


def pieces(seed: int, *lengths: int) -> list[dropout_native.Dropped]:
    return list(dropout.dropped_pieces(torch.tensor([seed]), [(n,) for n in lengths], THRESHOLD))


@LENGTHS
@pytest.mark.parametrize("seed", [0, 12345, -1, 2**63 - 1])
def test_the_words_are_those_of_sfc64_in_pieces_of_any_length(seed, n):
    expected = words(seed, 2 * n + 5000) >= THRESHOLD
    lengths = (n, 0, 4999, n, 1)
    assert (torch.cat([keep(piece) for piece in pieces(seed, *lengths)]).numpy() == expected).all()


@LENGTHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_every_type_has_the_same_mask(dtype, n):
    (piece,) = pieces(7, n)
    kept = keep(piece)
    x = torch.randn(n).to(dtype)
    around = torch.ones(n + 2, dtype=dtype)
    assert piece.masked(x, out=around[1:-1]).data_ptr() == around[1:].data_ptr()
    piece.mask_(masked := x.clone())
    for result in (masked, around[1:-1], piece.masked(x)):
        assert torch.equal(result, torch.where(kept, x, torch.zeros((), dtype=dtype)))
    assert around[0] == around[-1] == 1


def test_what_is_not_a_number_is_dropped_too():
    (piece,) = pieces(7, 50_000)
    for value in (torch.nan, torch.inf, -torch.inf):
        masked = piece.masked(torch.full((500, 100), value))
        assert torch.equal(masked.flatten() == 0, ~keep(piece))


@pytest.mark.parametrize(
    "x",
    [torch.arange(6.0).view(2, 3).t(), torch._neg_view(torch.arange(6.0)), torch._efficientzerotensor((2, 3))],
    ids=["transposed", "negated", "zeros without memory"],
)
def test_masks_what_a_tensor_stands_for(x):
    (piece,) = pieces(7, 6)
    assert torch.equal(piece.masked(x), x * keep(piece).view(x.shape))
    torch.manual_seed(1)
    y = apply_dropout(x, THRESHOLD)
    torch.manual_seed(1)
    mask = apply_dropout(torch.ones_like(x.clone()), THRESHOLD)
    assert torch.equal(y, x * mask)


def test_the_number_of_threads_does_not_matter():
    threads = torch.get_num_threads()
    (piece,) = pieces(7, 300_000)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(keep(piece))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (torch.ones(11), None),
        (torch.ones(10), torch.ones(11)),
        (torch.ones(10), torch.ones(10, 2)[:, 0]),
        (torch.ones(10), torch.ones(10, dtype=torch.bfloat16)),
        (torch.ones(10, device="meta"), None),
    ],
    ids=["size of x", "size of out", "strides", "dtype", "device"],
)
def test_memory_that_does_not_fit_is_refused(x, out):
    (piece,) = pieces(7, 10)
    with pytest.raises(AssertionError):
        piece.masked(x, out=out)


def test_mask_in_place_wants_all_of_its_memory():
    (piece,) = pieces(7, 10)
    for x in (torch.ones(11), torch.ones(10, 2)[:, 0], torch.ones(10, device="meta")):
        with pytest.raises(AssertionError):
            piece.mask_(x)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler_no_library(monkeypatch, tmp_path):
    for compiler, reason in (
        ("false", "false: exit status 1"),
        ("true", "dropout.so"),  # it makes nothing
        ("no-such-compiler --flag", "FileNotFoundError"),
        ('cc "', "No closing quotation"),
        ("cc -fvisibility=hidden", "undefined symbol: drop_"),
        (script(tmp_path / "cc", "echo unhappy >&2; exit 1"), "cc: unhappy"),
    ):
        monkeypatch.setenv("CC", compiler)
        assert reason in dropout_native.load()
    monkeypatch.setenv("CC", "")
    assert not isinstance(dropout_native.load(), str)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert "FileNotFoundError" in dropout_native.load()


def test_a_compiler_of_another_language_or_without_openmp_serves(monkeypatch, tmp_path):
    no_openmp = script(tmp_path / "cc", 'for a; do [ "$a" = -fopenmp ] && exit 1; done; exec cc "$@"')
    (piece,) = pieces(7, 50_000)
    for compiler in ("c++", no_openmp):
        monkeypatch.setenv("CC", compiler)
        assert torch.equal(keep(piece), keep(dropout_native.Dropped(dropout_native.load(), 50_000, 0, 7, THRESHOLD)))


def test_the_first_answer_is_final(monkeypatch):
    """Else forward and backward could draw by different means."""
    monkeypatch.setattr(dropout_native, "_loaded", None)
    attempts = []

    def load():
        attempts.append(1)
        time.sleep(0.1)
        return "at first it failed" if len(attempts) == 1 else "then as well"

    monkeypatch.setattr(dropout_native, "load", load)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: dropout_native.library(), range(8))) == {None}
    assert dropout_native.why_not() == "at first it failed"
    assert len(attempts) == 1


THREADS = """
import os, torch
from peft_fast.eager import dropout_native
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].rpartition("/")[2]}
loaded = runtimes()
torch.set_num_threads(3)
(piece,) = dropout_native.dropped_pieces(dropout_native.load(), torch.tensor([1]), [(100_000,)], 6554)
x = torch.empty(100_000)
before = len(os.listdir("/proc/self/task"))
piece.mask_(x)
print(len(os.listdir("/proc/self/task")) - before)
print(bool(loaded), runtimes() == loaded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_runs_in_torchs_own_threads():
    """As many as torch has, of an OpenMP that is loaded already."""
    run = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert run.stdout.split() == ["2", "True", "True"], run.stderr


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

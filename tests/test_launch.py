"""Launching a kernel again what Triton compiled: by a look-up of our own, which must not be coarser than Triton's."""

import pytest
import torch

pytest.importorskip("triton")

from peft_fast.kernels import _launch


class Kernel:
    """What `launch` knows of a compiled kernel: its signature, what it compiles, and the launches of that."""

    arg_names = ("x_ptr", "out_ptr", "scale", "size", "BLOCK", "WIDE")

    def __init__(self):
        self.compiled, self.launches = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **keywords):
            self.compiled.append((grid, args, keywords))
            return _Compiled(self, len(self.compiled) - 1)

        return compile_and_launch


class _Compiled:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launches.append((self.number, grid, args))


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(_launch, "_compiled", {})
    kernel = Kernel()

    def run(x, out, scale=0.5, size=32, *, grid=(4,), index=0, warps=4, **constexprs):
        constexprs = {"WIDE": False, "BLOCK": 16} | constexprs
        options = {"num_warps": warps, "num_stages": 2}
        _launch._run(kernel, grid, (x, out, scale, size), constexprs, options, index)

    run.kernel = kernel
    return run


def test_the_same_code_runs_again(run):
    x, out, other = torch.zeros(32), torch.zeros(32), torch.ones(64)
    run(x, out)
    run(other, out, 0.25, 48, grid=(2, 3))  # other values, other memory
    ((grid, args, keywords),) = run.kernel.compiled
    assert (grid, args) == ((4,), (x, out, 0.5, 32))
    assert keywords == {"WIDE": False, "BLOCK": 16, "num_warps": 4, "num_stages": 2}
    # Constants in the order of the signature, a grid of three numbers.
    assert run.kernel.launches == [(0, (2, 3, 1), (other, out, 0.25, 48, 16, False))]


@pytest.mark.parametrize(
    "change",
    [
        {"size": 33},
        {"size": 2**31},
        {"x": torch.zeros(32, dtype=torch.float16)},
        {"x": torch.zeros(36)[1:]},  # no multiple of 16 bytes
        {"out": None},
        {"BLOCK": 32},
        {"WIDE": True},
        {"warps": 8},
        {"index": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_code_for_another_call(run, change):
    call = {"x": torch.zeros(32), "out": torch.zeros(32)}
    run(**call)
    run(**call | change)
    run(**call | change)
    assert len(run.kernel.compiled) == 2
    assert [number for number, *_ in run.kernel.launches] == [1]


def test_1_is_no_other_number(run):
    x, out = torch.zeros(32), torch.zeros(32)
    for size in (33, 1, 35):
        run(x, out, size=size)
    assert len(run.kernel.compiled) == 2
    assert [number for number, *_ in run.kernel.launches] == [0]


def test_another_kernel(run, monkeypatch):
    x, out = torch.zeros(32), torch.zeros(32)
    run(x, out)
    other = Kernel()
    _launch._run(other, (4,), (x, out, 0.5, 32), {"BLOCK": 16, "WIDE": False}, {"num_warps": 4, "num_stages": 2}, 0)
    assert len(other.compiled) == 1
    assert other.launches == run.kernel.launches == []

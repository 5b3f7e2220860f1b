"""Launching a kernel again what Triton compiled: by look-ups of our own, which must not be coarser than Triton's."""

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from peft_fast.kernels import _launch
from peft_fast.kernels._launch import Plan, by_layout, recording

CPU = torch.device("cpu")


class Kernel:
    """What a plan knows of a compiled kernel: its signature, what it compiles, and the launches of that."""

    arg_names = ("x_ptr", "out_ptr", "scale", "count", "size", "stride", "BLOCK", "WIDE")

    def __init__(self):
        self.compiled, self.launches = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **keywords):
            self.compiled.append((grid, args, keywords))
            return self.result(len(self.compiled) - 1)

        return compile_and_launch

    def result(self, number):
        return _Compiled(self, number)


class _Compiled:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launches.append((self.number, grid, args))


def plan_of(kernel, size=32, grid=(4, 2), device=CPU, num_warps=4, BLOCK=16):
    return Plan(kernel, grid, size, None, WIDE=False, BLOCK=BLOCK, device=device, num_warps=num_warps, num_stages=2)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(_launch, "_compiled", {})
    kernel = Kernel()
    plan = plan_of(kernel)

    def run(x, out, scale=0.5, count=32):
        plan._run((x, out, scale, count))

    run.kernel = kernel
    return run


def test_the_same_code_runs_again(run):
    x, out, other = torch.zeros(32), torch.zeros(32), torch.ones(64)
    run(x, out)
    run(other, out, 0.25, 48)  # other values, other memory
    ((grid, args, keywords),) = run.kernel.compiled
    assert (grid, args) == ((4, 2), (x, out, 0.5, 32, 32, None))
    assert keywords == {"WIDE": False, "BLOCK": 16, "num_warps": 4, "num_stages": 2}
    # Constants in the order of the signature, a grid of three numbers.
    assert run.kernel.launches == [(0, (4, 2, 1), (other, out, 0.25, 48, 32, None, 16, False))]


@pytest.mark.parametrize(
    "change",
    [
        {"count": 33},
        {"count": 2**31},
        {"x": torch.zeros(32, dtype=torch.float16)},
        {"x": torch.zeros(36)[1:]},  # no multiple of 16 bytes
        {"out": None},
        {"out": torch.nn.Parameter(torch.zeros(36))[1:]},
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
    for count in (33, 1, 35):
        run(x, out, count=count)
    assert len(run.kernel.compiled) == 2
    assert [number for number, *_ in run.kernel.launches] == [0]


@pytest.mark.parametrize(
    ("change", "compiled"),
    [
        ({"size": 64}, 1),
        ({"grid": (3,)}, 1),
        ({"size": 33}, 2),
        ({"size": 1}, 2),
        ({"BLOCK": 32}, 2),
        ({"num_warps": 8}, 2),
        ({"device": torch.device("meta")}, 2),
    ],
    ids=lambda value: str(value),
)
def test_plans_share_code_where_triton_would(run, change, compiled):
    call = (torch.zeros(32), torch.zeros(32), 0.5, 32)
    run(*call)
    plan_of(run.kernel, **change)._run(call)
    assert len(run.kernel.compiled) == compiled
    launched = {"size": 32, "grid": (4, 2)} | change
    expected = (0, (*launched["grid"], 1, 1)[:3], (*call, launched["size"], None, 16, False))
    assert run.kernel.launches == ([expected] if compiled == 1 else [])


def test_another_kernel_has_code_of_its_own(run):
    call = (torch.zeros(32), torch.zeros(32), 0.5, 32)
    run(*call)
    other = Kernel()
    plan_of(other)._run(call)
    assert len(other.compiled) == 1
    assert other.launches == run.kernel.launches == []


def test_an_interpreter_returns_no_code(run):
    run.kernel.result = lambda number: None
    for _ in range(2):
        run(torch.zeros(32), torch.zeros(32))
    assert len(run.kernel.compiled) == 2


def test_an_empty_grid_is_no_launch():
    kernel = Kernel()
    plan = Plan(kernel, (3, 0), 32, WIDE=False, device=CPU, num_warps=4, num_stages=2)
    plan(torch.zeros(0))
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        plan(torch.zeros(0))
    assert kernel.compiled == launches == []


class TestByLayout:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch):
        monkeypatch.setattr(_launch, "_plans", {})
        self.made = []
        self.find = by_layout(lambda *args: self.made.append(args) or len(self.made))

    def test_one_for_all_that_lie_alike(self):
        assert self.find(torch.zeros(4, 8), None, True) == 1
        assert self.find(torch.ones(4, 8), None, True) == 1
        assert len(self.made) == 1

    @pytest.mark.parametrize(
        "other",
        [
            (torch.zeros(8, 8), None, True),
            (torch.zeros(8, 4).T, None, True),
            (torch.zeros(4, 8, dtype=torch.float16), None, True),
            (torch.zeros(4, 8, device="meta"), None, True),
            (torch.zeros(4, 8), torch.zeros(2), True),
            (torch.zeros(4, 8), None, False),
        ],
        ids=["shape", "strides", "dtype", "device", "tensor", "option"],
    )
    def test_another_for_another_call(self, other):
        assert self.find(torch.zeros(4, 8), None, True) == 1
        assert self.find(*other) == 2
        assert self.find(*other) == 2

    def test_another_for_another_chip(self):
        x = torch.zeros(4, 8)
        found = [self.find(x)]
        for arch in (80, 90):
            with recording(GPUTarget("cuda", arch, 32)):
                found.append(self.find(x))
        assert found == [1, 2, 3]

    def test_another_for_another_precision(self, monkeypatch):
        x, half = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.float16)
        found = [self.find(x), self.find(half)]
        monkeypatch.setattr(_launch, "precision", lambda dtype: "tf32" if dtype == torch.float32 else "ieee")
        found += [self.find(x), self.find(half)]
        assert found == [1, 2, 3, 2]

    def test_another_function_has_its_own(self):
        other = by_layout(lambda x: "other")
        assert self.find(torch.zeros(4)) == 1
        assert other(torch.zeros(4)) == "other"

    def test_not_more_and_more(self, monkeypatch):
        monkeypatch.setattr(_launch, "_MOST_PLANS", 3)
        for size in range(9):
            self.find(torch.zeros(size))
        assert len(_launch._plans) <= 3

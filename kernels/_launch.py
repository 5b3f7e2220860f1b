"""What every launcher shares: plans of launches, 64-bit offsets, the kind of chip, recorded launches."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

Made = TypeVar("Made")


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: what a test compiles for chips that are not there."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


_recording: ContextVar[tuple[GPUTarget, list[Launch]] | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(target: GPUTarget) -> Iterator[list[Launch]]:
    """Launches inside the block are made for `target` and appended to the list it yields; none is run."""
    launches: list[Launch] = []
    token = _recording.set((target, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


class Plan:
    """A launch but for its tensors and what their values decide: made once for all calls that are laid out alike.

    Called with the arguments that come first, it runs `kernel` with them and `numbers` on the current stream of
    `device`; an empty grid is no launch.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *numbers: int | None,
        device: torch.device,
        num_warps: int,
        num_stages: int,
        **constexprs: Any,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.device = kernel, grid, numbers, device
        self.constexprs, self.num_warps, self.num_stages = constexprs, num_warps, num_stages
        self.is_empty, self.is_cuda = 0 in grid, device.type == "cuda" and torch.version.hip is None
        self.rest: tuple = ()
        self.runners: dict[tuple, Any] = {}  # by the arguments that come first

    def __call__(self, *first: Any) -> None:
        if self.is_empty:
            return
        recorded = _recording.get()
        if recorded is not None:
            arguments = (*first, *self.numbers)
            launch = Launch(self.kernel, self.grid, arguments, self.constexprs, self.num_warps, self.num_stages)
            recorded[1].append(launch)
        elif not self.is_cuda:
            self._launch(first)
        elif self.device.index == torch.cuda.current_device():
            self._run(first)
        else:
            with torch.cuda.device(self.device):
                self._run(first)

    def _launch(self, first: tuple) -> Any:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return self.kernel[self.grid](*first, *self.numbers, **self.constexprs, **options)

    def _run(self, first: tuple) -> None:
        key = tuple(
            [(arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else _of_number(arg) for arg in first]
        )
        run = self.runners.get(key)
        if run is None:
            constants = [self.constexprs[name] for name in self.kernel.arg_names[len(first) + len(self.numbers) :]]
            self.rest = (*self.numbers, *constants)
            numbers = map(_of_number, self.numbers)
            code = (id(self.kernel), self.device, self.num_warps, self.num_stages, *constants, *key, *numbers)
            compiled = _compiled.get(code)
            is_new = compiled is None
            if is_new:
                compiled = self._launch(first)
                compiled = compiled.result() if hasattr(compiled, "result") else compiled  # compiled asynchronously
                if compiled is None:  # run by the interpreter
                    return
                _compiled[code] = compiled
            run = self.runners[key] = compiled[(*self.grid, 1, 1)[:3]]
            if is_new:
                return
        run(*first, *self.rest)


# What Triton compiled, by what it compiles anew for. Its own look-up took the host of an H100 about 50 us a launch
# more, and a training step of small layers has nothing else to wait for.
_compiled: dict[tuple, Any] = {}


def _of_number(arg: Any) -> Any:
    """What compiled code may take for granted of a number: at least as fine as what Triton looks at."""
    if type(arg) is int:
        return arg if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31)
    return type(arg)


# Of every `by_layout` function, by its arguments. Batches of many lengths make many, so that their number is bounded.
_plans: dict[tuple, Any] = {}
_MOST_PLANS = 1 << 14


def by_layout(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what `make` returns, which depends on its arguments, of tensors on no more than their layout.

    The first argument is the tensor whose dtype and device the kernel goes by.
    """

    @functools.wraps(make)
    def find(x: Tensor, *others: Any) -> Made:
        recorded = _recording.get()
        target = x.device if recorded is None else recorded[0]
        key = (make, target, precision(x.dtype), _layout(x), *map(_layout, others))
        found = _plans.get(key)
        if found is None:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            found = _plans[key] = make(x, *others)
        return found

    return find


def _layout(arg: Any) -> Any:
    return (arg.shape, arg.stride(), arg.dtype) if isinstance(arg, Tensor) else arg


# Triton's own serve device code too, and take microseconds.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an element of one of the tensors lies 2^31 elements or more behind its first."""
    for tensor in tensors:
        if tensor is None or not (size := tensor.numel()):
            continue
        if not tensor.is_contiguous() or size >= 2**31:
            last = 0
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                last += (size - 1) * stride
            if last >= 2**31:
                return True
    return False


def unit(*operands: Tensor | int, most: int = 8) -> int:
    """The largest power of 2 up to `most` that divides every given size and every stride, other than 1, of the tensors.

    What `_tl.tile_ptrs` takes: with 8, rows of 8·odd 16-bit elements still load 16 bytes at a time.
    """
    values = [
        value
        for operand in operands
        for value in ([operand] if isinstance(operand, int) else [s for s in operand.stride() if s != 1])
    ]
    return math.gcd(most, *values)


_capability = functools.cache(torch.cuda.get_device_capability)
_KINDS = {
    (8, 0): "sm80",
    (8, 7): "sm80",
    (9, 0): "sm90",
    (10, 0): "sm100",
    (10, 3): "sm100",
    (12, 0): "sm120",
    (12, 1): "sm120",
}


def chip(device: torch.device) -> str:
    """The kind of chip that tiles are chosen by: "sm80", "sm86", "sm90", "sm100", "sm120", "gfx9" or "interpreter".

    "sm86" and "sm120" have about 100 KiB of shared memory a block; "sm86" stands for all NVIDIA chips not named.
    """
    recorded = _recording.get()
    if recorded is not None:
        target = recorded[0]
        if target.backend == "hip":
            return "gfx9"
        capability = divmod(target.arch, 10)
    elif device.type != "cuda":
        return "interpreter"
    elif torch.version.hip:
        return "gfx9"
    else:
        capability = _capability(device)
    return _KINDS.get(capability, "sm86")


# Tiles are the largest that ptxas compiles without stack or spills for ranks up to 384, with and without dropout
# (tests/test_codegen.py holds them to it). They were read off compiled code, and timed only where it says so. fp32
# means IEEE dots on the ordinary cores, whose operands are registers: small tiles.
@dataclass(frozen=True)
class Tile:
    """A rows×cols tile of the result or of the tall operand, `inner` elements of K and `rank` of R a step."""

    rows: int
    cols: int
    inner: int
    rank: int
    num_warps: int
    num_stages: int


def precision(dtype: torch.dtype) -> str:
    """TF32 only where torch's own switch asks for it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rank_block(R: int, tile: Tile) -> int:
    """BLOCK_R: all of the rank where the tile allows it, at least the 16 that tensor cores reduce at a time."""
    return min(max(16, next_power_of_2(R)), tile.rank)

"""What every launcher shares: launching on the right device, 64-bit offsets, the kind of chip, recorded launches."""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget


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


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constexprs: Any) -> None:
    """Run `kernel` over `grid` on the device and the current stream of its first tensor; an empty grid is no launch."""
    if 0 in grid:
        return
    recorded = _recording.get()
    if recorded is not None:
        recorded[1].append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(first) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an element of one of the tensors lies 2^31 elements or more behind its first."""
    return any(
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31
        for tensor in tensors
        if tensor is not None and tensor.numel() > 0
    )


def unit(*operands: Tensor | int) -> int:
    """The largest of 1, 2, 4, 8 that divides every given size and every stride, other than 1, of the given tensors.

    What `_tl.tile_ptrs` takes: with 8, rows of 8·odd 16-bit elements still load 16 bytes at a time.
    """
    values = [
        value
        for operand in operands
        for value in ([operand] if isinstance(operand, int) else [s for s in operand.stride() if s != 1])
    ]
    return math.gcd(8, *values)


def chip(device: torch.device) -> str:
    """The kind of chip that tiles are chosen by: "sm80", "sm86", "sm90", "sm100", "gfx9" or "interpreter".

    "sm86" stands for all NVIDIA chips with about 100 KiB of shared memory a block (8.6, 8.9, 12.x).
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
        capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (8, 7): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(capability, "sm86")


# Tiles are the largest that ptxas compiles without stack or spills for ranks up to 384, with and without dropout
# (tests/test_codegen.py holds them to it). They were read off compiled code, not timed. fp32 means IEEE
# dots on the ordinary cores, whose operands are registers: small tiles.
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
    return min(max(16, triton.next_power_of_2(R)), tile.rank)

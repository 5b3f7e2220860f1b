"""Dropout masks of the eager backend from dropout.c, which draws a mask while it applies it: about as fast as a copy.

The machine's C compiler makes it when it is first needed, in a fifth of a second. Where there is none, the masks come
from `dropout_numpy`.
"""

import ctypes
import functools
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

SCALED = {torch.float32: "drop_float32", torch.float64: "drop_float64"}
_SELECTED = {1: "drop_8", 2: "drop_16"}  # by bytes of an element
_SOURCE = Path(__file__).with_name("dropout.c")
_ARGUMENTS = [
    ctypes.c_void_p,  # out
    ctypes.c_void_p,  # x
    ctypes.c_int64,  # n
    ctypes.c_int64,  # first
    ctypes.c_uint64,  # seed
    ctypes.c_uint32,  # threshold
    ctypes.c_double,  # scale
]


@functools.cache
def library() -> ctypes.CDLL | None:
    """dropout.c, compiled and loaded, or None where that cannot be. `CC` names the compiler, as for make.

    It is compiled for any processor of this kind: for this one alone it would not be faster. It is not linked with
    OpenMP, so that it runs in the threads of torch's and never in a second set, which would be in their way.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder:
        compiled, linked = str(Path(folder, "dropout.o")), str(Path(folder, "dropout.so"))
        try:
            for command in (
                [*compiler, "-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-c", str(_SOURCE), "-o", compiled],
                [*compiler, "-shared", compiled, "-o", linked],
            ):
                subprocess.run(command, check=True, capture_output=True)
            functions = ctypes.CDLL(linked)
        except (OSError, subprocess.CalledProcessError):
            return None
    for name in (*SCALED.values(), *_SELECTED.values()):
        function = getattr(functions, name)
        function.argtypes, function.restype = _ARGUMENTS, None
    return functions


class Dropped:
    """What is dropped of n elements, from number `first` on, of all that `seed` stands for."""

    __slots__ = ("first", "functions", "n", "seed", "threshold")

    def __init__(self, functions: ctypes.CDLL, n: int, first: int, seed: int, threshold: int) -> None:
        self.functions = functions
        self.n = n
        self.first = first
        self.seed = seed
        self.threshold = threshold

    @property
    def keep(self) -> Tensor:
        """(n,) bytes, 0 where an element is dropped and else 1."""
        return self.masked(torch.ones(self.n, dtype=torch.int8, device="cpu"))

    def masked(self, x: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """scale · mask ∘ x, contiguous and new, or in a contiguous `out`; a scale for fp32 and fp64 alone."""
        x = x.contiguous()
        out = torch.empty_like(x) if out is None else out
        self.apply(x, out, scale)
        return out

    def mask_(self, x: Tensor) -> None:
        """x = mask ∘ x in place; x contiguous."""
        self.apply(x, x)

    def apply(self, x: Tensor, out: Tensor, scale: float = 1.0) -> None:
        """out = scale · mask ∘ x, in the order in which both lie in memory; dense, of the same strides and type."""
        if not self.n == x.numel() == out.numel() or x.stride() != out.stride():
            raise ValueError(f"out: expected {self.n} elements as x has them, got {tuple(out.shape)}, {tuple(x.shape)}")
        function = getattr(self.functions, SCALED.get(x.dtype) or _SELECTED[x.element_size()])
        function(out.data_ptr(), x.data_ptr(), self.n, self.first, self.seed, self.threshold, scale)


def dropped_pieces(
    functions: ctypes.CDLL, seed: Tensor, shapes: Iterable[Sequence[int]], threshold: int
) -> Iterator[Dropped]:
    """What dropout with p = threshold / 2^16 drops of one tensor after the other, of these shapes."""
    number, first = int(seed.item()) & 0xFFFFFFFFFFFFFFFF, 0
    for shape in shapes:
        n = math.prod(shape)
        yield Dropped(functions, n, first, number, threshold)
        first += n

"""Dropout masks of the eager backend from dropout.c, which draws a mask while it applies it.

The machine's C compiler makes it when it is first needed, in a fifth of a second; where that cannot be, the masks come
from `dropout_numpy`. What is dropped becomes 0 even where it is infinite or NaN, as in the kernels.
"""

import ctypes
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

SCALED = {torch.float32: "drop_float32", torch.float64: "drop_float64"}
_UNSCALED = {1: "drop_8", 2: "drop_16"}  # by bytes of an element
_SOURCE = Path(__file__).with_name("dropout.c")
_ARGUMENTS = [
    ctypes.c_void_p,  # out
    ctypes.c_void_p,  # x
    ctypes.c_int64,  # n
    ctypes.c_int64,  # first
    ctypes.c_uint64,  # seed
    ctypes.c_uint32,  # threshold
    ctypes.c_double,  # scale
    ctypes.c_int,  # threads
]

_lock = threading.Lock()
_loaded: ctypes.CDLL | str | None = None


def library() -> ctypes.CDLL | None:
    """dropout.c, compiled and loaded once and for all, or None where that failed."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = load()
    return None if isinstance(_loaded, str) else _loaded


def why_not() -> str:
    """Why there is no library; empty where there is one."""
    return "" if library() is not None else str(_loaded)


def load() -> ctypes.CDLL | str:
    """dropout.c, compiled and loaded, or the reason why not. `CC` names the compiler, as for make."""
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
        with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder:
            try:
                return _compiled(compiler, folder, "-fopenmp")
            except (OSError, subprocess.SubprocessError):  # OpenMP is not there, or not torch's: one thread then
                return _compiled(compiler, folder)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip() or f"exit status {error.returncode}"
        return f"{shlex.join(compiler)}: {said}"
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def _compiled(compiler: list[str], folder: str, *flags: str) -> ctypes.CDLL:
    """It is not linked with OpenMP, so that it runs in the threads of torch's and never in a second set, which would be
    in their way.
    """
    compiled, linked = str(Path(folder, "dropout.o")), str(Path(folder, "dropout.so"))
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        flags = ("-mavx2", *flags)  # half the time, and less than with AVX-512
    for command in (
        [*compiler, "-x", "c", "-std=gnu11", "-O3", "-fPIC", *flags, "-c", str(_SOURCE), "-o", compiled],
        [*compiler, "-shared", compiled, "-o", linked],
    ):
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    functions = ctypes.CDLL(linked)
    for name in (*SCALED.values(), *_UNSCALED.values()):
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

    def masked(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """mask ∘ x, contiguous and new, or in a contiguous `out`."""
        if not x.is_contiguous() or x.is_neg() or x._is_zerotensor():
            x = x.clone(memory_format=torch.contiguous_format)
        out = torch.empty_like(x) if out is None else out
        assert out.is_contiguous()
        self.apply(x, out)
        return out

    def mask_(self, x: Tensor) -> None:
        """x = mask ∘ x in place; x contiguous."""
        assert x.is_contiguous()
        self.apply(x, x)

    def apply(self, x: Tensor, out: Tensor, scale: float = 1.0) -> None:
        """out = scale · mask ∘ x, element by element as both lie in memory, without gaps; a scale for fp32 and fp64
        alone.
        """
        assert self.n == x.numel() == out.numel()
        assert x.dtype is out.dtype
        assert x.is_cpu
        name = SCALED.get(x.dtype) or _UNSCALED[x.element_size()]
        arguments = self.n, self.first, self.seed, self.threshold, scale, torch.get_num_threads()
        getattr(self.functions, name)(out.data_ptr(), x.data_ptr(), *arguments)


def dropped_pieces(
    functions: ctypes.CDLL, seed: Tensor, shapes: Iterable[Sequence[int]], threshold: int
) -> Iterator[Dropped]:
    """What dropout with p = threshold / 2^16 drops of one tensor after the other, of these shapes."""
    number, first = int(seed.item()) & 0xFFFFFFFFFFFFFFFF, 0
    for shape in shapes:
        n = math.prod(shape)
        yield Dropped(functions, n, first, number, threshold)
        first += n

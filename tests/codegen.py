"""What a launch compiles to, read without a GPU: registers, spills, stack, shared memory, tensor-core instructions.

A launch is recorded from a real call (`peft_fast.kernels._launch.recording`) and compiled with the types, constants and
divisibilities that Triton's own launcher would see for its arguments. Triton's interpreter and its compiler exclude
each other in a process, so a test file that compiles is also the program that does: it runs itself by `readings` and
ends in `answer`. Only NVIDIA targets are disassembled.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

ROOT = Path(__file__).parent.parent
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Bytes of shared memory that one block may use (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
}


@dataclass(frozen=True)
class Compiled:
    """Readings of one compiled kernel; sizes in bytes, `registers` a thread."""

    name: str
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_core: int
    wgmma: int
    mma_sync: int
    loads_of_2_bytes: int
    instructions: int


def compile_source(launch: Any, target: GPUTarget) -> Any:
    """Triton's compiled kernel of a recorded launch."""
    kernel = launch.kernel
    backend = make_backend(target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.constexprs, **options)
    options, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def compile_launch(launch: Any, target: GPUTarget) -> Compiled:
    """Compile a recorded launch for an NVIDIA `target` and read off its machine code."""
    compiled = compile_source(launch, target)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    return Compiled(
        name=compiled.metadata.name,
        registers=int(re.search(r"\bREG:(\d+)", usage)[1]),
        stack=int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        spills=sum(_width(op) for op in re.findall(r"\b(?:LDL|STL)((?:\.\w+)*)", sass)),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_core=len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
        loads_of_2_bytes=len(re.findall(r"\bLDG\.E\.[US]16\b", sass)),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    )


def _width(modifiers: str) -> int:
    """Bytes that a local load or store of these modifiers moves for one thread."""
    return next((int(bits) // 8 for bits in re.findall(r"\.(?:U|S)?(8|16|64|128)\b", modifiers)), 4)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def different(launches: Iterable[Any]) -> list[Any]:
    """One launch of each kernel with the same types and constants."""

    def kind(launch: Any) -> str:
        args = [str(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in launch.args]
        return repr((launch.kernel.__name__, args, launch.constexprs))

    return list({kind(launch): launch for launch in launches}.values())


def readings(file: str, *arguments: Any) -> list[dict]:
    """What `file`, a test file that ends in `answer`, compiles for `arguments`, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, file, json.dumps(arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def answer(recorded: Callable[..., list[Any]]) -> None:
    """Print the readings of `recorded(target, ...)` for the arguments that `readings` gives, the first one a chip."""
    arch, *arguments = json.loads(sys.argv[1])
    target = GPUTarget("cuda", arch, 32)
    compiled = [compile_launch(launch, target) for launch in recorded(target, *arguments)]
    json.dump([dataclasses.asdict(kernel) for kernel in compiled], sys.stdout)


def assert_clean(kernel: dict, arch: int) -> None:
    """No stack, no spills, within the chip's shared memory."""
    assert kernel["spills"] == kernel["stack"] == 0, kernel
    assert kernel["shared"] <= SHARED_LIMIT[arch], kernel

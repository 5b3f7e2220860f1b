"""What a launch compiles to, read without a GPU: registers, spills, stack, shared memory, tensor-core instructions.

A launch is recorded from a real call (`peft_fast.kernels._launch.recording`) and compiled with the types, constants and
divisibilities that Triton's own launcher would see for its arguments. Needs a process in which Triton does
not interpret; only NVIDIA targets are disassembled.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from peft_fast.kernels._launch import Launch

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


def compile_source(launch: Launch, target: GPUTarget):
    """Triton's compiled kernel of a recorded launch."""
    kernel = launch.kernel
    backend = make_backend(target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.constexprs, **options)
    options, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def compile_launch(launch: Launch, target: GPUTarget) -> Compiled:
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

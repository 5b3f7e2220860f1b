"""What a launch compiles to, read off its code without a device: registers, memory, tensor cores, width of loads."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor (compute unit); shared memory in bytes.

    CUDA C++ programming guide, compute capabilities; AMD CDNA 3 instruction set architecture and LLVM's AMDGPU target.
    """

    target: GPUTarget
    shared_of_block: int
    shared: int
    warps: int
    blocks: int

    def resident(self, reading: dict) -> int:
        """How many blocks of a compiled kernel fit at a time."""
        warps, registers = reading["warps"], reading["registers"]
        if self.target.backend == "hip":
            # Four SIMDs with 512 registers a lane, in steps of 8, up to 8 waves each.
            fit = min(self.warps, 4 * (512 // _up(max(registers, 1), 8)))
            shared = reading["shared"]
        else:
            # Four partitions with 16K registers, given to a warp in steps of 256.
            fit = min(self.warps, 4 * (16384 // _up(32 * registers, 256)))
            shared = reading["shared"] + 1024  # of the system
        limits = [self.blocks, fit // warps]
        if shared:
            limits.append(self.shared // shared)
        if reading["tensor_memory"]:
            limits.append(TENSOR_MEMORY_COLUMNS // reading["tensor_memory"])
        return min(limits)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _cuda(arch: int, shared_of_block: int, warps: int, blocks: int) -> Chip:
    return Chip(GPUTarget("cuda", arch, 32), shared_of_block << 10, (shared_of_block + 1) << 10, warps, blocks)


CHIPS = {
    "sm_80": _cuda(80, 163, 64, 32),
    "sm_86": _cuda(86, 99, 48, 16),
    "sm_89": _cuda(89, 99, 48, 24),
    "sm_90": _cuda(90, 227, 64, 32),
    "sm_100": _cuda(100, 227, 64, 32),
    "sm_120": _cuda(120, 99, 48, 24),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 32, 16),
}


def source(launch: Any, target: GPUTarget) -> tuple[ASTSource, dict]:
    """A recorded launch with the types, constants and divisibilities that Triton's launcher would see, and options."""
    kernel = launch.kernel
    backend = make_backend(target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.constexprs, **options)
    options, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constexprs, attrs), options.__dict__


def kernel_name(launch: Any) -> str:
    return launch.kernel.__name__.strip("_").removesuffix("_kernel")


def read(launch: Any, chip: Chip) -> dict:
    """Readings of a launch compiled for `chip`; sizes in bytes, `registers` a thread, loads of whole tiles only."""
    src, options = source(launch, chip.target)
    reading = {
        "kernel": kernel_name(launch),
        "tile": {name: value for name, value in launch.constexprs.items() if name.startswith("BLOCK_")},
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "error": "",
    }
    try:
        compiled = triton.compile(src, target=chip.target, options=options)
    except Exception as error:  # of whatever pass gives up
        return reading | _NOTHING | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    reading |= {
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "multiplies": "tt.dot" in compiled.asm["ttir"],
    }
    reading |= _amd(compiled) if chip.target.backend == "hip" else _nvidia(compiled)
    reading |= _loads(compiled, launch.num_warps * chip.target.warp_size)
    return reading | {"blocks": chip.resident(reading)}


# The readings of what does not compile.
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(
        ("shared", "tensor_memory", "registers", "stack", "spills", "instructions", "mma", "mma_in_loop"), 0
    ),
    **dict.fromkeys(("load_smallest", "load_usual", "loads_narrow", "blocks"), 0),
    "multiplies": False,
    "tensor_core": "",
    "narrow_at": [],
}


def _nvidia(compiled: Any) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        # Without an analysis of the data flow, which takes a fifth of the time and changes nothing here.
        code = _run("nvdisasm", "-c", "-ndf", file.name)
    kinds = {"HGMMA": "wgmma", "HMMA": "mma.sync", "UTCHMMA": "tcgen05", "DMMA": "mma.sync"}
    return {
        "registers": int(re.search(r"\bREG:(\d+)", usage)[1]),
        "stack": int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        "spills": sum(_width(op) for op in re.findall(r"\b(?:LDL|STL)((?:\.\w+)*)", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    } | _tensor_cores(code, kinds, r"^(\.L_x_\d+):", r"\bBRA\b.*?(\.L_x_\d+)")


def _width(modifiers: str) -> int:
    """Bytes that a local load or store of these modifiers moves for one thread."""
    return next((int(bits) // 8 for bits in re.findall(r"\.(?:U|S)?(8|16|64|128)\b", modifiers)), 4)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _amd(compiled: Any) -> dict:
    code = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return {
        "registers": count("vgpr_count"),
        "stack": count("private_segment_fixed_size"),
        "spills": 4 * count("vgpr_spill_count"),  # scalar registers spill into lanes of vector registers
        "instructions": len(re.findall(r"^\t[a-z]\w+_", code, re.MULTILINE)),
    } | _tensor_cores(code, {"v_mfma": "mfma"}, r"^(\.LBB\d+_\d+):", r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)")


def _tensor_cores(code: str, kinds: dict[str, str], label: str, branch: str) -> dict:
    """Kind and number of tensor-core instructions, in all and in that innermost loop which has most."""
    names = "|".join(sorted(kinds, key=len, reverse=True))
    found: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(code.splitlines()):
        if match := re.match(label, line):
            labels[match[1]] = number
        elif (match := re.search(branch, line)) and match[1] in labels:
            loops.append((labels[match[1]], number))
        elif match := re.search(rf"\b({names})[._a-z0-9A-Z]*\b", line):
            found.append((number, kinds[match[1]]))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return {
        "tensor_core": "+".join(sorted({kind for _, kind in found})),
        "mma": len(found),
        "mma_in_loop": max((sum(start <= at <= end for at, _ in found) for start, end in inner), default=0),
    }


_LOAD = {
    "ptx": (
        r"ld\.global\S*?(?:\.v(?P<count>\d))?\.[busf](?P<bits>\d+)\b|cp\.async\.c[ag]\.shared\S*.*?, 0x(?P<hex>\w+),"
    ),
    "amdgcn": r"(?:global|buffer)_load_(?P<name>dwordx\d|dword|ushort|ubyte|sbyte|sshort|short|lds\w*)",
}
_AMD_BYTES = {"dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1}


def _loads(compiled: Any, lanes: int) -> dict:
    """Bytes of each instruction that loads from a matrix: the smallest, the most usual, and those too narrow.

    Too narrow is less than 16 bytes, or than a thread's share of the tile where that is less.
    """
    shares = _tile_shares(compiled.asm["ttgir"], lanes)
    language = "ptx" if "ptx" in compiled.asm else "amdgcn"
    at, frames = "", []
    sizes: Counter = Counter()
    narrow: Counter = Counter()
    for line in compiled.asm[language].splitlines():
        if re.match(r"\s*\.loc\s", line):
            frames = re.findall(r"(\w+\.py):(\d+):(\d+)", line.partition("//" if language == "ptx" else ";")[2])
            at = " ".join(map(":".join, frames))
        elif (match := re.search(_LOAD[language], line)) and at in shares:
            size = _bytes(match)
            sizes[size] += 1
            if size < min(16, shares[at]):
                # The line of the kernel or helper that asks for the tile.
                caller = next((frame for frame in frames if frame[0] not in ("_tl.py", "prefix_tile.py")), frames[-1])
                narrow[f"{caller[0]}:{caller[1]} {size} B"] += 1
    return {
        "load_smallest": min(sizes, default=0),
        "load_usual": max(sizes, key=lambda size: (sizes[size], size), default=0),
        "loads_narrow": sum(narrow.values()),
        "narrow_at": sorted(narrow),
    }


def _bytes(match: re.Match) -> int:
    groups = match.groupdict()
    if name := groups.get("name"):
        return 4 * int(name[-1]) if name[-1].isdigit() else _AMD_BYTES.get(name, 4)
    if groups["hex"]:
        return int(groups["hex"], 16)
    return int(groups["count"] or 1) * int(groups["bits"]) // 8


def _tile_shares(ttgir: str, lanes: int) -> dict[str, int]:
    """Bytes of a thread's share of each tile that is loaded, by the load's place: "file:line:column", then callers'."""
    locations = dict(re.findall(r"^(#loc\d+) = loc\((.*)\)$", ttgir, re.MULTILINE))

    def place(name: str) -> str:
        text = locations[name]
        if match := re.match(r'"(.*)":(\d+):(\d+)', text):
            return ":".join((os.path.basename(match[1]), match[2], match[3]))
        return " ".join(map(place, re.findall(r"#loc\d+", text)))

    shares: dict[str, int] = {}
    pattern = r"(?:tt\.load|async_copy_global_to_local|buffer_load\S*) .*tensor<(\d+)x(\d+)x(.*?), #.*loc\((#loc\d+)\)$"
    for rows, cols, element, name in re.findall(pattern, ttgir, re.MULTILINE):
        if "1" in (rows, cols):
            continue
        bits = int(re.search(r"\d+", element.replace("!tt.ptr", ""))[0])
        share = int(rows) * int(cols) * max(bits, 8) // 8 // lanes
        where = place(name)
        shares[where] = min(share, shares.get(where, share))
    return shares

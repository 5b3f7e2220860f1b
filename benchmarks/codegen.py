"""What the kernels compile to for each chip: registers, spills, memory, occupancy, tensor cores, width of loads.

Needs no device. `python -m benchmarks.codegen` compiles each kernel as every call of `_calls` launches it, for every
chip; that took 73 minutes on two cores beside other work, and takes less where Triton's cache has them.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from benchmarks._calls import OPS, Call, calls
from benchmarks._readings import CHIPS, TENSOR_MEMORY_COLUMNS, kernel_name, read, source

# What the tests take, since all of it takes long: bf16 on every chip, the other dtypes and what takes most registers on
# one chip with wgmma and one without, fp16 on the first; the kernel that only adds partial sums in the first of
# these alone. Whoever changes a kernel or a tile runs all of it.
_BF16 = {"R 8, split", "R 8, fused", "R 48, plain", "DH 64, padding"}
_BF16_ON_TWO = {
    "R 8, few rows",
    "R 64, fused 128x128",
    "R 64, fused 64x128",
    "R 64, fused tma",
    "R 16, fused, rows of 4104",
    "R 256, norms",
    "DH 64, gate",
    "DH 64, decoding",
    "DH 64, cap, 1032 tokens",
}
_OTHERS_ON_TWO = {"R 64, split", "R 64, fused", "R 64, norms", "DH 64, gate"}

# Fewer are no kernel, but what a compiler leaves where it gave up without saying so.
_LEAST_INSTRUCTIONS = 32


def is_quick(call: Call, chip: str, kernel: str) -> bool:
    if call.dtypes == "bf16" and call.name in _BF16:
        return True
    if kernel == "sum_partials":
        return False
    if chip == "sm_100" and (call.dtypes, call.name) == ("fp32", "R 8, split"):  # no TF32 where nobody asked for it
        return True
    if chip not in ("sm_80", "sm_90") or call.dtypes == "tf32":
        return False
    if chip == "sm_80" and call.dtypes.startswith("fp16"):  # as bf16 there
        return False
    return call.name in (_BF16_ON_TWO if call.dtypes == "bf16" else _OTHERS_ON_TWO)


def faults(row: dict) -> list[str]:
    """What is wrong with a compiled kernel."""
    if row["error"]:
        return [row["error"]]
    chip = CHIPS[row["chip"]]
    found = [f"{row[name]} B of {name}" for name in ("stack", "spills") if row[name]]
    if row["shared"] > chip.shared_of_block:
        found.append(f"{row['shared']} B of shared memory, {chip.shared_of_block} there")
    if row["tensor_memory"] > TENSOR_MEMORY_COLUMNS:
        found.append(f"{row['tensor_memory']} columns of tensor memory, {TENSOR_MEMORY_COLUMNS} there")
    if row["instructions"] < _LEAST_INSTRUCTIONS:
        found.append(f"{row['instructions']} instructions are no kernel")
    # IEEE products of fp32, which on NVIDIA's tensor cores would be TF32: only where torch's switch asks for it.
    ordinary = row["dtypes"] == "fp32" and row["chip"].startswith("sm_")
    if bool(row["mma"]) != (row["multiplies"] and not ordinary):
        found.append(f"{row['mma']} tensor-core instructions")
    # wgmma takes TF32 operands only as they lie along K, others are transposed on the way; and Triton's buffer loads on
    # AMD chips do not see that a row of 8·odd elements is aligned.
    if row["loads_narrow"] and row["dtypes"] != "tf32" and row["chip"].startswith("sm_"):
        found.append(f"narrow loads: {', '.join(row['narrow_at'])}")
    return found


_launches: list[tuple[str, Any]] = []


def measure(chips: Iterable[str], wanted: Callable[[Call, str, str], bool], processes: int) -> list[dict]:
    """A row for each different kernel of each chip that is wanted, by call, chip and kernel."""
    rows = []
    _launches.clear()  # workers find a launch by its index
    for chip in chips:
        seen = set()
        for call in calls():
            for launch in call.launches(CHIPS[chip].target):
                if not wanted(call, chip, kernel_name(launch)):
                    continue
                src, options = source(launch, CHIPS[chip].target)
                key = (src.hash(), options["num_warps"], options["num_stages"])
                if key not in seen:
                    seen.add(key)
                    rows.append({"op": call.op, "dtypes": call.dtypes, "call": call.name, "chip": chip})
                    _launches.append((chip, launch))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        readings = pool.imap(_read, range(len(rows)))
        for row, reading in zip(rows, tqdm(readings, total=len(rows), unit="kernel", file=sys.stderr), strict=True):
            row |= reading
            row["faults"] = faults(row)
    return rows


def _read(index: int) -> dict:
    chip, launch = _launches[index]
    return read(launch, CHIPS[chip])


def summary(rows: list[dict]) -> list[dict]:
    """One row for each kernel and chip: how many configurations, and of each reading the worst."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["op"], row["kernel"], row["chip"]].append(row)
    worst = []
    for (op, kernel, chip), group in groups.items():
        most = {
            name: max(row[name] for row in group)
            for name in ("registers", "spills", "stack", "shared", "tensor_memory", "loads_narrow")
        }
        worst.append(
            {"op": op, "kernel": kernel, "chip": chip, "configurations": len(group)}
            | most
            | {
                "resident_warps": min(row["blocks"] * row["warps"] for row in group),
                "tensor_core": " ".join(sorted({row["tensor_core"] for row in group} - {""})),
                "load_usual": min((row["load_usual"] for row in group if row["load_usual"]), default=0),
                "faulty": sum(bool(row["faults"]) for row in group),
            }
        )
    return worst


def print_rows(rows: list[dict]) -> None:
    print(
        f"{'kernel':<17} {'dtypes':<9} {'call':<27} {'chip':<6} {'tile':<14} warps/stages registers spills stack "
        f"shared (of) tensor-memory blocks warps mma (loop) load (least)"
    )
    for row in rows:
        limit = CHIPS[row["chip"]].shared_of_block
        print(
            f"{row['kernel']:<17} {row['dtypes']:<9} {row['call']:<27} {row['chip']:<6} "
            f"{'x'.join(map(str, row['tile'].values())):<14} {row['warps']}/{row['stages']} {row['registers']:>4} "
            f"{row['spills']:>4} {row['stack']:>4} {row['shared'] / 1024:>6.1f} ({limit >> 10}K) "
            f"{row['tensor_memory']:>4} {row['blocks']:>3} {row['blocks'] * row['warps']:>3} "
            f"{row['tensor_core'] or '-':<9} {row['mma']:>3} ({row['mma_in_loop']}) "
            f"{row['load_usual']:>3} ({row['load_smallest']}) {'; '.join(row['faults'])}"
        )


def print_summary(rows: list[dict]) -> None:
    print("kernel            chip   configs registers spills stack shared tensor-memory warps load faulty tensor cores")
    for row in rows:
        print(
            f"{row['kernel']:<17} {row['chip']:<6} {row['configurations']:>7} {row['registers']:>9} "
            f"{row['spills']:>6} {row['stack']:>5} {row['shared']:>6} {row['tensor_memory']:>13} "
            f"{row['resident_warps']:>5} {row['load_usual']:>4} {row['faulty']:>6} {row['tensor_core'] or '-'}"
        )


def write(path: Path, rows: list[dict]) -> None:
    """The rows, one a line, with versions and date."""
    head = {"triton": triton.__version__, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", action="append", choices=CHIPS, help="only this chip; may be repeated")
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only the calls that the tests take")
    parser.add_argument("--summary", action="store_true", help="one row for each kernel and chip, of worst readings")
    parser.add_argument("--check", action="store_true", help="exit 1 where a kernel has a fault")
    parser.add_argument("--json", type=Path, help="write the rows, with versions and date, to this file")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()

    def wanted(call: Call, chip: str, kernel: str) -> bool:
        return (not arguments.op or call.op in arguments.op) and (not arguments.quick or is_quick(call, chip, kernel))

    rows = measure(arguments.chip or CHIPS, wanted, arguments.processes)
    shown = summary(rows) if arguments.summary else rows
    (print_summary if arguments.summary else print_rows)(shown)
    if arguments.json:
        write(arguments.json, shown)
    faulty = [row for row in rows if row["faults"]]
    print(f"{len(rows)} kernels, {len(faulty)} with a fault")
    if arguments.check and faulty:
        print_rows(faulty)
        sys.exit(1)


if __name__ == "__main__":
    main()

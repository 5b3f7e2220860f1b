"""What real calls of the launchers compile to, for chips that need not be there.

Triton's interpreter and its compiler exclude each other in a process: the rows come from `benchmarks.codegen` as a
process of its own. --quick takes each kernel of usual calls for every chip, the other dtypes and what takes most
registers for a chip with wgmma and one without, fp16 for the first alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks._readings import CHIPS, _tensor_cores
from benchmarks.codegen import faults

KERNELS = {
    "lora_linear": {"shrink", "factor_grad", "sum_partials", "matmul", "update"},
    "bottleneck_adapter": {"adapter_fwd", "adapter_bwd", "factor_grad", "sum_partials"},
    "prefix_attention": {"attention_fwd", "attention_dq", "attention_dkv", "sum_partials"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("codegen") / "rows.json"
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--quick", "--json", str(path)]
    run = subprocess.run(
        command, cwd=root, env=environment | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_is_clean(rows, chip):
    """No stack, no spills, within shared and tensor memory, tensor cores for 16 bits, 16-byte loads."""
    rows = [row for row in rows if row["chip"] == chip]
    assert {row["op"]: row["faults"] for row in rows if row["faults"]} == {}
    for op, kernels in KERNELS.items():
        assert {row["kernel"] for row in rows if row["op"] == op} >= kernels


@pytest.mark.parametrize(
    ("chip", "dtypes"),
    [("sm_80", ["bf16", "bf16-fp32", "fp32"]), ("sm_90", ["bf16", "bf16-fp32", "fp16", "fp16-fp32", "fp32"])],
)
def test_every_dtype_is_compiled(rows, chip, dtypes):
    found = {(row["op"], row["dtypes"]) for row in rows if row["chip"] == chip}
    assert found == {(op, d) for op in KERNELS for d in dtypes}


@pytest.mark.parametrize(
    ("chip", "kind"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_newest_tensor_cores_are_used(rows, chip, kind):
    # Tiles of a few rows, as one query at a time leaves, are too small for wgmma.
    names = ("matmul", "update", "shrink", "attention_fwd", "attention_dq")
    rows = [row for row in rows if row["chip"] == chip and row["kernel"] in names and row["call"] != "DH 64, decoding"]
    kinds = {row["tensor_core"] for row in rows if row["dtypes"] != "fp32"}
    assert kinds == {kind}


CLEAN = {
    "chip": "sm_90",
    "dtypes": "bf16",
    "error": "",
    "stack": 0,
    "spills": 0,
    "shared": 227 << 10,
    "tensor_memory": 512,
    "instructions": 500,
    "mma": 8,
    "multiplies": True,
    "loads_narrow": 0,
    "narrow_at": [],
}


@pytest.mark.parametrize(
    "change",
    [
        {"error": "RuntimeError"},
        {"stack": 8},
        {"spills": 8},
        {"shared": (227 << 10) + 1},
        {"chip": "sm_86"},
        {"tensor_memory": 520},
        {"instructions": 16},
        {"mma": 0},
        {"dtypes": "fp32"},
        {"loads_narrow": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_fault_is_named(change):
    assert faults(CLEAN) == []
    assert len(faults(CLEAN | change)) == 1


# By hand: registers, shared memory, warps and tensor memory limit in turn.
@pytest.mark.parametrize(
    ("chip", "registers", "warps", "shared", "tensor_memory", "blocks"),
    [
        ("sm_90", 128, 8, 0, 0, 2),
        ("sm_90", 129, 8, 0, 0, 1),
        ("sm_90", 32, 4, 100 << 10, 0, 2),
        ("sm_86", 32, 8, 0, 0, 6),
        ("sm_80", 16, 1, 0, 0, 32),
        ("sm_100", 32, 4, 0, 256, 2),
        ("gfx942", 128, 4, 0, 0, 4),
        ("gfx942", 129, 4, 20 << 10, 0, 3),
    ],
)
def test_resident_blocks(chip, registers, warps, shared, tensor_memory, blocks):
    reading = {"registers": registers, "warps": warps, "shared": shared, "tensor_memory": tensor_memory}
    assert CHIPS[chip].resident(reading) == blocks


def test_innermost_loop_is_found():
    code = "HMMA.1\n.L_x_0:\n.L_x_1:\nHMMA.2\nHMMA.3\n@P0 BRA `(.L_x_1) ;\nHMMA.4\n@P1 BRA `(.L_x_0) ;\nBRA `(.L_x_9) ;"
    found = _tensor_cores(code, {"HMMA": "mma.sync"}, r"^(\.L_x_\d+):", r"\bBRA\b.*?(\.L_x_\d+)")
    assert found == {"tensor_core": "mma.sync", "mma": 4, "mma_in_loop": 2}


_ONE_SEQUENCE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from benchmarks._readings import source
from peft_fast.kernels._launch import recording
from peft_fast.kernels.prefix_attention import attention_bwd, attention_fwd

target = GPUTarget("cuda", 90, 32)
shapes = ((1, 4, 64, 64), (4, 16, 64), (4,))
query, prefix, gate = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
options = {"is_causal": True, "sliding_window": None, "softcap": None, "scale": 0.125}
inputs = (query, query, query, prefix, prefix, None, gate, 0, None)
with recording(target) as launches:
    y, lse = attention_fwd(*inputs, **options)
    attention_bwd(query, *inputs, y, lse, needs={"query", "prefix_key", "gate"}, **options)
for launch in launches:
    code, settings = source(launch, target)
    triton.compile(code, target=target, options=settings)
print(len(launches))
"""

_SIZES_OF_ONE = """
import torch, triton
from benchmarks._calls import _bottleneck_adapter, _lora_linear, _prefix_attention
from benchmarks._readings import CHIPS, source
from peft_fast.kernels._launch import recording

target, types = CHIPS["sm_90"].target, (torch.bfloat16, torch.float32)
with recording(target) as launches:
    for norms in (), ("before",), ("after",):
        _bottleneck_adapter(*types, R=1, norms=norms)
    _bottleneck_adapter(*types, R=1, norms=("before", "after"), M=1, K=1)
    for plan in "split", "fused":
        _lora_linear(*types, R=1, plan=plan)
        _lora_linear(*types, R=1, plan=plan, M=1, N=1)
        _lora_linear(*types, R=1, plan=plan, K=1)
for launch in launches:
    code, settings = source(launch, target)
    triton.compile(code, target=target, options=settings)
print(len(launches))
"""

_FLOAT64 = """
import torch
from benchmarks._calls import _lora_linear, _prefix_attention
from benchmarks._readings import CHIPS, read
from peft_fast.kernels._launch import recording
from peft_fast.support import MAX_KERNEL_HEAD_SIZE

widest = MAX_KERNEL_HEAD_SIZE[torch.float64.itemsize]
calls = {
    "sm_86": [
        lambda: _prefix_attention(torch.float64, torch.float64, DH=widest, mask="bool", gate=True),
        lambda: _lora_linear(torch.float64, torch.float64, R=64, threshold=0, bias=False),
    ],
    "sm_90": [lambda: _prefix_attention(torch.float64, torch.float64, DH=widest, mask="bool")],
}
count = 0
for name, wanted in calls.items():
    chip = CHIPS[name]
    for call in wanted:
        with recording(chip.target) as launches:
            call()
        for launch in launches:
            reading = read(launch, chip)
            assert not reading["error"], (name, reading)
            assert reading["shared"] <= chip.shared_of_block, (name, reading)
            count += 1
print(count)
"""


# What only a compiler shows: an argument that is 1 reaches a kernel as a plain number, which has no methods; a mask of
# bytes beside fp64, and whether fp64 fits. Speed is none of fp64's, so that spills do not count there.
@pytest.mark.parametrize(
    ("script", "least"),
    [(_ONE_SEQUENCE, 4), (_SIZES_OF_ONE, 40), (_FLOAT64, 14)],
    ids=["batch of one", "sizes of one", "fp64"],
)
def test_rare_calls_compile(script, least):
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= least

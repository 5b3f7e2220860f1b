"""What real calls of the LoRA launchers compile to, for chips that need not be there.

Triton's interpreter and its compiler exclude each other in a process, so this file is also the program that
compiles: it runs itself and reads the answer as JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}


def compiled_launches(arch: int, dtypes: str, M: int, K: int, N: int, R: int, bias: bool) -> list[dict]:
    """Readings of every different launch of forward and backward, both plans, with and without dropout."""
    from triton.backends.compiler import GPUTarget

    from benchmarks.codegen import compile_launch
    from peft_fast.kernels._launch import recording
    from peft_fast.kernels.lora_linear import lora_bwd, lora_fwd

    dtype, factor_dtype = DTYPES[dtypes]

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, dy, bias = meta(M, K), meta(N, K), meta(M, N), meta(N) if bias else None
    lora_a, lora_b = meta(R, K, dtype=factor_dtype), meta(N, R, dtype=factor_dtype)
    seed = meta(1, dtype=torch.int64)
    target = GPUTarget("cuda", arch, 32)
    with recording(target) as launches:
        for plan in ("fused", "split"):
            for threshold in (0, 6554):
                _, s = lora_fwd(x, weight, lora_a, lora_b, bias, 2.0, threshold, seed, plan=plan)
                needs = (True, True, True, bias is not None)
                lora_bwd(dy, x, weight, lora_a, lora_b, s, 2.0, threshold, seed, needs=needs, plan=plan)

    def kind(launch):
        args = [str(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in launch.args]
        return repr((launch.kernel.__name__, args, launch.constexprs))

    different = {kind(launch): launch for launch in launches}
    return [dataclasses.asdict(compile_launch(launch, target)) for launch in different.values()]


def readings(*arguments) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, __file__, json.dumps(arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_clean(kernel: dict, limit: int) -> None:
    assert kernel["spills"] == kernel["stack"] == 0, kernel
    assert kernel["shared"] <= limit, kernel


# The types that take different paths, on a chip before wgmma and one with it; rank 64 is the largest single block of
# the rank where factors are split into three terms, 384 takes several blocks everywhere.
@pytest.mark.parametrize(
    ("dtypes", "R"),
    [("fp32", 16), ("fp16", 16), ("bf16", 16), ("fp16-fp32", 16), ("bf16-fp32", 16), ("bf16-fp32", 64), ("bf16", 384)],
    ids=lambda value: f"rank{value}" if isinstance(value, int) else value,
)
@pytest.mark.parametrize("arch", [80, 90])
def test_no_spills_and_tensor_cores(arch, dtypes, R):
    limit = {80: 163, 90: 227}[arch] << 10
    kernels = readings(arch, dtypes, 8192, 4096, 4096, R, True)
    assert {kernel["name"].strip("_") for kernel in kernels} == {
        f"{name}_kernel" for name in ("shrink", "factor_grad", "sum_partials", "matmul", "update")
    }
    for kernel in kernels:
        assert_clean(kernel, limit)
        if dtypes == "fp32":
            # IEEE products: TF32 only where torch's switch asks for it.
            assert kernel["tensor_core"] == 0, kernel
        elif kernel["name"] != "_sum_partials_kernel":
            instruction = "wgmma" if arch == 90 else "mma_sync"
            assert kernel[instruction] == kernel["tensor_core"] > 0, kernel


# Rows of 8·513 elements: Triton sees no multiple of 16 and would load single elements.
def test_rows_of_8_times_odd_load_16_bytes():
    for kernel in readings(90, "bf16", 8192, 4104, 4104, 16, False):
        assert_clean(kernel, 227 << 10)
        assert kernel["loads_of_2_bytes"] == 0, kernel


if __name__ == "__main__":
    json.dump(compiled_launches(*json.loads(sys.argv[1])), sys.stdout)

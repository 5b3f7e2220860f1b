"""What real calls of the LoRA launchers compile to, for chips that need not be there."""

import pytest
import torch

pytest.importorskip("triton")

from codegen import answer, assert_clean, different, readings

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}


def recorded(target, dtypes: str, M: int, K: int, N: int, R: int, bias: bool) -> list:
    """Every different launch of forward and backward, both plans, with and without dropout."""
    from peft_fast.kernels._launch import recording
    from peft_fast.kernels.lora_linear import lora_bwd, lora_fwd

    dtype, factor_dtype = DTYPES[dtypes]

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, dy, bias = meta(M, K), meta(N, K), meta(M, N), meta(N) if bias else None
    lora_a, lora_b = meta(R, K, dtype=factor_dtype), meta(N, R, dtype=factor_dtype)
    seed = meta(1, dtype=torch.int64)
    with recording(target) as launches:
        for plan in ("fused", "split"):
            for threshold in (0, 6554):
                _, s = lora_fwd(x, weight, lora_a, lora_b, bias, 2.0, threshold, seed, plan=plan)
                needs = (True, True, True, bias is not None)
                lora_bwd(dy, x, weight, lora_a, lora_b, s, 2.0, threshold, seed, needs=needs, plan=plan)
    return different(launches)


# The types that take different paths, on a chip before wgmma and one with it; rank 64 is the largest single block of
# the rank where factors are split into three terms, 384 takes several blocks everywhere.
@pytest.mark.parametrize(
    ("dtypes", "R"),
    [("fp32", 16), ("fp16", 16), ("bf16", 16), ("fp16-fp32", 16), ("bf16-fp32", 16), ("bf16-fp32", 64), ("bf16", 384)],
    ids=lambda value: f"rank{value}" if isinstance(value, int) else value,
)
@pytest.mark.parametrize("arch", [80, 90])
def test_no_spills_and_tensor_cores(arch, dtypes, R):
    kernels = readings(__file__, arch, dtypes, 8192, 4096, 4096, R, True)
    assert {kernel["name"].strip("_") for kernel in kernels} == {
        f"{name}_kernel" for name in ("shrink", "factor_grad", "sum_partials", "matmul", "update")
    }
    for kernel in kernels:
        assert_clean(kernel, arch)
        if dtypes == "fp32":
            # IEEE products: TF32 only where torch's switch asks for it.
            assert kernel["tensor_core"] == 0, kernel
        elif kernel["name"] != "_sum_partials_kernel":
            instruction = "wgmma" if arch == 90 else "mma_sync"
            assert kernel[instruction] == kernel["tensor_core"] > 0, kernel


# Rows of 8·513 elements: Triton sees no multiple of 16 and would load single elements.
def test_rows_of_8_times_odd_load_16_bytes():
    for kernel in readings(__file__, 90, "bf16", 8192, 4104, 4104, 16, False):
        assert_clean(kernel, 90)
        assert kernel["loads_of_2_bytes"] == 0, kernel


if __name__ == "__main__":
    answer(recorded)

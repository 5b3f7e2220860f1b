"""What real calls of the bottleneck adapter's launchers compile to, for chips that need not be there."""

import pytest
import torch

pytest.importorskip("triton")

from codegen import answer, assert_clean, readings

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
# What a launch multiplies with, if anything.
KERNELS = {
    "adapter_fwd_kernel": "products",
    "adapter_bwd_kernel": "products",
    "_up_grad_kernel": "products",
    "_factor_grad_kernel": "products",
    "_sum_up_grads_kernel": "",
    "_down_grad_kernel": "",
    "_sum_partials_kernel": "",
}


def recorded(target, dtypes: str, R: int, norms: bool) -> list:
    """Every different launch of forward and backward, with dropout, residual x and every gradient."""
    from peft_fast.kernels._launch import recording
    from peft_fast.kernels.bottleneck_adapter import adapter_bwd, adapter_fwd

    dtype, weight_dtype = DTYPES[dtypes]
    M, K = 8192, 768

    def meta(*shape, dtype=weight_dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy = meta(M, K, dtype=dtype), meta(M, K, dtype=dtype)
    norm = (meta(K), meta(K)) if norms else None
    inputs = (x, x, meta(R, K), meta(R), meta(K, R), meta(K), meta(), norm, norm)
    options = {"activation": "gelu", "residual_after_norm": False}
    seed, threshold = meta(1, dtype=torch.int64), 6554
    needs = {"x", "down_weight", "down_bias", "up_weight", "up_bias", "scaling"}
    needs |= {"norm_before", "norm_after"} if norms else set()
    with recording(target) as launches:
        _, z, *stats = adapter_fwd(*inputs, threshold, seed, eps=1e-5, **options)
        adapter_bwd(dy, *inputs, z, *stats, threshold, seed, needs=needs, **options)
    # One of the second passes, which LoRA's test compiles too.
    return list({launch.kernel.__name__: launch for launch in launches}.values())


# Both norms take most registers, none is the usual adapter. A rank of one block and one of several on each chip, in the
# types that take different paths: rounded operands, fp16's range, three terms, IEEE products.
@pytest.mark.parametrize(
    ("arch", "dtypes", "R", "norms"),
    [
        (80, "bf16", 48, False),
        (80, "bf16", 256, True),
        (80, "bf16-fp32", 64, True),
        (90, "bf16", 48, False),
        (90, "bf16", 256, True),
        (90, "fp16", 64, True),
        (90, "bf16-fp32", 64, True),
        (90, "fp32", 48, True),
    ],
    ids=lambda value: {True: "norms", False: "plain"}[value] if isinstance(value, bool) else str(value),
)
def test_no_spills_and_tensor_cores(arch, dtypes, R, norms):
    kernels = readings(__file__, arch, dtypes, R, norms)
    assert {kernel["name"] for kernel in kernels} == KERNELS.keys() - (set() if norms else {"_down_grad_kernel"})
    for kernel in kernels:
        assert_clean(kernel, arch)
        # IEEE products of fp32: TF32 only where torch's switch asks for it.
        multiplies = KERNELS[kernel["name"]] and dtypes != "fp32"
        assert (kernel["tensor_core"] > 0) == bool(multiplies), kernel


if __name__ == "__main__":
    answer(recorded)

"""What real calls of prefix attention's launchers compile to, for chips that need not be there."""

import pytest
import torch

pytest.importorskip("triton")

from codegen import answer, assert_clean, different, readings

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
# The calls of usual models: encoders under a padding mask, decoders with and without dropout, with a window and with
# packed sequences, and what holds most in registers: a cap, a gate.
CALLS = {
    "padding": {"mask": "keys", "p": 0.1},
    "causal": {"causal": True},
    "causal-dropout": {"causal": True, "p": 0.1},
    "window": {"causal": True, "window": 512, "mask": "bool"},
    "cap": {"causal": True, "softcap": 30.0, "mask": "bias"},
    "gate": {"causal": True, "gate": True, "p": 0.1, "mask": "bool"},
}


def recorded(target, dtypes: str, call: str, DH: int, S: int = 1024, group: int = 4) -> list:
    """Every different launch of forward and backward, with every gradient."""
    from peft_fast.kernels._launch import recording
    from peft_fast.kernels.prefix_attention import attention_bwd, attention_fwd

    dtype, prefix_dtype = DTYPES[dtypes]
    options = {"p": 0.0, "mask": None, "gate": False, "causal": False, "window": None, "softcap": None} | CALLS[call]
    Z, H_KV, T, P = 8, 2, max(S, 1024), 32
    H = H_KV * group

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value, dy = (
        meta(Z, length, heads, DH).transpose(1, 2) for length, heads in ((S, H), (T, H_KV), (T, H_KV), (S, H))
    )
    prefix_key, prefix_value = meta(H_KV, P, DH, dtype=prefix_dtype), meta(H_KV, P, DH, dtype=prefix_dtype)
    mask = {
        None: None,
        "keys": meta(Z, 1, 1, T, dtype=torch.bool),
        "bool": meta(Z, 1, S, T, dtype=torch.bool),
        "bias": meta(1, H, S, T),
    }[options["mask"]]
    gate = meta(H, dtype=prefix_dtype) if options["gate"] else None
    threshold = 6554 if options["p"] else 0
    inputs = (query, key, value, prefix_key, prefix_value, mask, gate, threshold, meta(1, dtype=torch.int64))
    arguments = {
        "is_causal": options["causal"],
        "sliding_window": options["window"],
        "softcap": options["softcap"],
        "scale": DH**-0.5,
    }
    needs = {"query", "key", "value", "prefix_key", "prefix_value"} | ({"gate"} if options["gate"] else set())
    with recording(target) as launches:
        y, lse = attention_fwd(*inputs, **arguments)
        attention_bwd(dy, *inputs, y, lse, needs=needs, **arguments)
    return different(launches)


# Each call with the head size of many models on a chip without wgmma and on one with it; the larger heads, whose tiles
# differ, with what holds most; each other pair of types, and the 8·odd features of small models, once.
@pytest.mark.parametrize(
    ("arch", "dtypes", "call", "DH"),
    [
        *((80, "bf16", call, 64) for call in ("window", "cap")),
        *((90, "bf16", call, 64) for call in ("causal-dropout", "gate")),
        (80, "bf16", "gate", 128),
        (90, "bf16-fp32", "causal-dropout", 128),
        (90, "fp16", "cap", 128),
        (90, "fp32", "padding", 64),
        (80, "fp16", "padding", 40),
    ],
    ids=str,
)
def test_no_spills_and_tensor_cores(arch, dtypes, call, DH):
    kernels = readings(__file__, arch, dtypes, call, DH)
    # Own keys and the prefix's each have their dk and dv.
    names = ["attention_dkv", "attention_dkv", "attention_dq", "attention_fwd", "sum_prefix_grads"]
    assert sorted(kernel["name"].removesuffix("_kernel") for kernel in kernels) == names
    for kernel in kernels:
        assert_clean(kernel, arch)
        # IEEE products of fp32: TF32 only where torch's switch asks for it.
        multiplies = kernel["name"] != "sum_prefix_grads_kernel" and dtypes != "fp32"
        assert (kernel["tensor_core"] > 0) == multiplies, kernel
        if kernel["name"] in ("attention_fwd_kernel", "attention_dq_kernel") and multiplies and arch == 90:
            assert kernel["wgmma"] == kernel["tensor_core"], kernel
        if "mask" not in CALLS[call]:
            assert kernel["loads_of_2_bytes"] == 0, kernel


# One query at a time: the four heads of a group share a tile of 16 rows.
def test_decoding():
    for kernel in readings(__file__, 90, "bf16", "causal", 64, 1):
        assert_clean(kernel, 90)


if __name__ == "__main__":
    answer(recorded)

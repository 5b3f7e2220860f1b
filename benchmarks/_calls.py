"""The calls whose launches the benchmark of compiled code reads: every op with every dtype, each tile it can take."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from peft_fast.kernels._launch import Launch, recording
from peft_fast.kernels.bottleneck_adapter import adapter_bwd, adapter_fwd
from peft_fast.kernels.lora_linear import lora_bwd, lora_fwd
from peft_fast.kernels.low_rank import named_tiles
from peft_fast.kernels.prefix_attention import attention_bwd, attention_fwd
from peft_fast.support import MAX_KERNEL_HEAD_SIZE

# Of activation and adapter. "tf32" is fp32 with torch's own switch set.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
}
THRESHOLD = 6554  # p = 0.1


@dataclass(frozen=True)
class Call:
    """A call of an op, forward and backward with every gradient; `name` tells it from others of its op and dtypes."""

    op: str
    dtypes: str
    name: str
    options: dict[str, Any]

    def launches(self, target: GPUTarget) -> list[Launch]:
        """What the call launches on `target`."""
        with _precision(self.dtypes), recording(target) as launches:
            OPS[self.op](*DTYPES[self.dtypes], **self.options)
        return launches


@contextlib.contextmanager
def _precision(dtypes: str) -> Iterator[None]:
    """torch's switch for fp32 products as `dtypes` has it."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if dtypes == "tf32" else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _seed() -> Tensor:
    return _meta(1, dtype=torch.int64)


def _lora_linear(
    dtype, factor_dtype, *, R, M=8192, N=4096, K=4096, plan="split", threshold=THRESHOLD, bias=True
) -> None:
    """A plan that names a tile launches nothing where the chip is not given that tile."""
    x, weight, dy = _meta(M, K, dtype=dtype), _meta(N, K, dtype=dtype), _meta(M, N, dtype=dtype)
    tile_name = plan.partition(" ")[2]
    if tile_name and tile_name not in named_tiles(x, R):
        return
    lora_a, lora_b = _meta(R, K, dtype=factor_dtype), _meta(N, R, dtype=factor_dtype)
    bias = _meta(N, dtype=dtype) if bias else None
    _, s = lora_fwd(x, weight, lora_a, lora_b, bias, 2.0, threshold, _seed(), plan=plan)
    needs = (True, True, True, bias is not None)
    lora_bwd(dy, x, weight, lora_a, lora_b, s, 2.0, threshold, _seed(), needs=needs, plan=plan)


def _bottleneck_adapter(
    dtype, weight_dtype, *, R, norms, M=8192, K=768, threshold=THRESHOLD, activation="gelu"
) -> None:
    """The residual is x; `norms` are the LayerNorms that the adapter has, of "before" and "after"."""
    x, dy = _meta(M, K, dtype=dtype), _meta(M, K, dtype=dtype)

    def weights(*shape: int) -> Tensor:
        return _meta(*shape, dtype=weight_dtype)

    before, after = ((weights(K), weights(K)) if norm in norms else None for norm in ("before", "after"))
    inputs = (x, x, weights(R, K), weights(R), weights(K, R), weights(K), weights(), before, after)
    options = {"activation": activation, "residual_after_norm": False}
    needs = {"x", "down_weight", "down_bias", "up_weight", "up_bias", "scaling"} | {f"norm_{norm}" for norm in norms}
    _, z, *stats = adapter_fwd(*inputs, threshold, _seed(), eps=1e-5, **options)
    adapter_bwd(dy, *inputs, z, *stats, threshold, _seed(), needs=needs, **options)


def _prefix_attention(
    dtype,
    prefix_dtype,
    *,
    DH,
    S=1024,
    group=4,
    p=0.0,
    mask=None,
    gate=False,
    causal=False,
    window=None,
    softcap=None,
    own=True,
) -> None:
    """Tensors lie (Z, S, H, DH) in memory, as projections leave them. Not `own`: gradients of the prefix alone."""
    Z, H_KV, T, P = 8, 2, S if S > 1 else 1024, 32
    H = H_KV * group

    def heads(length: int, count: int) -> Tensor:
        return _meta(Z, length, count, DH, dtype=dtype).transpose(1, 2)

    query, key, value, dy = heads(S, H), heads(T, H_KV), heads(T, H_KV), heads(S, H)
    prefix_key, prefix_value = (_meta(H_KV, P, DH, dtype=prefix_dtype) for _ in range(2))
    masks = {
        "keys": lambda: _meta(Z, 1, 1, T, dtype=torch.bool),
        "bool": lambda: _meta(Z, 1, S, T, dtype=torch.bool),
        "bias": lambda: _meta(1, H, S, T, dtype=dtype),
    }
    attn_mask = masks[mask]() if mask else None
    gates = _meta(H, dtype=prefix_dtype) if gate else None
    inputs = (query, key, value, prefix_key, prefix_value, attn_mask, gates, THRESHOLD if p else 0, _seed())
    options = {"is_causal": causal, "sliding_window": window, "softcap": softcap, "scale": DH**-0.5}
    needs = (
        {"prefix_key", "prefix_value"} | ({"query", "key", "value"} if own else set()) | ({"gate"} if gate else set())
    )
    y, lse = attention_fwd(*inputs, **options)
    attention_bwd(dy, *inputs, y, lse, needs=needs, **options)


OPS = {
    "lora_linear": _lora_linear,
    "bottleneck_adapter": _bottleneck_adapter,
    "prefix_attention": _prefix_attention,
}

# The calls of usual models: encoders under a padding mask, decoders with and without dropout, with a window and with
# packed sequences, and what holds most in registers: a cap, a gate.
_ATTENTION = {
    "padding": {"mask": "keys", "p": 0.1},
    "causal": {"causal": True},
    "causal dropout": {"causal": True, "p": 0.1},
    "window": {"causal": True, "window": 512, "mask": "bool"},
    "cap": {"causal": True, "softcap": 30.0, "mask": "bias"},
    "gate": {"causal": True, "gate": True, "p": 0.1, "mask": "bool"},
}
_NORMS = {"plain": (), "before": ("before",), "after": ("after",), "norms": ("before", "after")}


def calls() -> list[Call]:
    """Every op with every dtype; ranks of one block and of several, each head size that has tiles of its own.

    All with dropout: its kernels for y and ds draw no mask, so both are there.
    """
    found = []

    def add(op: str, dtypes: str, name: str, **options: Any) -> None:
        found.append(Call(op, dtypes, name, options))

    for dtypes in DTYPES:
        for R in (8, 32, 64, 384):
            for plan in ("split", "fused", *(("fused 128x128", "fused 64x128", "fused tma") if R <= 64 else ())):
                add("lora_linear", dtypes, f"R {R}, {plan}", R=R, plan=plan)
        # Where x is small, skinny passes take other tiles.
        add("lora_linear", dtypes, "R 8, few rows", R=8, M=1024)
        # Rows of 8·513 elements, of which Triton sees no multiple of 16.
        for plan in ("split", "fused"):
            add("lora_linear", dtypes, f"R 16, {plan}, rows of 4104", R=16, N=4104, K=4104, plan=plan, bias=False)
        for R, norms in ((8, "plain"), (48, "plain"), (256, "plain"), (64, "norms"), (256, "norms")):
            add("bottleneck_adapter", dtypes, f"R {R}, {norms}", R=R, norms=_NORMS[norms])
        for R in (64, 256):
            add("bottleneck_adapter", dtypes, f"R {R}, few rows", R=R, norms=(), M=1024)
        add("bottleneck_adapter", dtypes, "R 8, plain, rows of 4096", R=8, norms=(), K=4096)
        widest = MAX_KERNEL_HEAD_SIZE[DTYPES[dtypes][0].itemsize]
        for DH in [DH for DH in (64, 128, 256) if widest >= DH]:
            # Where the prefix alone has another type, little differs: it is rounded as it is loaded.
            for name in ("padding", "cap", "gate") if dtypes in ("bf16", "fp32") else ("gate",):
                add("prefix_attention", dtypes, f"DH {DH}, {name}", DH=DH, **_ATTENTION[name])
    for dtypes in ("bf16", "bf16-fp32"):
        for norms in ("before", "after"):
            add("bottleneck_adapter", dtypes, f"R 64, {norms}", R=64, norms=_NORMS[norms])
        add("bottleneck_adapter", dtypes, "R 64, before, few rows", R=64, norms=("before",), M=1024)
    add("bottleneck_adapter", "bf16", "R 64, plain, rows of 776", R=64, norms=(), K=776)
    for DH in (64, 128):
        for name in ("causal", "causal dropout", "window"):
            add("prefix_attention", "bf16", f"DH {DH}, {name}", DH=DH, **_ATTENTION[name])
    for DH in (40, 80):
        add("prefix_attention", "bf16", f"DH {DH}, padding", DH=DH, **_ATTENTION["padding"])
    # Masks whose rows are of 8·odd elements.
    add("prefix_attention", "bf16", "DH 64, cap, 1032 tokens", DH=64, S=1032, **_ATTENTION["cap"])
    # Nothing below the first layer is trained.
    add("prefix_attention", "bf16", "DH 64, first layer", DH=64, causal=True, own=False)
    # One query at a time: the four heads of a group share a tile of 16 rows.
    add("prefix_attention", "bf16", "DH 64, decoding", DH=64, S=1, causal=True)
    return found

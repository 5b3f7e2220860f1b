"""Attention over a prefix, forward and backward: peft's way, flex attention where it trains, and ours.

    python -m benchmarks.bench_prefix_attention             # the table, with ratios and saved bytes
    python -m benchmarks.bench_prefix_attention --check     # the same, and exit 1 where a bar is not met
    pytest benchmarks/bench_prefix_attention.py             # under pytest-benchmark

peft's prefix tuning expands the prefix over the batch and gives it to the model as a cache: the model concatenates, and
takes torch's fused attention with a dense mask where it is causal or padded. The variants of one row take turns, round
by round; medians. Saved bytes are what autograd holds from forward to backward, prefixes not counted.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks._timing import NEVER_SLOWER, Turns, main
from peft_fast.ops import prefix_attention
from peft_fast.testing import saved_bytes

# (Z, H, H_KV, S, P, DH)
SHAPES = [(8, 8, 2, 256, 64, 64), (16, 12, 12, 128, 32, 64), (4, 16, 16, 512, 128, 64)]
ROWS = list(itertools.product(SHAPES, [False, True], [False, True]))  # causal, padded
GROUPED_BAR = 0.8

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def own_mask(Z: int, S: int, causal: bool, padded: bool) -> Tensor | None:
    """The dense mask (Z or 1, 1, S, S) that a model makes without a prefix, True where a query may attend."""
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).tril() if causal else None
    if not padded:
        return mask
    lengths = torch.randint(S // 2, S + 1, (Z, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    keys = (torch.arange(S) < lengths).expand(Z, 1, S, S)
    return keys.contiguous() if mask is None else mask & keys


def peft_way(tensors: Tensors, mask: Tensor | None) -> Tensor:
    """`mask` is over prefix and sequence."""
    query, key, value, *prefix = tensors
    Z, H, groups = query.shape[0], query.shape[1], key.shape[1]
    key, value = (
        torch.cat([p.expand(Z, -1, -1, -1).contiguous(), own], dim=2)
        for p, own in zip(prefix, (key, value), strict=True)
    )
    grouped = groups != H
    if grouped and mask is not None:  # as transformers does, which gives torch groups only where there is no mask
        key, value = (t.repeat_interleave(H // groups, dim=1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped and mask is None)


def flex_way(tensors: Tensors, mask: Tensor | None) -> Callable[[], Tensor]:
    query, key, value, *prefix = tensors
    (Z, H, S, _), T = query.shape, key.shape[2] + prefix[0].shape[1]
    block_mask = None
    if mask is not None:
        full = mask.expand(Z, 1, S, T)
        block_mask = create_block_mask(lambda z, h, i, j: full[z, 0, i, j], Z, None, S, T, device=str(query.device))
    compiled = torch.compile(flex_attention)

    def run() -> Tensor:
        joint = (torch.cat([p.expand(Z, -1, -1, -1), own], dim=2) for p, own in zip(prefix, (key, value), strict=True))
        return compiled(query, *joint, block_mask=block_mask, enable_gqa=key.shape[1] != H)

    return run


def forwards(
    shape: tuple[int, ...], causal: bool, padded: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensors, Tensor, dict[str, Callable]]:
    """Leaves, dy, and each variant's forward."""
    Z, H, H_KV, S, P, DH = shape
    draw = torch.Generator().manual_seed(0)

    def heads(n: int) -> Tensor:
        return torch.randn(Z, S, n, DH, generator=draw).to(device, dtype).transpose(1, 2)

    leaves = [
        heads(H),
        heads(H_KV),
        heads(H_KV),
        *(torch.randn(H_KV, P, DH, generator=draw).to(device, dtype) for _ in "kv"),
    ]
    query, key, value, prefix_key, prefix_value = tensors = tuple(leaf.requires_grad_() for leaf in leaves)
    own = own_mask(Z, S, causal, padded)
    own = own if own is None else own.to(device)
    dense = own if own is None else F.pad(own, (P, 0), value=True)
    flag = causal and not padded
    variants: dict[str, Callable] = {
        "peft": lambda: peft_way(tensors, dense),
        "ours": lambda: prefix_attention(
            query, key, value, prefix_key, prefix_value, attn_mask=None if flag else own, is_causal=flag
        ),
    }
    if device == "cuda":  # on the CPU, compiled flex attention has no backward
        variants["flex compiled"] = flex_way(tensors, dense)
    return tensors, heads(H), variants


def steps(
    shape: tuple[int, ...], causal: bool, padded: bool, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], None]]:
    """One forward and backward of each variant."""
    tensors, dy, variants = forwards(shape, causal, padded, device, dtype)

    def step(forward: Callable) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(forward(), tensors, dy)

        return run

    return {name: step(forward) for name, forward in variants.items()}


def call_bytes(shape: tuple[int, ...], causal: bool, padded: bool) -> dict[str, int]:
    """Bytes that autograd holds from forward to backward; query, key and value counted, prefixes not."""
    tensors, _, variants = forwards(shape, causal, padded)
    return {name: saved_bytes(forward, tensors[3:]) for name, forward in variants.items()}


def missed_bars(row: dict) -> list[str]:
    """The bars that a row misses, in words."""
    Z, H, H_KV, S, P, DH = row["shape"]
    ratio = row["milliseconds"]["ours"] / row["milliseconds"]["peft"]
    bar = GROUPED_BAR if H != H_KV else NEVER_SLOWER
    what = f"(Z,H,H_KV,S,P,DH)={(Z, H, H_KV, S, P, DH)} causal={row['causal']} padded={row['padded']}"
    return [f"{what}: {ratio:.2f}x the time of peft's way, the bar is {bar}x"] if ratio > bar else []


def measure(seconds: float) -> list[dict]:
    rows = []
    names = ["peft", "ours"]
    header = ["Z,H,H_KV,S,P,DH", "causal", "padded", *names, "ratio", "bytes ratio"]
    print(" | ".join(header) + "\n" + " | ".join("---" for _ in header))
    for shape, causal, padded in ROWS:
        saved = call_bytes(shape, causal, padded)
        ms = Turns(steps(shape, causal, padded)).measure(seconds)
        rows.append({"shape": shape, "causal": causal, "padded": padded, "milliseconds": ms, "saved_bytes": saved})
        cells = [",".join(map(str, shape)), causal, padded, *(f"{ms[name]:.1f}" for name in names)]
        cells += [f"{ms['ours'] / ms['peft']:.2f}", f"{saved['ours'] / saved['peft']:.2f}"]
        print(" | ".join(map(str, cells)), flush=True)
    print("flex attention is left out: compiled for the CPU it has no backward")
    return rows


@pytest.mark.parametrize(("shape", "causal", "padded"), ROWS, ids=lambda value: str(value).replace(", ", "x"))
def test_prefix_attention(benchmark, shape, causal, padded):
    variants = steps(shape, causal, padded)
    ours = variants.pop("ours")
    others = Turns(variants)
    benchmark.pedantic(ours, setup=others.round, rounds=15, warmup_rounds=2)
    benchmark.extra_info["milliseconds"] = others.milliseconds()


if __name__ == "__main__":
    main(__doc__, measure, missed_bars)

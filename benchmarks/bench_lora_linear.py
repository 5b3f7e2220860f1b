"""One LoRA layer, forward and backward: frozen floor, stock peft, patched, and both of these compiled.

    python -m benchmarks.bench_lora_linear             # the table, with ratios
    python -m benchmarks.bench_lora_linear --check     # the same, and exit 1 where a bar is not met
    pytest benchmarks/bench_lora_linear.py             # under pytest-benchmark, the other variants in its extra_info

The variants of one row take turns, round by round, so that a drift of the machine's speed meets them all; medians.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fast
from benchmarks._timing import NEVER_SLOWER, Turns, main

SHAPES = [  # (M, K, N, R)
    (2048, 768, 768, 8),
    (2048, 768, 3072, 8),
    (2048, 3072, 768, 8),
    (2048, 384, 384, 8),
    (512, 2048, 2048, 16),
    (64, 256, 256, 8),
]
DROPOUTS = [0.0, 0.1]
VARIANTS = ["floor", "stock", "patched", "stock compiled", "patched compiled"]

DROPOUT_BAR, DROPOUT_BAR_FROM = 0.80, 384


class _OneLinear(nn.Module):
    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N)


def steps(
    M: int,
    K: int,
    N: int,
    R: int,
    dropout_p: float,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    fp32_factors: bool = True,
) -> dict[str, Callable[[], None]]:
    """One training step of the layer, forward and backward, for each variant; input gradient too."""
    torch.manual_seed(0)
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout_p, target_modules=["linear"])
    base = _OneLinear(K, N).to(device, dtype)
    stock = get_peft_model(base, config, autocast_adapter_dtype=fp32_factors).train().base_model.model.linear
    patched = copy.deepcopy(stock)
    peft_fast.patch(patched)
    torch._dynamo.reset()
    layers = {
        "floor": stock.base_layer,
        "stock": stock,
        "patched": patched,
        "stock compiled": torch.compile(copy.deepcopy(stock), fullgraph=True),
        "patched compiled": torch.compile(copy.deepcopy(patched), fullgraph=True),
    }
    x, dy = torch.randn(M, K, device=device, dtype=dtype), torch.randn(M, N, device=device, dtype=dtype)
    x.requires_grad_()

    def step(layer: nn.Module) -> Callable[[], None]:
        parameters = [p for p in layer.parameters() if p.requires_grad]

        def run() -> None:
            layer(x).backward(dy)
            x.grad = None
            for parameter in parameters:
                parameter.grad = None

        return run

    return {name: step(layer) for name, layer in layers.items()}


def missed_bars(row: dict) -> list[str]:
    """The bars that a row misses, in words."""
    ms, shape = row["milliseconds"], (row["M"], row["K"], row["N"], row["R"])
    bars = [("patched", "stock", NEVER_SLOWER), ("patched compiled", "stock compiled", NEVER_SLOWER)]
    if row["dropout"] and min(row["K"], row["N"]) >= DROPOUT_BAR_FROM:
        bars.append(("patched", "stock", DROPOUT_BAR))
    return [
        f"{shape} dropout {row['dropout']}: {one} is {ms[one] / ms[other]:.2f}x {other}, the bar is {bar:.2f}x"
        for one, other, bar in bars
        if ms[one] > bar * ms[other]
    ]


def measure(seconds: float) -> list[dict]:
    rows = []
    header = ["M", "K", "N", "R", "dropout", *VARIANTS, "ratio", "compiled ratio", "tax"]
    print(" | ".join(header) + "\n" + " | ".join("---" for _ in header))
    for M, K, N, R in SHAPES:
        for dropout_p in DROPOUTS:
            ms = Turns(steps(M, K, N, R, dropout_p)).measure(seconds)
            rows.append({"M": M, "K": K, "N": N, "R": R, "dropout": dropout_p, "milliseconds": ms})
            cells = [M, K, N, R, dropout_p, *(f"{ms[name]:.2f}" for name in VARIANTS)]
            cells.append(f"{ms['patched'] / ms['stock']:.2f}")
            cells.append(f"{ms['patched compiled'] / ms['stock compiled']:.2f}")
            cells.append(f"{ms['patched'] / ms['floor'] - 1:.0%}")
            print(" | ".join(map(str, cells)), flush=True)
    return rows


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_lora_linear(benchmark, shape, dropout_p):
    variants = steps(*shape, dropout_p)
    patched = variants.pop("patched")
    others = Turns(variants)
    benchmark.pedantic(patched, setup=others.round, rounds=15, warmup_rounds=2)
    benchmark.extra_info["milliseconds"] = others.milliseconds()


if __name__ == "__main__":
    main(__doc__, measure, missed_bars)

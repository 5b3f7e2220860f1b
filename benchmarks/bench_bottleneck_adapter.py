"""One bottleneck adapter, forward and backward: the usual modules and ours, each also compiled.

    python -m benchmarks.bench_bottleneck_adapter             # the table, with ratios and saved bytes
    python -m benchmarks.bench_bottleneck_adapter --check     # the same, and exit 1 where a bar is not met
    pytest benchmarks/bench_bottleneck_adapter.py             # under pytest-benchmark

The variants of one row take turns, round by round; medians. Saved bytes are what autograd holds from forward to
backward, the input counted and the parameters not.
"""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks._timing import NEVER_SLOWER, Turns, main
from peft_fast.layers import BottleneckAdapter
from peft_fast.testing import saved_bytes

SHAPES = [(2048, 768, 48), (2048, 768, 256), (2048, 384, 24), (512, 2048, 64)]  # (M, K, R)
DROPOUTS = [0.0, 0.1]
NORMS = ["none", "before", "after"]  # where the adapter has a LayerNorm of its own
VARIANTS = ["usual", "ours", "usual compiled", "ours compiled"]
ROWS = list(itertools.product(SHAPES, DROPOUTS, NORMS))


class UsualAdapter(nn.Module):
    """The adapter as it is usually written."""

    def __init__(self, K: int, R: int, dropout_p: float, norm: str) -> None:
        super().__init__()
        self.norm_before = nn.LayerNorm(K) if norm == "before" else nn.Identity()
        self.down = nn.Linear(K, R)
        self.activation = nn.ReLU()
        self.up = nn.Linear(R, K)
        self.dropout = nn.Dropout(dropout_p) if dropout_p else nn.Identity()
        self.norm_after = nn.LayerNorm(K) if norm == "after" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_after(x + self.dropout(self.up(self.activation(self.down(self.norm_before(x))))))


def steps(
    M: int,
    K: int,
    R: int,
    dropout_p: float,
    norm: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], None]]:
    """One training step of the adapter, forward and backward, for each variant; input gradient too."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    usual = UsualAdapter(K, R, dropout_p, norm).train()
    ours = BottleneckAdapter(
        K, R, dropout=dropout_p, norm_before=norm == "before", norm_after=norm == "after", init="houlsby"
    ).train()
    usual, ours = usual.to(device, dtype), ours.to(device, dtype)
    layers = {
        "usual": usual,
        "ours": ours,
        "usual compiled": torch.compile(copy.deepcopy(usual), fullgraph=True),
        "ours compiled": torch.compile(copy.deepcopy(ours), fullgraph=True),
    }
    x, dy = (torch.randn(M, K, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()

    def step(layer: nn.Module) -> Callable[[], None]:
        parameters = list(layer.parameters())

        def run() -> None:
            layer(x).backward(dy)
            x.grad = None
            for parameter in parameters:
                parameter.grad = None

        run.layer = layer  # type: ignore[attr-defined]
        return run

    return {name: step(layer) for name, layer in layers.items()}


def layer_bytes(layer: nn.Module, M: int, K: int) -> int:
    """Bytes that autograd holds from forward to backward; x counted, parameters not."""
    x = torch.randn(M, K, requires_grad=True)
    return saved_bytes(lambda: layer(x), layer.parameters())


def bytes_bar(dropout_p: float, norm: str) -> float:
    """The largest ratio of saved bytes to the usual modules' that is allowed."""
    if dropout_p and norm != "none":
        return 0.42
    return 0.60 if dropout_p or norm != "none" else 1.00


def missed_bars(row: dict) -> list[str]:
    """The bars that a row misses, in words."""
    ms, what = row["milliseconds"], {name: row[name] for name in ("M", "K", "R", "dropout", "norm")}
    missed = [
        f"{what}: {one} takes {ms[one] / ms[other]:.2f}x the time of {other}"
        for one, other in (("ours", "usual"), ("ours compiled", "usual compiled"))
        if ms[one] > NEVER_SLOWER * ms[other]
    ]
    ratio = row["saved_bytes"]["ours"] / row["saved_bytes"]["usual"]
    if ratio > bytes_bar(row["dropout"], row["norm"]):
        missed.append(f"{what}: saves {ratio:.2f}x the bytes, the bar is {bytes_bar(row['dropout'], row['norm'])}x")
    return missed


def measure(seconds: float) -> list[dict]:
    rows = []
    header = ["M", "K", "R", "dropout", "norm", *VARIANTS, "ratio", "compiled ratio", "bytes ratio"]
    print(" | ".join(header) + "\n" + " | ".join("---" for _ in header))
    for (M, K, R), dropout_p, norm in ROWS:
        variants = steps(M, K, R, dropout_p, norm)
        saved = {name: layer_bytes(variants[name].layer, M, K) for name in ("usual", "ours")}  # type: ignore[attr-defined]
        ms = Turns(variants).measure(seconds)
        rows.append(
            {"M": M, "K": K, "R": R, "dropout": dropout_p, "norm": norm, "milliseconds": ms, "saved_bytes": saved}
        )
        cells = [M, K, R, dropout_p, norm, *(f"{ms[name]:.2f}" for name in VARIANTS)]
        cells.append(f"{ms['ours'] / ms['usual']:.2f}")
        cells.append(f"{ms['ours compiled'] / ms['usual compiled']:.2f}")
        cells.append(f"{saved['ours'] / saved['usual']:.2f}")
        print(" | ".join(map(str, cells)), flush=True)
    return rows


@pytest.mark.parametrize(("shape", "dropout_p", "norm"), ROWS, ids=lambda value: str(value).replace(", ", "x"))
def test_bottleneck_adapter(benchmark, shape, dropout_p, norm):
    variants = steps(*shape, dropout_p, norm)
    ours = variants.pop("ours")
    others = Turns(variants)
    benchmark.pedantic(ours, setup=others.round, rounds=15, warmup_rounds=2)
    benchmark.extra_info["milliseconds"] = others.milliseconds()


if __name__ == "__main__":
    main(__doc__, measure, missed_bars)

"""What a training step launches, moves and keeps: stock, compiled stock, the frozen floor and ours, without a GPU.

    python -m benchmarks.traffic                      # all tables
    python -m benchmarks.traffic --json PATH          # and the rows, with versions and date
    python -m benchmarks.traffic --quick              # few rows

Stock is counted call by call: every aten call that is no view is a launch that reads its arguments and writes its
results (one that runs several kernels, as attention's backward does, still counts once). Compiled stock is what
Inductor's scheduler makes of it. Our kernels are watched in Triton's interpreter, address by address, at shapes it can
run (the first table); a closed form that equals those counts exactly takes them to the shapes of real models, with the
tiles and splits that the launchers choose for a chip. *moved* is the unique traffic, bytes at different addresses of
each launch; *asked* is what all programs ask for, caches answering for the difference. No figure here is a time.
"""

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import torch
from triton.backends.compiler import GPUTarget

from benchmarks import _models, _variants, formulas
from benchmarks._counting import Launch, count

CHIPS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# What the interpreter runs: tails in every dimension, each pair of types, dropout on and off, one block of the rank
# and several, one read of dy and two.
INTERPRETED: list[tuple[str, Callable, dict[str, Any]]] = [
    ("LoRA layer", _variants.lora, sizes | options)
    for sizes, options in [
        ({"M": 136, "K": 160, "N": 264, "R": 8}, {"factors": FP32, "dropout": 0.1, "bias": True}),
        ({"M": 67, "K": 131, "N": 77, "R": 100}, {"factors": BF16}),
        ({"M": 300, "K": 96, "N": 520, "R": 16}, {"dtype": FP16, "factors": FP32, "dropout": 0.5}),
        ({"M": 130, "K": 257, "N": 129, "R": 3}, {"dtype": FP32, "factors": FP32, "dropout": 0.1, "bias": True}),
        ({"M": 128, "K": 256, "N": 128, "R": 16}, {"factors": BF16, "bias": True}),
        ({"M": 65, "K": 384, "N": 200, "R": 64}, {"factors": FP32, "dropout": 0.1}),
    ]
]
INTERPRETED += [
    ("bottleneck adapter", _variants.adapter, sizes | options)
    for sizes, options in [
        ({"M": 70, "K": 200, "R": 24}, {"parameters": FP32, "dropout": 0.1}),
        ({"M": 40, "K": 136, "R": 100}, {"parameters": BF16}),
        ({"M": 33, "K": 264, "R": 64}, {"dtype": FP16, "parameters": FP32, "dropout": 0.1}),
        ({"M": 40, "K": 96, "R": 8}, {"dtype": FP32, "parameters": FP32}),
        ({"M": 64, "K": 128, "R": 16}, {"dtype": FP16, "parameters": FP16, "dropout": 0.5}),
        ({"M": 97, "K": 77, "R": 3}, {"parameters": FP32}),
    ]
]
INTERPRETED += [
    ("prefix attention", _variants.prefix, dict(zip(("Z", "H", "H_KV", "S", "P", "DH"), sizes, strict=True)) | options)
    for sizes, options in [
        ((1, 4, 2, 70, 20, 64), {"parameters": FP32, "causal": True, "dropout": 0.1}),
        ((2, 2, 2, 66, 70, 48), {"dtype": FP16, "parameters": FP16}),
        ((1, 2, 1, 100, 33, 64), {"dtype": FP32, "parameters": FP32, "causal": True}),
        ((2, 4, 1, 17, 5, 32), {"dropout": 0.1}),
        ((1, 1, 1, 130, 1, 16), {"causal": True, "dropout": 0.5}),
        ((3, 2, 2, 64, 32, 32), {}),
    ]
]

# (what, its variants, their arguments); peft's default is fp32 factors over a bf16 model.
LAYERS: list[tuple[str, Callable, dict[str, Any]]] = [
    ("LoRA layer", _variants.lora, {"M": M, "K": K, "N": N, "R": R, "factors": factors, "dropout": dropout})
    for M, K, N, R in [(8192, 4096, 4096, 16), (8192, 4096, 14336, 16), (8192, 1024, 1024, 16), (8192, 4096, 4096, 64)]
    for factors in (BF16, FP32)
    for dropout in (0.0, 0.1)
]
LAYERS += [
    ("bottleneck adapter", _variants.adapter, {"M": M, "K": K, "R": R, "dropout": dropout})
    for M, K, R in [(8192, 1024, 16), (8192, 1024, 64), (8192, 4096, 16), (8192, 4096, 64), (32768, 1024, 64)]
    for dropout in (0.0, 0.1)
]
_SHAPES = [(16, 16, 16, 512, 32, 64), (4, 32, 8, 2048, 32, 128)]  # the heads of BERT-large and of Llama-3-8B
LAYERS += [
    ("prefix attention", _variants.prefix, dict(zip(("Z", "H", "H_KV", "S", "P", "DH"), sizes, strict=True)) | options)
    for sizes in _SHAPES
    for options in ({}, {"causal": True})
]
STOCK = ("stock", "usual", "peft's way")


def totals(launches: Iterable[Launch]) -> dict[str, int]:
    launches = list(launches)
    sums = {name: sum(getattr(launch, name) for launch in launches) for name in ("moved", "asked", "flops")}
    return {"launches": len(launches), **sums}


def describe(arguments: dict[str, Any]) -> str:
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    return " ".join(f"{name}={short.get(value, value)}" for name, value in arguments.items())


def expected_terms(kind: str, arguments: dict[str, Any], plan: str, records: list[Any]) -> dict[str, int]:
    """The terms of the closed form of a whole plan; see `formulas`."""
    options = dict(arguments)
    e = options.pop("dtype", BF16).itemsize
    f = options.pop(
        "factors" if kind == "LoRA layer" else "parameters", FP32 if kind == "LoRA layer" else BF16
    ).itemsize
    options["dropout"] = bool(options.get("dropout"))
    options.pop("causal", None)
    if kind == "LoRA layer":
        options["bias"] = options.get("bias", False)
        return formulas.lora_terms(plan, **options, e=e, f=f, records=records)
    terms = formulas.adapter_terms if kind == "bottleneck adapter" else formulas.prefix_terms
    return terms(**options, e=e, f=f, records=records)


def interpreted(kind: str, make: Callable, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each plan of ours: counts of the interpreted kernels, beside the closed forms'."""
    rows = []
    for name, variant in make(**arguments, device="cpu").items():
        if variant.plan is None:
            continue
        records: list[Any] = []
        launches = count(variant.step, plan=variant.plan, records=records)
        kernels = [launch for launch in launches if not launch.name.startswith("aten")]
        forms = [formulas.of_launch(record) for record in records]
        terms = expected_terms(kind, arguments, variant.plan, records)
        rows.append(
            {"kind": kind, "shape": describe(arguments), "variant": name, "counted_by": "interpreter"}
            | totals(launches)
            | {"terms": terms, "launches_equal": kernels == forms, "sum_of_terms": sum(terms.values())}
        )
    return rows


def layer(kind: str, make: Callable, arguments: dict[str, Any], chip: str) -> list[dict[str, Any]]:
    """A row for each variant of a layer, with its ratio to stock."""
    rows = []
    for name, variant in make(**arguments).items():
        row = {"kind": kind, "shape": describe(arguments), "chip": chip, "variant": name}
        row["counted_by"] = variant.counted_by
        row |= totals(variant.launches(CHIPS[chip])) | {"saved": variant.saved(CHIPS[chip])}
        rows.append(row)
    return with_ratio(rows)


def with_ratio(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stock = next(row["moved"] for row in rows if row["variant"] in STOCK)
    return [row | {"moved_over_stock": row["moved"] / stock} for row in rows]


def whole_model(name: str, method: str, chip: str, **options: Any) -> list[dict[str, Any]]:
    """A row for each variant of a model.

    All layers are alike, so that counts c of one layer and of two give those of L: c(1) + (L - 1) (c(2) - c(1)).
    """
    one, two = (_models.model(name, method, layers, **options) for layers in (1, 2))
    rows = []
    for variant in one:
        pair = [
            totals(net[variant].launches(CHIPS[chip])) | {"saved": net[variant].saved(CHIPS[chip])}
            for net in (one, two)
        ]
        shape = describe({"tokens": " x ".join(map(str, _models.MODELS[name])), **options})
        row = {"kind": f"{name}, {method}", "shape": shape, "chip": chip, "variant": variant}
        row["counted_by"] = one[variant].counted_by
        rows.append(
            row | {key: pair[0][key] + (_models.LAYERS[name] - 1) * (pair[1][key] - pair[0][key]) for key in pair[0]}
        )
    return with_ratio(rows)


def model_rows(chip: str, quick: bool = False) -> list[dict[str, Any]]:
    rows = []
    for name in list(_models.MODELS)[: 1 if quick else None]:
        for method in _models.METHODS:
            for options in [{"fp32_factors": True}, {"fp32_factors": False}] if method == "lora" else [{}]:
                rows += whole_model(name, method, chip, **options)
    return rows


def design_rows(M: int, K: int, N: int, R: int, chip: str) -> list[dict[str, Any]]:
    """Elements that a LoRA layer moves, all in bf16, as the design says and as counted."""
    designed = {
        "lower bound": 3 * M * K + 2 * M * N + 2 * N * K,
        "fused": 4 * M * K + 3 * M * N + 2 * N * K,
        "split": 6 * M * K + 5 * M * N + 2 * N * K,
        "stock": 8 * M * K + 12 * M * N + 2 * N * K,
    }
    rows = []
    variants = _variants.lora(M, K, N, R, factors=BF16)
    for name, elements in designed.items():
        row: dict[str, Any] = {"variant": name, "chip": chip, "designed": elements}
        if name in variants:
            variant, records = variants[name], []
            launches = variant.launches(CHIPS[chip])
            row["counted"] = totals(launches)["moved"] / 2
            row["ratio"] = row["counted"] / elements
            if variant.plan is not None:
                formulas.count_for(CHIPS[chip], variant.step, plan=variant.plan, records=records)
                arguments = {"M": M, "K": K, "N": N, "R": R, "factors": BF16}
                parts = expected_terms("LoRA layer", arguments, variant.plan, records)["partial sums"] / 2
                row |= {"partial sums": parts, "partial share": parts / elements}
                row["ratio apart from partial sums"] = (row["counted"] - parts) / elements
        rows.append(row)
    return rows


def table(title: str, rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> None:
    """Print rows under a title, columns aligned."""
    cells = [list(columns), *([str(column(row)) for column in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def megabytes(row: dict[str, Any], name: str) -> str:
    return "-" if row.get(name) is None else f"{row[name] / 1e6:.1f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "what": lambda row: row["kind"],
    "shape": lambda row: row["shape"],
    "chip": lambda row: row["chip"],
    "variant": lambda row: row["variant"],
    "launches": lambda row: row["launches"],
    "MB moved": lambda row: megabytes(row, "moved"),
    "of stock": lambda row: f"{row['moved_over_stock']:.2f}",
    "MB asked": lambda row: "-" if row["counted_by"] != "closed form" else megabytes(row, "asked"),
    "GFLOP": lambda row: f"{row['flops'] / 1e9:.0f}",
    "MB saved": lambda row: megabytes(row, "saved"),
    "counted by": lambda row: row["counted_by"],
}


def write(path: Path, rows: Any) -> None:
    packages = ("torch", "triton", "transformers", "peft")
    versions = {name: importlib.metadata.version(name) for name in packages}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), **versions, "rows": rows}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows, with versions and date, to this file")
    parser.add_argument("--quick", action="store_true", help="few rows")
    options = parser.parse_args(arguments)
    chips = ["sm_90"] if options.quick else list(CHIPS)

    cases = INTERPRETED[3:16:6] if options.quick else INTERPRETED
    measured = [row for case in cases for row in interpreted(*case)]
    table(
        "Interpreted kernels, forward and backward: counts, and whether the closed forms equal them exactly",
        measured,
        {name: COLUMNS[name] for name in ("what", "shape", "variant", "launches")}
        | {
            "bytes moved": lambda row: row["moved"],
            "bytes asked": lambda row: row["asked"],
            "each launch": lambda row: "equal" if row["launches_equal"] else "DIFFERENT",
            "the plan": lambda row: "equal" if row["sum_of_terms"] == row["moved"] else "DIFFERENT",
        },
    )
    designed = [row for chip in chips for row in design_rows(8192, 4096, 4096, 16, chip)]
    table(
        "A LoRA layer as designed and as counted, in millions of elements; M=8192 K=N=4096 R=16 in bf16, no dropout",
        designed,
        {"variant": lambda row: row["variant"], "chip": lambda row: row["chip"]}
        | {
            name: lambda row, name=name: f"{row[name] / 1e6:.2f}" if name in row else "-"
            for name in ("designed", "counted")
        }
        | {"ratio": lambda row: f"{row['ratio']:.3f}" if "ratio" in row else "-"}
        | {"partial sums": lambda row: f"{row['partial share']:.1%}" if "partial share" in row else "-"}
        | {
            "apart from them": lambda row: (
                f"{row['ratio apart from partial sums']:.3f}" if "partial share" in row else "-"
            )
        },
    )
    layers = [
        row for case in (LAYERS[1::11] if options.quick else LAYERS) for chip in chips for row in layer(*case, chip)
    ]
    table("Layers, forward and backward", layers, COLUMNS)
    models = [row for chip in chips[-1:] for row in model_rows(chip, options.quick)]
    table("Whole models, forward and backward from the embeddings to the last hidden state, in bf16", models, COLUMNS)
    if options.json:
        write(options.json, {"interpreted": measured, "designed": designed, "layers": layers, "models": models})


if __name__ == "__main__":
    main()

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
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from benchmarks import _models, _variants, formulas
from benchmarks._bars import bars
from benchmarks._cases import BF16, CHIPS, INTERPRETED, LAYERS, STOCK, describe, expected_terms
from benchmarks._counting import count, totals
from benchmarks._tables import table, write


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
    held = bars(chips, options.quick)
    table(
        "Bars",
        held,
        {name: COLUMNS[name] for name in ("shape", "chip", "variant")}
        | {
            "bar": lambda row: row["bar"],
            "figure": lambda row: f"{row['figure']:.3f}".rstrip("0").rstrip("."),
            "at most": lambda row: row["limit"],
            "": lambda row: "met" if row["met"] else "MISSED",
        },
    )
    if options.json:
        rows = {"interpreted": measured, "designed": designed, "layers": layers, "models": models, "bars": held}
        write(options.json, rows)


if __name__ == "__main__":
    main()

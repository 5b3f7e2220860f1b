"""The bars that traffic is held to, each with its figure, met or missed."""

from typing import Any

from benchmarks import _variants
from benchmarks._cases import BF16, CHIPS, FP32, describe, expected_terms
from benchmarks._counting import totals
from benchmarks.formulas import count_for

M = 8192
WIDE = {"fused": (4, 3, 2), "split": (6, 5, 2)}  # how often x-, y- and weight-sized operands are moved
LAUNCHES = {"fused": 8, "split": 11}
LORA = [
    {"M": M, "K": 4096, "N": 4096, "R": R, "factors": factors, "dropout": dropout}
    for R in (16, 64)
    for factors in (BF16, FP32)
    for dropout in (0.0, 0.1)
]
ADAPTERS = [{"M": M, "K": K, "R": R, "dropout": p} for K in (1024, 4096) for R in (16, 64) for p in (0.0, 0.1)]
PREFIXES = [
    {"Z": 16, "H": 16, "H_KV": 16, "S": 512, "P": 32, "DH": 64},
    {"Z": 4, "H": 32, "H_KV": 8, "S": 2048, "P": 32, "DH": 128, "causal": True},
]
_COPIES = ("aten.clone", "aten.cat", "aten.repeat", "aten.copy_", "aten._to_copy", "aten.expand_copy")


def _bar(case: dict[str, Any], chip: str, plan: str, name: str, figure: float, limit: float) -> dict[str, Any]:
    what = {"shape": describe(case), "chip": chip, "variant": plan, "bar": name}
    return what | {"figure": figure, "limit": limit, "met": figure <= limit}


def lora(case: dict[str, Any], chip: str, plan: str) -> list[dict[str, Any]]:
    variant, records = _variants.lora(**case)[plan], []
    launches = count_for(CHIPS[chip], variant.step, plan=plan, records=records)
    terms = expected_terms("LoRA layer", case, plan, records)
    (of_x, of_y, of_weight), K, N = WIDE[plan], case["K"], case["N"]
    ideal = 2 * (of_x * M * K + of_y * M * N + of_weight * N * K)
    moved, partial = totals(launches)["moved"], terms["partial sums"]
    skinny = totals(launch for launch in launches if launch.name in ("_shrink_kernel", "_factor_grad_kernel"))
    figures = [
        ("moved apart from partial sums / designed", (moved - partial) / ideal, 1.05),
        ("partial sums / designed", partial / ideal, 0.08),
        ("skinny passes, asked / moved", skinny["asked"] / skinny["moved"], 1.1),
        (
            "launches apart from the draw of a seed",
            sum(launch.name != "aten.randint" for launch in launches),
            LAUNCHES[plan],
        ),
    ]
    return [_bar(case, chip, plan, *figure) for figure in figures]


def adapter(case: dict[str, Any], chip: str) -> list[dict[str, Any]]:
    variants = _variants.adapter(**case)
    usual, ours = (totals(variants[name].launches(CHIPS[chip])) for name in ("usual", "ours"))
    figures = [("launches", ours["launches"], 8), ("moved / the usual modules'", ours["moved"] / usual["moved"], 0.45)]
    return [_bar(case, chip, "ours", *figure) for figure in figures]


def prefix(case: dict[str, Any], chip: str) -> list[dict[str, Any]]:
    launches = _variants.prefix(**case)["ours"].launches(CHIPS[chip])
    copied = sum(launch.written for launch in launches if launch.name in _COPIES)
    return [_bar(case, chip, "ours", "bytes of copies of keys and values", copied, 0)]


def bars(chips: list[str], quick: bool = False) -> list[dict[str, Any]]:
    step = 3 if quick else 1
    return [
        row
        for chip in chips
        for group in (
            *(lora(case, chip, plan) for case in LORA[::step] for plan in WIDE),
            *(adapter(case, chip) for case in ADAPTERS[::step]),
            *(prefix(case, chip) for case in PREFIXES),
        )
        for row in group
    ]

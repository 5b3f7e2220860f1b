"""What the tables of traffic are made of: chips, cases, and the terms of a case's closed form."""

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from benchmarks import _variants, formulas

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

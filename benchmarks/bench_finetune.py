"""Whole training steps of real models on the CPU: forward, backward and AdamW.

    python -m benchmarks.bench_finetune               # the table, with ratios
    python -m benchmarks.bench_finetune --check       # the same, and exit 1 where a bar is not met
    pytest benchmarks/bench_finetune.py               # the encoder's LoRA steps, under pytest-benchmark

The floor is the frozen model as it is, forward and backward with a gradient to its embeddings. "full" is
full fine-tuning. The variants of one row take turns, round by round; medians. Each row has a process of its own, which
gives its memory back. `make bench-assets` fetches the models.
"""

import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm

import peft_fast
from benchmarks import _real_models
from benchmarks._timing import NEVER_SLOWER, Turns, ignore_known_warnings, main
from peft_fast.testing import saved_bytes

MODELS = {
    "encoder": lambda: _real_models.encoder(dropout=True),
    "encoder without dropout": lambda: _real_models.encoder(dropout=False),
    "causal LM": _real_models.causal_lm,
}
SHAPES = {"encoder": (32, 48), "encoder without dropout": (32, 48), "causal LM": (2, 128)}  # texts, tokens
TASKS = {"encoder": "SEQ_CLS", "encoder without dropout": "SEQ_CLS", "causal LM": "CAUSAL_LM"}
QUERY_VALUE = {"encoder": ["query", "value"], "causal LM": ["q_proj", "v_proj"]}


@dataclass
class Method:
    """A method to train with: its configuration for a model, and whether stock peft has it."""

    config: Callable[[str], PeftConfig]
    stock: bool = True
    compiled: tuple[str, ...] = ()
    models: tuple[str, ...] = field(default=("encoder", "causal LM"))


def _lora(targets: str, dropout_p: float) -> Callable[[str], PeftConfig]:
    def config(model: str) -> PeftConfig:
        modules = QUERY_VALUE[model] if targets == "query, value" else "all-linear"
        return LoraConfig(
            task_type=TASKS[model], r=8, lora_alpha=16, lora_dropout=dropout_p, target_modules=modules, bias="none"
        )

    return config


METHODS = {
    "LoRA, query and value": Method(_lora("query, value", 0.0), compiled=("encoder",)),
    "LoRA, query and value, dropout 0.1": Method(_lora("query, value", 0.1), compiled=("encoder",)),
    "LoRA, all linear": Method(_lora("all", 0.0), compiled=("encoder",)),
    # The causal language model is compiled in this row alone: beside other work that took 24 minutes, and 8 GB.
    "LoRA, all linear, dropout 0.1": Method(_lora("all", 0.1), compiled=("encoder", "causal LM"), models=tuple(MODELS)),
    "Pfeiffer adapter, 48": Method(
        lambda model: peft_fast.BottleneckConfig(task_type=TASKS[model], style="pfeiffer", bottleneck_size=48),
        stock=False,
        compiled=("encoder",),
    ),
    "Houlsby adapter, 48": Method(
        lambda model: peft_fast.BottleneckConfig(task_type=TASKS[model], style="houlsby", bottleneck_size=48),
        stock=False,
    ),
    "prefix of 16, PEFT's": Method(lambda model: PrefixTuningConfig(task_type=TASKS[model], num_virtual_tokens=16)),
    "prefix of 16": Method(
        lambda model: peft_fast.PrefixConfig(task_type=TASKS[model], num_virtual_tokens=16), stock=False
    ),
}

STEP_BAR, BYTES_BARS = 0.62, {"encoder": 0.72, "encoder without dropout": 0.62}
_BARRED = "LoRA, all linear, dropout 0.1"


def batch_of(model: str) -> dict[str, torch.Tensor]:
    texts, tokens = SHAPES[model]
    ids = torch.randint(1000, 30000, (texts, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids if model == "causal LM" else torch.arange(texts) % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def variants_of(model: str, method: str, compiled: bool) -> dict[str, nn.Module]:
    """Models in training mode. Compiled ones are new copies: compiling counts graphs by module."""
    torch.manual_seed(0)
    base = MODELS[model]()
    floor, full = copy.deepcopy(base).requires_grad_(False), copy.deepcopy(base)
    floor.enable_input_require_grads()
    tuned = get_peft_model(base, METHODS[method].config(model))
    variants = {"floor": floor, "full": full}
    if METHODS[method].stock:
        variants |= {"stock": tuned, "patched": copy.deepcopy(tuned)}
        peft_fast.patch(variants["patched"])
    else:
        peft_fast.patch(tuned)
        variants["ours"] = tuned
    if compiled:
        torch._dynamo.reset()
        for name in [name for name in variants if name not in ("floor", "full")]:
            variants[f"{name} compiled"] = torch.compile(copy.deepcopy(variants[name]))
    return {name: module.train() for name, module in variants.items()}


def step_of(module: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None

    def run() -> None:
        module(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def row_of(model: str, method: str, seconds: float) -> dict:
    batch = batch_of(model)
    variants = variants_of(model, method, model in METHODS[method].compiled)
    saved = {
        name: saved_bytes(lambda module=module: module(**batch).loss, (*module.parameters(), *module.buffers()))
        for name, module in variants.items()
        if "compiled" not in name
    }
    ms = Turns({name: step_of(module, batch) for name, module in variants.items()}).measure(seconds)
    return {"model": model, "method": method, "milliseconds": ms, "saved_bytes": saved}


def missed_bars(row: dict) -> list[str]:
    """The bars that a row misses, in words."""
    ms, saved, what = row["milliseconds"], row["saved_bytes"], f"{row['model']}, {row['method']}"
    if "missing" in row:
        return [f"{what}: {row['missing']}"]
    bars = [("patched", "stock", NEVER_SLOWER), ("patched compiled", "stock compiled", NEVER_SLOWER)]
    if row["method"] == _BARRED and row["model"] == "encoder":
        bars += [("patched", "stock", STEP_BAR), ("patched", "full", 1.0)]
    missed = [
        f"{what}: a step of {one} is {ms[one] / ms[other]:.2f}x {other}, the bar is {bar:.2f}x"
        for one, other, bar in bars
        if one in ms and other in ms and ms[one] > bar * ms[other]
    ]
    if row["method"] == _BARRED and row["model"] in BYTES_BARS:
        ratio, bar = saved["patched"] / saved["stock"], BYTES_BARS[row["model"]]
        if ratio > bar:
            missed.append(f"{what}: patched saves {ratio:.2f}x stock's bytes, the bar is {bar:.2f}x")
    return missed


def measure(seconds: float) -> list[dict]:
    columns = ["floor", "full", "stock", "patched", "ours", "stock compiled", "patched compiled", "ours compiled"]
    print(" | ".join(["model", "method", *columns, "ratio", "bytes ratio"]))
    print(" | ".join("---" for _ in range(len(columns) + 4)))
    rows = []
    pairs = [(model, method) for model in MODELS for method in METHODS if model in METHODS[method].models]
    for model, method in tqdm(pairs, desc="training steps", unit="row"):
        try:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn, initializer=ignore_known_warnings) as process:
                row = process.submit(row_of, model, method, seconds).result()
        except BrokenProcessPool:
            reason = "not measured: its process was killed, as a rule for want of memory"
            row = {"model": model, "method": method, "milliseconds": {}, "saved_bytes": {}, "missing": reason}
            tqdm.write(f"{model} | {method} | {reason}")
        rows.append(row)
        ms, saved = row["milliseconds"], row["saved_bytes"]
        cells = [model, method, *(f"{ms[name]:.0f}" if name in ms else "" for name in columns)]
        for values in (ms, saved):
            cells.append(f"{values['patched'] / values['stock']:.2f}" if "stock" in values else "")
        tqdm.write(" | ".join(cells))
    return rows


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("LoRA")])
def test_finetune(benchmark, method):
    batch = batch_of("encoder")
    variants = {name: step_of(module, batch) for name, module in variants_of("encoder", method, False).items()}
    patched = variants.pop("patched")
    others = Turns(variants)
    benchmark.pedantic(patched, setup=others.round, rounds=9, warmup_rounds=2)
    benchmark.extra_info["milliseconds"] = others.milliseconds()


if __name__ == "__main__":
    main(__doc__, measure, missed_bars)

"""Layers and whole models on a CUDA GPU: time and peak memory beside stock PEFT, compiled stock and the frozen floor.

    python -m benchmarks.bench_gpu                # writes benchmarks/results/<device>-<date>.json
    python -m benchmarks.bench_gpu --rehearse     # tiny sizes on the CPU: that it runs, nothing else

CUDA events around forward and backward, with a cold second-level cache; the variants of one row take turns; medians.
"milliseconds" is what a step takes from its first launch to the end of its last, so for small layers what the host
takes to launch them; "device_milliseconds" is what its kernels run, with a warm cache, by torch's profiler.
Models have the shapes and random weights of their configurations, bf16, and fewer layers. Rows that the given time does
not reach are listed as not measured. "plans" is what tuning chose for each shape, "trials" the times that it goes by.
"""

import argparse
import copy
import functools
import gc
import json
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peft_fast
from benchmarks import bench_bottleneck_adapter, bench_lora_linear, bench_prefix_attention
from peft_fast import tuning, tuning_file
from peft_fast.testing import lora_linear_inputs

RESULTS = Path(__file__).parent / "results"
Steps = dict[str, Callable[[], Any]]

LORA = [  # (M, K, N, R)
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 1024, 1024, 16),
    (512, 1024, 1024, 16),
    (64, 256, 256, 8),
]
ADAPTERS = [(8192, 1024, 64), (8192, 4096, 64)]  # (M, K, R)
PREFIXES = [(8, 32, 8, 1024, 32, 128), (16, 16, 16, 512, 32, 64)]  # (Z, H, H_KV, S, P, DH)
TINY = {
    "lora": [(48, 32, 40, 8)],
    "adapters": [(48, 32, 8)],
    "prefixes": [(2, 4, 2, 16, 4, 16)],
}


def kernel_steps(M: int, K: int, N: int, R: int, dropout_p: float, device: str, dtype: torch.dtype) -> Steps:
    """Both plans of the LoRA kernels, launched without autograd around them."""
    from peft_fast import reference
    from peft_fast.kernels.lora_linear import lora_bwd, lora_fwd

    i = lora_linear_inputs(M, K, N, R, dtype=dtype, factor_dtype=torch.float32, device=device)
    threshold = reference.drop_threshold(dropout_p) if dropout_p else 0
    seed = torch.tensor([3], device=device)
    needs = (True, True, True, False)

    def run(plan: str) -> None:
        _, s = lora_fwd(i.x, i.weight, i.lora_a, i.lora_b, None, i.scaling, threshold, seed, plan=plan)
        lora_bwd(i.dy, i.x, i.weight, i.lora_a, i.lora_b, s, i.scaling, threshold, seed, needs=needs, plan=plan)

    return {f"kernels, {plan}": functools.partial(run, plan) for plan in ("split", "fused")}


def bert(layers: int, tiny: bool) -> nn.Module:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **(size if tiny else large)))


def llama(layers: int, tiny: bool) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if tiny else {"num_attention_heads": 32}
    size = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    large = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **heads, **(size if tiny else large)))


# PEFT's prefix takes positions, of which BERT has 512.
MODELS = {"BERT-large, 8 layers": (bert, 8, (16, 448)), "Llama-3-8B, 4 layers": (llama, 4, (4, 2048))}
METHODS = {
    "LoRA on all linear, rank 16": lambda task: LoraConfig(
        task_type=task, r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"
    ),
    "Pfeiffer adapter, 64": lambda task: peft_fast.BottleneckConfig(
        task_type=task, style="pfeiffer", bottleneck_size=64
    ),
    "prefix of 32": lambda task: peft_fast.PrefixConfig(task_type=task, num_virtual_tokens=32),
    "prefix of 32, PEFT's": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=32),
}


def model_steps(name: str, method: str, device: str, dtype: torch.dtype, tiny: bool) -> Steps:
    build, layers, (texts, tokens) = MODELS[name]
    if tiny:
        layers, texts, tokens = 1, 2, 8
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device(device):  # a billion random weights take a CPU half a minute
        base = build(layers, tiny).to(dtype)
    task = "SEQ_CLS" if build is bert else "CAUSAL_LM"
    floor = copy.deepcopy(base).requires_grad_(False)
    floor.enable_input_require_grads()
    tuned = get_peft_model(base, METHODS[method](task))
    variants = {"floor": floor}
    if "rank" in method or "PEFT" in method:
        patched = copy.deepcopy(tuned)
        peft_fast.patch(patched)
        variants |= {"stock": tuned, "patched": patched}
    else:
        variants |= {"ours": tuned}
    if "rank" in method and not tiny:
        variants |= {f"{kind} compiled": torch.compile(copy.deepcopy(variants[kind])) for kind in ("stock", "patched")}
    ids = torch.randint(0, 64, (texts, tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = ids if build is llama else ids[:, 0] % 2

    def step(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            module(**batch).loss.backward()
            module.zero_grad(set_to_none=True)

        return run

    return {kind: step(module.train()) for kind, module in variants.items()}


def rows_of(device: str, dtype: torch.dtype, tiny: bool) -> Iterator[tuple[dict[str, Any], Callable[[], Steps]]]:
    """What each row says of itself, and its variants, made when it is its turn."""
    lora, adapters, prefixes = TINY.values() if tiny else (LORA, ADAPTERS, PREFIXES)
    on: dict[str, Any] = {"device": device, "dtype": dtype}

    def lora_rows(p: float) -> Iterator[tuple[dict[str, Any], Callable[[], Steps]]]:
        for shape in lora:
            yield (
                {"what": "LoRA linear", "shape": shape, "dropout": p},
                lambda shape=shape: {
                    **bench_lora_linear.steps(*shape, p, **on),
                    **kernel_steps(*shape, p, device, dtype),
                },
            )

    # What is asked for most comes first: the time may not reach all.
    yield from lora_rows(0.1)
    for shape in adapters:
        for p, norm in ((0.1, "none"), (0.0, "none"), (0.1, "after")):
            yield (
                {"what": "bottleneck adapter", "shape": shape, "dropout": p, "norm": norm},
                lambda shape=shape, p=p, norm=norm: bench_bottleneck_adapter.steps(*shape, p, norm, **on),
            )
    for shape in prefixes:
        for causal in (True, False):
            yield (
                {"what": "prefix attention", "shape": shape, "causal": causal},
                lambda shape=shape, causal=causal: bench_prefix_attention.steps(shape, causal, False, **on),
            )
    for method in METHODS:
        for name in MODELS:
            yield (
                {"what": name, "method": method},
                lambda name=name, method=method: model_steps(name, method, device, dtype, tiny),
            )
    yield from lora_rows(0.0)


def device_milliseconds(run: Callable[[], Any], runs: int = 3) -> float:
    """What the kernels of one run take, without the gaps between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / runs / 1e3


def measure(steps: Steps, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each variant; on a GPU also those that its kernels run, and the bytes of its peak."""
    for run in steps.values():  # compile, tune and warm up
        for _ in range(3):
            run()
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    peak: dict[str, int] = {}
    on_device: dict[str, float] = {}
    if device != "cuda":
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            milliseconds[name].append(1e3 * (time.perf_counter() - start))
    else:
        cache = torch.empty(256 << 20, dtype=torch.int8, device=device)
        for name, run in steps.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak[name] = torch.cuda.max_memory_allocated() - before
            on_device[name] = device_milliseconds(run)
        events = []
        for _ in range(rounds):
            for name, run in steps.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                cache.zero_()
                start.record()
                run()
                end.record()
                events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            milliseconds[name].append(start.elapsed_time(end))
    return {
        name: {
            "milliseconds": statistics.median(milliseconds[name]),
            "device_milliseconds": on_device.get(name),
            "peak_bytes": peak.get(name),
        }
        for name in steps
    }


def tuned() -> dict[str, Any]:
    """What this process runs for each shape of a LoRA layer, and the times of its trials."""
    chosen = tuning.chosen()
    times = tuning_file.results(tuning.device_and_versions(torch.device("cuda", 0))) if chosen else {}
    return {"plans": chosen, "trials": {shape: times[shape] for shape in chosen if shape in times}}


def describe(device: str) -> dict[str, Any]:
    packages = ("torch", "triton", "transformers", "peft")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "date": time.strftime("%Y-%m-%d"), **{package: version(package) for package in packages}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=270.0, help="start no row after so long (default 270)")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of a variant (default 20)")
    parser.add_argument("--json", type=Path, help="where to write (default benchmarks/results/<device>-<date>.json)")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("bench_gpu: no CUDA device; --rehearse runs tiny sizes on the CPU")
    about = describe(device)
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = options.json or RESULTS / f"{slug}-{about['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, missing, failed, end = [], [], 0, time.monotonic() + options.seconds
    for row, build in tqdm(list(rows_of(device, dtype, options.rehearse)), desc="rows", unit="row"):
        try:
            if time.monotonic() > end:
                raise TimeoutError("not measured: the time was up")
            row["variants"] = measure(build(), device, options.rounds)
            rows.append(row)
            times = ", ".join(f"{name} {value['milliseconds']:.3f}" for name, value in row["variants"].items())
            tqdm.write(f"{row['what']} {row.get('shape', row.get('method'))}, ms: {times}")
        except (TimeoutError, torch.cuda.OutOfMemoryError) as error:
            missing.append(row | {"reason": str(error).splitlines()[0]})
        except Exception as error:  # the rows after it are worth their time
            traceback.print_exc()
            missing.append(row | {"reason": f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"})
            failed += 1
        gc.collect()
        torch.cuda.empty_cache()
        # After each row, so that a run that is stopped leaves what it has.
        path.write_text(json.dumps(about | {"rows": rows, "missing": missing} | tuned(), indent=1) + "\n")
    print(f"{len(rows)} rows measured, {len(missing)} not, written to {path}")
    if failed:
        raise SystemExit(f"bench_gpu: {failed} rows failed")


if __name__ == "__main__":
    main()

"""Which plan of a LoRA linear layer is fastest, found out on the device, once for each shape, and kept on disk.

A trial times a training step, forward and backward, of each plan:

    eager            the torch calls that stock peft makes, with its casts and its dropout
    split            our kernels around the vendor's matmul
    fused            our matmul with the low-rank term
    fused 64x128     the same by another tile of those that are known to compile well

A plan of ours is taken only where it beats stock's calls; an op that is called directly takes the fastest of ours. A
plan whose results are not those of `split`, as a compiler's fault would leave them, is not timed at all. M counts by
powers of two, rounded down: what wins with few rows wins with more.

A trial never touches what the caller has. It works on tensors of its own, and torch's random state is put back. It runs
in a thread of its own, which no autocast, grad mode, dispatch mode or hook of the caller reaches: checkpointing would
count what a trial saves as the layer's. There is none while calls are traced or captured, nor in backward. What is not
measured, for whatever reason, goes by the table shipped with the package (`tuned.json`).

The times are kept in a file of the user's cache folder (`tuning_file`). In a distributed run rank 0 measures; others
read the file and go by the table until it is there; nobody waits. `PEFT_FAST_TUNE=0` keeps to the table.
"""

import functools
import hashlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast import tuning_file
from peft_fast.eager.dropout import draw_seed
from peft_fast.tuning_file import Times

# Decoding, with a few rows at a time, meets every bucket below and would gain less than the trials cost.
LEAST_ROWS = 16
# Of the larger activation: a device is full by then, and the tensors of a trial take about 1 GiB.
MOST_ELEMENTS = 1 << 26
# A plan replaces stock's calls, and `fused` replaces `split`, if it takes at most so much of their time: less is noise.
GAIN = 0.98
WARM_RUNS, ROUNDS = 3, 11
# Of the largest value of a result: how far plans may differ. They round differently, by far less than this.
AGREEMENT = 2**-5
# How often a process that may not measure looks for what another one has measured.
LOOK_SECONDS = 2.0


class Choice(NamedTuple):
    """`plan`: what our op should run. `stock`: whether stock's calls are faster still, None where nothing tells."""

    plan: str
    stock: bool | None


class Shape(NamedTuple):
    """What a trial is for; `M` is rounded down to a power of two."""

    device: torch.device
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    factor_dtype: torch.dtype
    dropout: bool
    tf32: bool

    def __str__(self) -> str:
        dtypes = f"{self.dtype}{' tf32' if self.tf32 else ''} {self.factor_dtype}".replace("torch.", "")
        return f"lora_linear M={self.M} K={self.K} N={self.N} R={self.R} {dtypes}{' dropout' if self.dropout else ''}"


_lock = threading.Lock()
_choices: dict[tuple, Choice] = {}
_waiting: dict[Shape, float] = {}  # shapes that went by the table, as they could not be measured; when to look again


def serves(x: Tensor) -> bool:
    """Whether `choose` is to be asked for calls on x."""
    return x.is_cuda


def choose(x: Tensor, weight: Tensor, lora_a: Tensor, dropout: bool, *, measure: bool) -> Choice:
    """What to run for a call; x (..., K), weight (N, K), lora_a (R, K). The first call of a shape measures.

    `measure` says whether the calls of now are run as they are written, not traced or transformed.
    """
    size, (N, K), R, dtype = x.numel(), weight.shape, lora_a.shape[0], x.dtype
    # Where shapes are dynamic they are symbols, which must not be compared: that would be a guard of the graph.
    if type(size) is not int or type(N) is not int or type(K) is not int or type(R) is not int:
        return _default()
    M = size // max(K, 1)
    if M < LEAST_ROWS:
        return _default()
    bucket = 1 << (min(M, max(LEAST_ROWS, MOST_ELEMENTS // max(N, K, 1))).bit_length() - 1)
    tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    key = (x.device, bucket, K, N, R, dtype, lora_a.dtype, dropout, tf32)
    choice = _choices.get(key)  # a Shape is this tuple, but takes longer to make
    return _settle(Shape(*key), measure) if choice is None else choice


def chosen() -> dict[str, str]:
    """Shape -> what this process runs for it: a plan, or "stock" where stock's calls are faster."""
    return {str(Shape(*key)): "stock" if choice.stock else choice.plan for key, choice in _choices.items()}


def _settle(shape: Shape, measure: bool) -> Choice:
    # In backward a trial could wait for the very thread that waits for it: the one that runs backward on this device.
    if torch._C._current_graph_task_id() != -1 or time.monotonic() < _waiting.get(shape, 0.0):
        return _by_table(shape)
    with _lock:
        if shape in _choices:
            return _choices[shape]
        if os.environ.get("PEFT_FAST_TUNE") == "0":
            return _choices.setdefault(shape, _by_table(shape))
        about = device_and_versions(shape.device)
        times = _complete(shape, tuning_file.results(about).get(str(shape)))
        if times is None and measure and _may_measure(shape.device):
            times = _complete(shape, _measured(shape))
            if times is None:  # and would be again
                return _choices.setdefault(shape, _by_table(shape))
            tuning_file.keep(about, {str(shape): times})
        if times is None:
            if measure:
                _waiting[shape] = time.monotonic() + LOOK_SECONDS
            return _by_table(shape)
        choice = _fastest(times)
        if shape in _waiting:
            # A forward that checkpointing repeats must draw the same dropout mask, so what ran stock goes on to, and
            # what ran ours. Our plans draw the same one.
            choice = choice._replace(stock=_by_table(shape).stock)
        return _choices.setdefault(shape, choice)


def _fastest(times: Times) -> Choice:
    ours = {plan: time for plan, time in times.items() if plan != "eager"}
    best = min(ours, key=ours.__getitem__)
    if ours[best] > GAIN * ours["split"]:
        best = "split"
    return Choice(best, stock=ours[best] > GAIN * times["eager"])


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("tuned.json").read_text(encoding="utf-8"))


@functools.cache
def _default() -> Choice:
    return Choice(_table()["plan"], stock=None)


@functools.cache
def _by_table(shape: Shape) -> Choice:
    known = _table()["devices"].get(device_and_versions(shape.device)["device"], {})
    times = _complete(shape, known.get(str(shape)))
    return _default() if times is None else _fastest(times)


def _plans(shape: Shape) -> list[str]:
    from peft_fast.kernels.low_rank import named_tiles  # late: Triton may be absent

    x = torch.empty(0, dtype=shape.dtype, device=shape.device)
    return ["eager", "split", "fused", *(f"fused {name}" for name in named_tiles(x, shape.R))]


def _complete(shape: Shape, times: Times | None) -> Times | None:
    """The times of plans that there are, None where they do not suffice for a choice."""
    if not times or not {"eager", "split"} <= times.keys():
        return None
    return {plan: times[plan] for plan in _plans(shape) if plan in times}


def _may_measure(device: torch.device) -> bool:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _measured(shape: Shape) -> Times:
    """The times of a trial; without those of plans that fail, empty where all fails."""
    stream = torch.cuda.current_stream(shape.device) if shape.device.type == "cuda" else None
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(_trial, shape, stream).result()
    except Exception as error:  # most likely there is no memory for the scratch tensors
        tuning_file.warn(f"{shape} was not measured: {type(error).__name__}: {error}")
        return {}


def _trial(shape: Shape, stream: Any) -> Times:
    # On the caller's stream, so that the caller can use the memory afterwards. Only that stream is waited for: with
    # pipelines, others may wait for what another rank has yet to send.
    devices = [] if stream is None else [shape.device]
    with torch.random.fork_rng(devices), torch.cuda.stream(stream):
        steps, results, of_split = _steps(shape), None, None
        for plan, step in list(steps.items()):
            try:
                for _ in range(WARM_RUNS):
                    results = step()
                of_split = results if plan == "split" else of_split
                fault = "" if plan == "eager" or _agree(results, of_split) else "its results are not those of split"
            except Exception as error:  # of whatever compiler or driver gives up
                fault = f"{type(error).__name__}: {error}"
            if fault:
                tuning_file.warn(f"{shape} cannot run by the plan {plan}: {fault}")
                del steps[plan]
        results = of_split = None  # their memory is not needed any more
        times: dict[str, list[float]] = {plan: [] for plan in steps}
        for _ in range(ROUNDS):
            for plan, step in steps.items():
                times[plan].append(_milliseconds(step, stream))
    return {plan: statistics.median(values) for plan, values in times.items()}


@torch.no_grad()
def _agree(results: Sequence[Tensor], expected: Sequence[Tensor] | None) -> bool:
    return expected is None or all(
        bool((a - b).abs().max() <= AGREEMENT * b.abs().max()) for a, b in zip(results, expected, strict=True)
    )


def _milliseconds(step: Callable[[], Any], stream: Any) -> float:
    """What one step takes from a standstill, the launching included where that is what takes long."""
    if stream is None:
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.synchronize()
    start.record(stream)
    step()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)


def _steps(shape: Shape) -> dict[str, Callable[[], Any]]:
    """A training step by each plan, on tensors made for it."""
    from peft_fast.ops.lora_linear import lora_linear_by  # late: the op asks this module

    device, M, K, N, R, dtype, factor_dtype, dropout, _ = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
        values = torch.empty(size, dtype=dtype, device=device).normal_(std=0.02, generator=generator)
        return values.requires_grad_(requires_grad)

    x, dy = normal(M, K, dtype=dtype, requires_grad=True), normal(M, N, dtype=dtype)
    weight = normal(N, K, dtype=dtype)
    lora_a = normal(R, K, dtype=factor_dtype, requires_grad=True)
    lora_b = normal(N, R, dtype=factor_dtype, requires_grad=True)
    dropout_p = 0.1 if dropout else 0.0

    def stock() -> Tensor:  # `lora.Linear.forward` of peft
        y = F.linear(x, weight)
        low_rank = F.linear(F.linear(F.dropout(x.to(factor_dtype), dropout_p, dropout), lora_a), lora_b)
        return (y + low_rank * 2.0).to(dtype)

    seed = draw_seed(device) if dropout else None

    def step(plan: str) -> tuple[Tensor, ...]:
        y = stock() if plan == "eager" else lora_linear_by(plan, x, weight, lora_a, lora_b, None, 2.0, dropout_p, seed)
        return y, *torch.autograd.grad(y, (x, lora_a, lora_b), dy)

    return {plan: functools.partial(step, plan) for plan in _plans(shape)}


@functools.cache
def device_and_versions(device: torch.device) -> dict[str, str]:
    """What times hold for: another device, torch, Triton or other kernels of ours want times of their own."""
    import triton

    from peft_fast.kernels import low_rank

    sources = sorted(Path(low_rank.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": digest,
    }

"""Stock against patched, on the user's own model and batch.

Numbers are compared in evaluation mode, where nothing is dropped, so that both compute the same function. The truth is
the stock model in a wider dtype (float64 for float32, float32 for 16 bits), and the patched model may err from it as
much as `testing.error_budget` allows: twice what stock itself errs. Time and memory are those of training steps in the
mode in which the model is, dropout included.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.patch import check_model, is_patched, patch, report, swap, unpatch
from peft_fast.support import STOCK_CALL
from peft_fast.testing import error_budget, largest_error, saved_bytes

_GRADIENT = "gradient of "
_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class VerifyRow:
    """The loss, the logits or one gradient: how far the patched model is from the truth, and how far it may be."""

    name: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # and not where it is NaN


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; pairs are (stock, patched). `str(report)` is a table.

    `seconds` is the median time of a training step, `saved_bytes` what autograd holds from its forward to its backward
    beside the model's own tensors, `peak_bytes` what the step allocates at its peak on a CUDA device, elsewhere None.
    `fused` is how many adapter layers ran fused where results were compared, and how many there are; `fused_in_steps`
    how many did in the timed steps, whose dropout may change what gains.
    `missing` names what stock gives and the patched model does not, `untrained` the parameters that require grad and
    get none from either.
    """

    rows: tuple[VerifyRow, ...]
    missing: tuple[str, ...]
    untrained: tuple[str, ...]
    loss: tuple[float, float]
    seconds: tuple[float, float]
    saved_bytes: tuple[int, int]
    peak_bytes: tuple[int, int] | None
    fused: tuple[int, int]
    fused_in_steps: int

    @property
    def ok(self) -> bool:
        """Whether the patched model gives everything that stock gives, each within its budget."""
        return not self.missing and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        stock_ms, patched_ms = (1e3 * seconds for seconds in self.seconds)
        worst = max(self.rows, key=lambda row: row.error / row.budget if row.budget else float(row.error > 0))
        lines = [
            f"peft_fast.verify: {'ok' if self.ok else 'NOT OK'}, {len(self.rows)} tensors compared, "
            f"{self.fused[0]} of {self.fused[1]} adapter layers fused",
            f"loss       {self.loss[0]:.6f} stock, {self.loss[1]:.6f} patched",
            f"worst      {worst.name}: error {worst.error:.2e}, {worst.budget:.2e} allowed",
            f"step       {stock_ms:.1f} ms stock, {patched_ms:.1f} ms patched{_ratio(self.seconds)}, "
            f"{self.fused_in_steps} of {self.fused[1]} layers fused in it",
            f"saved      {_mebibytes(self.saved_bytes)} held from forward to backward",
        ]
        if self.peak_bytes is not None:
            lines.append(f"peak       {_mebibytes(self.peak_bytes)} allocated on the device")
        lines += [
            f"beyond     {row.name}: error {row.error:.2e}, {row.budget:.2e} allowed" for row in self.rows if not row.ok
        ]
        lines += [f"missing    {name}" for name in self.missing]
        lines += [f"untrained  {name} requires grad and gets none, stock or patched" for name in self.untrained]
        return "\n".join(lines)


def _ratio(pair: tuple[float, float]) -> str:
    return f" ({pair[1] / pair[0]:.2f}x)" if pair[0] else ""


def _mebibytes(pair: tuple[int, int]) -> str:
    return f"{pair[0] / 2**20:.1f} MiB stock, {pair[1] / 2**20:.1f} MiB patched{_ratio(pair)}"


def verify(model: nn.Module, batch: Mapping[str, Any], *, steps: int = 5) -> VerifyReport:
    """Compare stock PEFT with the patched model on one batch: loss, logits, every gradient, time and memory.

    The model comes back as it was: patched or not, its mode, its gradients, its buffers, torch's random state. Under
    way its floating-point tensors exist twice, once in a wider dtype. Called inside an autocast region, both models
    run under it.

    Args:
        model: what `get_peft_model` returned, patched or not. One of which some parts are patched keeps the others
            stock.
        batch: the keyword arguments of its forward, labels included, on its device.
        steps: how many training steps of each kind are timed, in turns.

    The lora_B of a fresh adapter is zero, and hides an error of what it multiplies: verify one that has learned.

    Raises ValueError where the model has nothing to patch, returns no loss, or cannot run in the wider dtype, where the
    batch is no mapping, and where steps are fewer than 1.
    """
    check_model(model)
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch: expected the keyword arguments of the model's forward, got {type(batch).__name__}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    with torch.enable_grad(), _restored(model) as patched:
        if not patched:
            patch(model)  # raises where nothing can be patched
        layers = [module for module in model.modules() if is_patched(module)]
        modes = {module: module.training for module in model.modules()}
        model.eval()
        ours = _step(model, batch)
        states = [row.state for row in report(model).rows]
        unpatch(model)
        stock, truth = _step(model, batch), _wide_step(model, batch)
        for module, mode in modes.items():
            module.training = mode
        rows = [
            VerifyRow(name, largest_error(ours[name], truth[name]), error_budget(truth[name], expected))
            for name, expected in stock.items()
            if name in ours
        ]
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return VerifyReport(
            rows=tuple(rows),
            missing=tuple(name for name in stock if name not in ours),
            untrained=tuple(name for name in trainable if _GRADIENT + name not in stock | ours),
            loss=(stock["loss"].item(), ours["loss"].item()),
            fused=(states.count("fused"), len(states)),
            **_costs(model, batch, layers, steps),
        )


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(f"batch: {type(model).__name__} returned no loss for {sorted(batch)}; add the labels")
    return loss, output


def _step(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The loss, the logits where there are some, and every gradient of one forward and backward."""
    model.zero_grad(set_to_none=True)
    loss, output = _loss(model, batch)
    loss.backward()
    result = {"loss": loss.detach()}
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        result["logits"] = logits.detach()
    return result | {
        _GRADIENT + name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def _wide_step(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """`_step` with every floating-point tensor of model and batch in a wider dtype, without autocast."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in _WIDER]
    if not tensors:
        raise ValueError(f"model: {type(model).__name__} is in no dtype that has a wider one to compare with")
    narrow = [tensor.data for tensor in tensors]
    # One dtype for all: an fp32 adapter over a bf16 base meets activations of the base's dtype.
    wide = max((_WIDER[tensor.dtype] for tensor in tensors), key=lambda dtype: dtype.itemsize)
    device = next(model.parameters()).device.type

    def widened(value: Any) -> Any:
        return value.to(wide) if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(wide)
        with torch.autocast(device, enabled=False):
            result = _step(model, {name: widened(value) for name, value in batch.items()})
        return result
    except RuntimeError as error:
        raise ValueError(f"model: {type(model).__name__} cannot run in {wide}, which verify compares with") from error
    finally:
        for tensor, data in zip(tensors, narrow, strict=True):
            tensor.grad = None
            tensor.data = data


def _costs(model: nn.Module, batch: Mapping[str, Any], layers: list[nn.Module], steps: int) -> dict[str, Any]:
    """The last fields of `VerifyReport`, with `layers` patched on one side; the sides take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    saved, peak = [0, 0], [0, 0]
    own, states = (*model.parameters(), *model.buffers()), []
    cuda = own[0].device if own[0].is_cuda else None
    for turn in range(steps + 1):
        for fused in (0, 1):
            unpatch(model)
            for layer in layers if fused else ():
                swap(layer)
            if turn == 0:  # which also warms up
                saved[fused] = saved_bytes(lambda: _loss(model, batch)[0], own)
            model.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize(cuda)
                torch.cuda.reset_peak_memory_stats(cuda)
                before = torch.cuda.memory_allocated(cuda)
            start = time.perf_counter()
            _loss(model, batch)[0].backward()
            if cuda:
                torch.cuda.synchronize(cuda)
                peak[fused] = torch.cuda.max_memory_allocated(cuda) - before
            if fused:
                states = [row.state for row in report(model).rows]
            if turn:
                seconds[fused].append(time.perf_counter() - start)
    return {
        "seconds": (statistics.median(seconds[0]), statistics.median(seconds[1])),
        "saved_bytes": tuple(saved),
        "peak_bytes": tuple(peak) if cuda else None,
        "fused_in_steps": states.count("fused"),
    }


@contextmanager
def _restored(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Yields the patched modules of `model`. Whatever happens inside, it and torch's random state end as before."""
    patched = [module for module in model.modules() if is_patched(module)]
    last_calls = {module: module.__dict__.get(STOCK_CALL) for module in patched}
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield patched
    finally:
        unpatch(model)
        for module, reason in last_calls.items():
            swap(module)
            module.__dict__.pop(STOCK_CALL, None)
            if reason is not None:
                module.__dict__[STOCK_CALL] = reason
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)

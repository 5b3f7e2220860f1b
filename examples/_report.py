"""What the example shows of its two trainings: the table, the picture of the losses and the summary."""

import json
import math
import platform
import statistics
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table


@dataclass
class Result:
    """What one of the two trainings gave."""

    accuracy: float = math.nan
    seconds_per_step: float = math.nan
    saved_activation_bytes: int = 0
    accuracy_by_epoch: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    losses_without_dropout: list[float] = field(default_factory=list)


def write_summary(path: Path, results: dict[str, Result], loss_max_diff: float, settings: dict[str, Any]) -> None:
    curves = ("losses", "losses_without_dropout")
    summary = {
        **{
            name: {key: value for key, value in vars(result).items() if key not in curves}
            for name, result in results.items()
        },
        "step_ratio": results["patched"].seconds_per_step / results["stock"].seconds_per_step,
        "loss_max_diff": loss_max_diff,
        "settings": settings,
        "device": _device(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("peft-fast", "torch", "transformers", "peft")},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")


def draw_losses(path: Path, results: dict[str, Result], loss_max_diff: float) -> None:
    styles = {"stock": {"color": "0.55", "linewidth": 3.5}, "patched": {"color": "C1", "linewidth": 1.5}}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, result in results.items():
        window = max(1, min(25, len(result.losses) // 4))
        smooth = [statistics.fmean(result.losses[i : i + window]) for i in range(len(result.losses) - window + 1)]
        left.plot(range(window, len(result.losses) + 1), smooth, label=name, **styles[name])
        steps = range(1, len(result.losses_without_dropout) + 1)
        right.plot(steps, result.losses_without_dropout, label=name, **styles[name])
    left.set_title(f"Training, dropout drawn anew in each: mean of the last {window} steps")
    right.set_title(f"Same steps without dropout: they differ by at most {loss_max_diff:.1e}")
    for axes in (left, right):
        axes.set(xlabel="step", ylabel="training loss")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def print_table(results: dict[str, Result], loss_max_diff: float) -> None:
    stock, patched = results["stock"], results["patched"]
    table = Table(title=f"PEFT as it is, and with peft_fast.patch(model), on {_device()}")
    table.add_column()
    for heading in ("stock", "patched", "patched / stock"):
        table.add_column(heading, justify="right")
    time_ratio = patched.seconds_per_step / stock.seconds_per_step
    bytes_ratio = patched.saved_activation_bytes / stock.saved_activation_bytes
    table.add_row("held-out accuracy", f"{stock.accuracy:.3f}", f"{patched.accuracy:.3f}", "")
    table.add_row(
        "median time of a step",
        f"{1e3 * stock.seconds_per_step:.0f} ms",
        f"{1e3 * patched.seconds_per_step:.0f} ms",
        f"{time_ratio:.2f}",
    )
    table.add_row(
        "activations saved for backward",
        f"{stock.saved_activation_bytes / 2**20:.0f} MiB",
        f"{patched.saved_activation_bytes / 2**20:.0f} MiB",
        f"{bytes_ratio:.2f}",
    )
    table.add_row("largest loss difference, no dropout", "", f"{loss_max_diff:.1e}", "")
    Console().print(table)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

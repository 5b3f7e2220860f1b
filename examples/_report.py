"""What the example shows of its two trainings: the table, the picture of the losses and the summary."""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
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


def write_summary(
    path: Path, results: dict[str, Result], loss_max_diff: float | None, settings: dict[str, Any]
) -> None:
    curves = ("losses", "losses_without_dropout")
    summary = {
        **{
            name: {key: value for key, value in vars(result).items() if key not in curves}
            for name, result in results.items()
        },
        **(
            {}
            if loss_max_diff is None
            else {
                "step_ratio": results["patched"].seconds_per_step / results["stock"].seconds_per_step,
                "loss_max_diff": loss_max_diff,
            }
        ),
        "settings": settings,
        "device": _device(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("peft-fast", "torch", "transformers", "peft")},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")


def draw_losses(path: Path, results: dict[str, Result], loss_max_diff: float | None) -> None:
    styles = {"stock": {"color": "0.55", "linewidth": 3.5}}
    other = {"color": "C1", "linewidth": 1.5}
    figure = Figure(figsize=(12 if loss_max_diff is not None else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if loss_max_diff is not None else 1, squeeze=False)[0]
    for name, result in results.items():
        style = styles.get(name, other)
        window = max(1, min(25, len(result.losses) // 4))
        smooth = [statistics.fmean(result.losses[i : i + window]) for i in range(len(result.losses) - window + 1)]
        axes[0].plot(range(window, len(result.losses) + 1), smooth, label=name, **style)
        if loss_max_diff is not None:
            steps = range(1, len(result.losses_without_dropout) + 1)
            axes[1].plot(steps, result.losses_without_dropout, label=name, **style)
            axes[1].set_title(f"Same steps without dropout: they differ by at most {loss_max_diff:.1e}")
    axes[0].set_title(f"Training, dropout drawn anew: mean of the last {window} steps")
    for one in axes:
        one.set(xlabel="step", ylabel="training loss")
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
        one.legend(frameon=False)
    figure.savefig(path, dpi=150)


def print_table(results: dict[str, Result], loss_max_diff: float | None) -> None:
    table = Table(title=f"Held-out accuracy and cost, on {_device()}")
    table.add_column()
    for heading in (*results, *(["patched / stock"] if len(results) > 1 else [])):
        table.add_column(heading, justify="right")

    def row(title: str, values: list[float], form: Callable[[float], str], *, ratio: bool = False) -> None:
        last = [f"{values[-1] / values[0]:.2f}" if ratio else ""] if len(values) > 1 else []
        table.add_row(title, *map(form, values), *last)

    each = list(results.values())
    row("held-out accuracy", [result.accuracy for result in each], lambda value: f"{value:.3f}")
    milliseconds = [1e3 * result.seconds_per_step for result in each]
    row("median time of a step", milliseconds, lambda value: f"{value:.0f} ms", ratio=True)
    mebibytes = [result.saved_activation_bytes / 2**20 for result in each]
    row("activations saved for backward", mebibytes, lambda value: f"{value:.0f} MiB", ratio=True)
    if loss_max_diff is not None:
        table.add_row("largest loss difference, no dropout", "", f"{loss_max_diff:.1e}", "")
    Console().print(table)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

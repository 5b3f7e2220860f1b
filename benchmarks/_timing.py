"""What the layer benchmarks share: variants that take turns, options, and the file of results."""

import argparse
import json
import platform
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

NEVER_SLOWER = 1.03  # 3% for noise
LEAST_SECONDS = 5e-3  # of a turn


class Turns:
    """Runs variants in turns and keeps the seconds that each took.

    Each round has an order of its own, drawn from a seed: what a variant leaves in caches and allocator meets all
    others alike, and each runs as often after itself. A turn lasts at least 5 ms: what takes microseconds would else be
    timed with the Python of another variant in the caches, stock's with that of patched, which calls it. All take as
    many runs a turn, since the first finds the caches cold.
    """

    def __init__(self, variants: dict[str, Callable[[], None]]) -> None:
        self.variants = dict(variants)
        self.seconds: dict[str, list[float]] = {name: [] for name in variants}
        self.repeats = 1
        self.draw = random.Random(0)
        _warm_allocator()
        for run in variants.values():  # compile, and warm the caches
            for _ in range(3):
                start = time.perf_counter()
                run()
            self.repeats = max(self.repeats, round(LEAST_SECONDS / (time.perf_counter() - start)))

    def round(self) -> None:
        order = list(self.variants.items())
        self.draw.shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            for _ in range(self.repeats):
                run()
            self.seconds[name].append((time.perf_counter() - start) / self.repeats)

    def measure(self, seconds: float) -> dict[str, float]:
        """Medians after at least so many seconds and nine rounds."""
        end, rounds = time.perf_counter() + seconds, 0
        while time.perf_counter() < end or rounds < 9:
            self.round()
            rounds += 1
        return self.milliseconds()

    def milliseconds(self) -> dict[str, float]:
        return {name: 1e3 * statistics.median(values) for name, values in self.seconds.items()}


def _warm_allocator() -> None:
    """Free 31 MB, as every training process does sooner or later.

    From then on glibc keeps what is freed, up to twice as much; before, it gives pages back and faults them in again
    at each step, for one variant more than for another: two copies of one layer differed by up to 8%, with it by 1%.
    """
    torch.ones(31 << 18)


def ignore_known_warnings() -> None:
    """peft 0.21 asks transformers 5.23 for a property under its old name."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def main(doc: str | None, measure: Callable[[float], list[dict]], missed_bars: Callable[[dict], list[str]]) -> None:
    """The command of a benchmark: `measure` prints and returns its rows, `missed_bars` says what a row misses."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar is not met; wants an idle machine")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure a row (default 5)")
    parser.add_argument("--json", type=Path, help="write the rows, with device and versions, to this file")
    arguments = parser.parse_args()
    ignore_known_warnings()
    rows = measure(arguments.seconds)
    if arguments.json:
        write_rows(arguments.json, rows)
    if arguments.check:
        missed = [line for row in rows for line in missed_bars(row)]
        print("\n".join(missed) or "every bar is met")
        sys.exit(bool(missed))


def write_rows(path: Path, rows: list[dict]) -> None:
    where = {
        "device": f"{_cpu()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(where | {"rows": rows}, indent=2) + "\n")


def _cpu() -> str:
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()

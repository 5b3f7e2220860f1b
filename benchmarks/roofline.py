"""Modelled times of a training step, from the counts of `benchmarks.traffic` and what devices can do.

    python -m benchmarks.roofline                     # all tables
    python -m benchmarks.roofline --json PATH         # and the rows, with versions and date
    python -m benchmarks.roofline --quick             # few rows

*Modelled* is the sum over launches of max(operations / peak, bytes moved / bandwidth) plus a launch cost, the same for
everybody: every kernel at the ceiling of its device, ideal caches, nothing overlapping, no time on the host. Kernels
reach parts of these ceilings, a vendor's matmul a larger one than Triton's, so that `fused` is flattered most: no
figure here was timed.
"""

import argparse
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from triton.backends.compiler import GPUTarget

from benchmarks import _models
from benchmarks._cases import LAYERS, STOCK, describe
from benchmarks._counting import Launch
from benchmarks._tables import table, write

LAUNCH_SECONDS = 3e-6  # assumed: between the end of a small kernel and the start of the next


@dataclass(frozen=True)
class Device:
    """Ceilings: operations a second on 16-bit tensor cores and in fp32 without TF32, bytes a second."""

    target: GPUTarget
    peak: float
    peak_fp32: float
    bandwidth: float
    source: str


# fp32 is by data sheet everywhere.
DEVICES = {
    "A100": Device(GPUTarget("cuda", 80, 32), 312e12, 19.5e12, 2.039e12, "data sheet, SXM 80 GB"),
    "H100": Device(GPUTarget("cuda", 90, 32), 798e12, 67e12, 3.0e12, "bf16 matmul and copy measured, SXM"),
    "H200": Device(GPUTarget("cuda", 90, 32), 790e12, 67e12, 4.3e12, "bf16 matmul and copy measured, SXM"),
    "B200": Device(GPUTarget("cuda", 100, 32), 2250e12, 80e12, 8.0e12, "data sheet, dense"),
    "MI300X": Device(GPUTarget("hip", "gfx942", 64), 1307e12, 163.4e12, 5.3e12, "data sheet, dense"),
}


def modelled_seconds(launches: Iterable[Launch], device: Device) -> float:
    return sum(
        max(
            launch.flops / (device.peak if launch.bits == 16 else device.peak_fp32),
            launch.moved / device.bandwidth,
        )
        + LAUNCH_SECONDS
        for launch in launches
    )


def _rows(kind: str, shape: str, name: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    stock = next(value for variant, value in seconds.items() if variant in STOCK)
    return [
        {
            "kind": kind,
            "shape": shape,
            "device": name,
            "variant": variant,
            "modelled_ms": 1e3 * value,
            "modelled_ratio_to_stock": value / stock,
        }
        for variant, value in seconds.items()
    ]


def layer_rows(names: list[str], cases: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for kind, make, arguments in cases:
        variants = make(**arguments)
        for name in names:
            device = DEVICES[name]
            seconds = {
                variant: modelled_seconds(what.launches(device.target), device) for variant, what in variants.items()
            }
            rows += _rows(kind, describe(arguments), name, seconds)
    return rows


def model_rows(names: list[str], models: list[str]) -> list[dict[str, Any]]:
    """Models as in `traffic.whole_model`: the time of all layers from that of one and of two."""
    rows = []
    for model in models:
        for method in _models.METHODS:
            for options in [{"fp32_factors": True}, {"fp32_factors": False}] if method == "lora" else [{}]:
                one, two = (_models.model(model, method, layers, **options) for layers in (1, 2))
                shape = describe({"tokens": " x ".join(map(str, _models.MODELS[model])), **options})
                for name in names:
                    device = DEVICES[name]
                    seconds = {}
                    for variant in one:
                        first, both = (
                            modelled_seconds(net[variant].launches(device.target), device) for net in (one, two)
                        )
                        seconds[variant] = first + (_models.LAYERS[model] - 1) * (both - first)
                    rows += _rows(f"{model}, {method}", shape, name, seconds)
    return rows


COLUMNS = {
    "what": lambda row: row["kind"],
    "shape": lambda row: row["shape"],
    "device": lambda row: row["device"],
    "variant": lambda row: row["variant"],
    "modelled ms": lambda row: f"modelled {row['modelled_ms']:.3f}",
    "modelled ratio to stock": lambda row: f"modelled {row['modelled_ratio_to_stock']:.2f}",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows, with versions and date, to this file")
    parser.add_argument("--quick", action="store_true", help="few rows")
    options = parser.parse_args(arguments)
    names, models, cases = list(DEVICES), list(_models.MODELS), LAYERS
    if options.quick:
        names, models, cases = ["H100"], models[:1], LAYERS[1::11]
    table(
        f"Ceilings that modelled times take, beside {1e6 * LAUNCH_SECONDS:.0f} µs a launch",
        [{"name": name, "device": DEVICES[name]} for name in names],
        {
            "modelled device": lambda row: f"modelled with {row['name']}",
            "TFLOP/s in 16 bits": lambda row: f"{row['device'].peak / 1e12:.0f}",
            "in fp32": lambda row: f"{row['device'].peak_fp32 / 1e12:.1f}",
            "TB/s": lambda row: f"{row['device'].bandwidth / 1e12:.2f}",
            "source": lambda row: row["device"].source,
        },
    )
    layers = layer_rows(names, cases)
    table("Layers, forward and backward: modelled, not timed", layers, COLUMNS)
    whole = model_rows(names, models)
    table("Whole models, forward and backward: modelled, not timed", whole, COLUMNS)
    if options.json:
        ceilings = {
            f"modelled_with_{name}": {
                "flops_per_s": device.peak,
                "fp32_flops_per_s": device.peak_fp32,
                "bytes_per_s": device.bandwidth,
                "source": device.source,
            }
            for name, device in DEVICES.items()
        }
        ceilings["modelled_with_launch_seconds"] = LAUNCH_SECONDS  # type: ignore[assignment]
        write(options.json, ceilings | {"modelled_layers": layers, "modelled_models": whole})


if __name__ == "__main__":
    main()

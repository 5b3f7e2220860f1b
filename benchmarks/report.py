"""Tables and plots of what is in benchmarks/results: the newest file of each benchmark.

    python -m benchmarks.report             # rewrite the tables of both pages and the plots beside the results
    python -m benchmarks.report --check     # exit 1 where a page's tables are not those of the results

The pages are README.md and benchmarks/README.md; a table stands between <!-- table: NAME --> and <!-- end -->.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGES = (Path(__file__).parent.parent / "README.md", Path(__file__).parent / "README.md")
_STAMP = r"-\d{4}-\d{2}-\d{2}\.json"
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GREY, ORANGE, BLUE = "0.7", "C1", "C0"


def newest(name: str) -> dict[str, Any] | None:
    """The newest result of a benchmark, by the date in its name; None where there is none."""
    files = sorted(file for file in RESULTS.glob("*.json") if re.fullmatch(re.escape(name) + _STAMP, file.name))
    return json.loads(files[-1].read_text()) if files else None


def on_gpus() -> list[dict[str, Any]]:
    """The newest results of `bench_gpu` on each device."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    return list({result["device"]: result for result in found if "missing" in result}.values())


def markdown(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _ratio(values: dict[str, float], one: str, other: str) -> str:
    return f"{values[one] / values[other]:.2f}" if one in values and other in values else ""


def _shape(row: dict[str, Any], names: str) -> str:
    return ", ".join(str(row[name]) for name in names)


def lora_linear(result: dict[str, Any]) -> str:
    columns = ("floor", "stock", "patched", "stock compiled", "patched compiled")

    def row(row: dict[str, Any]) -> list[Any]:
        ms = row["milliseconds"]
        cells = [f"{ms[name]:.1f}" for name in columns]
        cells.insert(3, _ratio(ms, "patched", "stock"))
        tax = f"{ms['patched'] / ms['floor'] - 1:.0%}, {ms['stock'] / ms['floor'] - 1:.0%}"
        return [_shape(row, "MKNR"), row["dropout"], *cells, _ratio(ms, "patched compiled", "stock compiled"), tax]

    header = ["M, K, N, R", "dropout", "floor", "stock", "patched", "ratio", "stock, compiled", "patched, compiled"]
    return markdown([*header, "ratio", "tax: patched, stock"], map(row, result["rows"]))


def bottleneck_adapter(result: dict[str, Any]) -> str:
    columns = ("usual", "ours", "usual compiled", "ours compiled")

    def row(row: dict[str, Any]) -> list[Any]:
        ms = row["milliseconds"]
        cells = [f"{ms[name]:.1f}" for name in columns]
        cells.insert(2, _ratio(ms, "ours", "usual"))
        cells += [_ratio(ms, "ours compiled", "usual compiled"), _ratio(row["saved_bytes"], "ours", "usual")]
        return [_shape(row, "MKR"), row["dropout"], row["norm"], *cells]

    header = ["M, K, R", "dropout", "norm", "usual", "ours", "ratio", "usual, compiled", "ours, compiled", "ratio"]
    return markdown([*header, "bytes"], map(row, result["rows"]))


def prefix_attention(result: dict[str, Any]) -> str:
    def row(row: dict[str, Any]) -> list[Any]:
        ms, flags = row["milliseconds"], ("yes" if row[name] else "no" for name in ("causal", "padded"))
        times = (f"{ms['peft']:.1f}", f"{ms['ours']:.1f}", _ratio(ms, "ours", "peft"))
        return [", ".join(map(str, row["shape"])), *flags, *times, _ratio(row["saved_bytes"], "ours", "peft")]

    header = ["Z, H, H_KV, S, P, DH", "causal", "padded", "PEFT's way", "ours", "ratio", "bytes"]
    return markdown(header, map(row, result["rows"]))


def finetune(result: dict[str, Any]) -> str:
    columns = ("floor", "full", "stock", "patched", "ours", "stock compiled", "patched compiled", "ours compiled")

    def row(row: dict[str, Any]) -> list[Any]:
        ms = row["milliseconds"]
        cells = [f"{ms[name]:.0f}" if name in ms else "" for name in columns]
        return [row["model"], row["method"], *cells, _ratio(ms, "patched", "stock"),
                _ratio(row["saved_bytes"], "patched", "stock")]  # fmt: skip

    header = ["model", "method", *(name.replace(" compiled", ", compiled") for name in columns), "ratio", "bytes"]
    return markdown(header, map(row, result["rows"]))


_LAYER = "M=8192 K=4096 N=4096 R=16 factors=fp32 dropout=0.1"


def traffic(result: dict[str, Any]) -> str:
    names = {
        "floor": "frozen layer alone",
        "stock": "stock PEFT",
        "stock compiled": "stock, compiled",
        "split": "ours, `split` (the default)",
        "fused": "ours, `fused`",
    }
    rows = [row for row in result["rows"]["layers"] if row["shape"] == _LAYER and row["chip"] == "sm_90"]
    return markdown(
        ["", "launches", "MB moved", "of stock", "MB saved for backward"],
        (
            [
                names[row["variant"]],
                row["launches"],
                f"{row['moved'] / 1e6:.0f}",
                f"{row['moved_over_stock']:.2f}",
                f"{row['saved'] / 1e6:.0f}" if row.get("saved") is not None else "",
            ]
            for row in sorted(rows, key=lambda row: list(names).index(row["variant"]))
        ),
    )


def roofline(result: dict[str, Any]) -> str:
    """Of whole models: the best of our plans."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for row in result["rows"]["modelled_models"]:
        if row["variant"] not in ("floor", "stock"):
            cells = rows.setdefault((row["kind"], row["shape"]), {})
            ratio = row["modelled_ratio_to_stock"]
            cells[row["device"]] = min(ratio, cells.get(row["device"], ratio))
    devices = list(dict.fromkeys(device for cells in rows.values() for device in cells))
    return markdown(
        ["*modelled* time over stock", *devices],
        (
            [f"{kind} ({shape})", *(f"{cells[device]:.2f}" for device in devices)]
            for (kind, shape), cells in rows.items()
        ),
    )


def gpu(result: dict[str, Any]) -> str:
    """One row a case: what a step takes, by stock (peft's, or the usual modules) and by ours, and ours over stock's."""

    def cell(variant: dict[str, Any] | None) -> str:
        return f"{variant['milliseconds']:.3f}" if variant else ""

    def over(ours: dict[str, Any] | None, stock: dict[str, Any] | None, key: str) -> str:
        known = ours and stock and ours.get(key) and stock.get(key)
        return f"{ours[key] / stock[key]:.2f}" if known else ""

    def name_of(row: dict[str, Any]) -> str:
        what = f"{row['what']}, {row.get('method') or ', '.join(map(str, row['shape']))}"
        return what + "".join(f", {name} {row[name]}" for name in ("dropout", "norm", "causal") if name in row)

    lines = []
    for row in result["rows"]:
        variants = row["variants"]
        stock, ours = (
            next((name for name in names if name in variants), "")
            for names in (("stock", "usual", "peft"), ("patched", "ours"))
        )
        one, two = variants.get(stock), variants.get(ours)
        compiled = variants.get(f"{stock} compiled") or variants.get("flex compiled")
        lines.append([
            name_of(row),
            *map(cell, (variants.get("floor"), one, two)),
            over(two, one, "milliseconds"),
            over(two, one, "device_milliseconds"),
            *map(cell, (compiled, variants.get(f"{ours} compiled"))),
            over(two, one, "peak_bytes"),
        ])  # fmt: skip
    times = ["floor", "stock", "ours", "ratio", "on the GPU alone", "compiled stock", "compiled ours"]
    missing: dict[str, list[str]] = {}
    for row in result["missing"]:
        missing.setdefault(row["reason"], []).append(name_of(row))
    notes = [f"{reason[0].upper()}{reason[1:]}: {'; '.join(names)}." for reason, names in missing.items()]
    return markdown(["", *times, "peak memory"], lines) + "".join(f"\n{textwrap.fill(note, 120)}\n" for note in notes)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "lora-linear": ("lora-linear-cpu", lora_linear),
    "bottleneck-adapter": ("bottleneck-adapter-cpu", bottleneck_adapter),
    "prefix-attention": ("prefix-attention-cpu", prefix_attention),
    "finetune": ("finetune-cpu", finetune),
    "traffic": ("traffic", traffic),
    "roofline": ("roofline", roofline),
}


def table(name: str) -> str:
    if name == "gpu":
        results = on_gpus()
        return "".join(f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {result['date']}:\n\n"
                       f"{gpu(result)}\n" for result in results) or "Not measured on a GPU yet.\n"  # fmt: skip
    file, render = TABLES[name]
    result = newest(file)
    if result is None:
        raise SystemExit(f"a page asks for table {name!r}, but there is no {file}-DATE.json in {RESULTS}")
    return render(result)


def rendered(text: str) -> str:
    """A page with its tables made from the results."""
    return _BLOCK.sub(lambda block: block[1] + table(block[2]) + block[3], text)


def bars(axes: Any, labels: list[str], values: dict[str, list[float | None]], title: str) -> None:
    """Groups of horizontal bars, the first label on top."""
    height = 0.8 / len(values)
    colours = dict(zip(values, (GREY, ORANGE, BLUE, "C2", "C4", "C5", "C6"), strict=False))
    for i, (name, each) in enumerate(values.items()):
        places = [place + i * height for place, value in enumerate(each) if value is not None]
        axes.barh(places, [value for value in each if value is not None], height, label=name, color=colours[name])
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def draw() -> list[Path]:
    """The plots that the results allow, as PNG beside them."""
    from matplotlib.figure import Figure

    drawn = []

    def save(figure: Figure, name: str) -> None:
        drawn.append(RESULTS / name)
        figure.savefig(drawn[-1], dpi=130)

    layers = newest("lora-linear-cpu")
    if layers:
        rows = layers["rows"]
        labels = [f"{_shape(row, 'MKNR')}, dropout {row['dropout']}" for row in rows]
        figure = Figure(figsize=(8, 6), layout="constrained")
        over = {
            name: [row["milliseconds"][name] / row["milliseconds"]["stock"] for row in rows]
            for name in ("stock", "patched", "floor")
        }
        bars(figure.subplots(), labels, over, f"One LoRA layer, time over stock PEFT, measured: {layers['device']}")
        save(figure, "time-ratios.png")
    steps = newest("finetune-cpu")
    if steps:
        rows = [row for row in steps["rows"] if "stock" in row["saved_bytes"]]
        labels = [f"{row['model']}, {row['method']}" for row in rows]
        figure = Figure(figsize=(12, 5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key, what in ((left, "milliseconds", "time"), (right, "saved_bytes", "bytes saved for backward")):
            over = {
                name: [row[key][name] / row[key]["stock"] for row in rows] for name in ("stock", "patched", "floor")
            }
            bars(axes, labels, over, f"Whole step, {what} over stock PEFT, measured")
        right.invert_yaxis()  # the shared axis was turned twice
        save(figure, "finetune.png")
    counted = newest("traffic")
    if counted:
        rows = [row for row in counted["rows"]["designed"] if row["chip"] == "sm_90"]
        figure = Figure(figsize=(8, 3), layout="constrained")
        values = {
            "designed": [row["designed"] / 1e6 for row in rows],
            "counted": [row["counted"] / 1e6 if "counted" in row else None for row in rows],
        }
        title = "One LoRA layer, M=8192, K=N=4096, R=16, bf16: millions of elements moved"
        bars(figure.subplots(), [row["variant"] for row in rows], values, title)
        save(figure, "traffic.png")
    for result in on_gpus():
        rows = [row for row in result["rows"] if row["what"] == "LoRA linear"]
        names = list(dict.fromkeys(name for row in rows for name in row["variants"]))
        labels = [f"{tuple(row['shape'])}, dropout {row['dropout']}" for row in rows]
        over = {
            name: [row["variants"][name]["milliseconds"] / row["variants"]["stock"]["milliseconds"] for row in rows]
            for name in names
        }
        figure = Figure(figsize=(8, 8), layout="constrained")
        bars(figure.subplots(), labels, over, f"One LoRA layer, time over stock PEFT, measured: {result['device']}")
        save(figure, re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-") + ".png")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 where a page is behind")
    behind = [page for page in PAGES if rendered(text := page.read_text()) != text]
    if parser.parse_args().check:
        sys.exit(f"run `python -m benchmarks.report`: {', '.join(map(str, behind))}" if behind else 0)
    for page in behind:
        page.write_text(rendered(page.read_text()))
    print(*PAGES, *draw(), sep="\n")


if __name__ == "__main__":
    main()

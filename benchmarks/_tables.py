"""How tables are printed and rows written."""

import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def table(title: str, rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> None:
    """Print rows under a title, columns aligned."""
    cells = [list(columns), *([str(column(row)) for column in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write(path: Path, rows: Any) -> None:
    packages = ("torch", "triton", "transformers", "peft")
    versions = {name: importlib.metadata.version(name) for name in packages}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), **versions, "rows": rows}, indent=1) + "\n")

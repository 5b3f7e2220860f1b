"""The benchmarks run, at tiny sizes on the CPU: on the day of a GPU they must not fail for a silly reason."""

import json
import shutil
import sys

import pytest
import torch

from benchmarks import bench_gpu, report

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = list(bench_gpu.rows_of("cpu", torch.float32, True))


@pytest.mark.parametrize(("row", "build"), ROWS, ids=["-".join(map(str, row.values())) for row, _ in ROWS])
def test_rows_of_the_gpu_benchmark(row, build):
    steps = {name: run for name, run in build().items() if "compiled" not in name}
    assert len(steps) >= 2
    measured = bench_gpu.measure(steps, "cpu", 1)
    assert all(value["milliseconds"] > 0 for value in measured.values())


def test_what_the_gpu_benchmark_writes(monkeypatch, tmp_path):
    """A row that the time does not reach, the memory not hold, or that fails, is written down as missing."""

    def build(fails: bool) -> bench_gpu.Steps:
        if fails:
            raise torch.cuda.OutOfMemoryError("Tried to allocate 1 GiB.\nMore.")
        return {"ours": lambda: None}

    rows = [({"what": "a", "shape": (1,)}, lambda: build(False)), ({"what": "b", "shape": (2,)}, lambda: build(True))]
    monkeypatch.setattr(bench_gpu, "rows_of", lambda *arguments: iter(rows))
    path = tmp_path / "new" / "result.json"
    late = ["not measured: the time was up"] * 2
    for seconds, missing in (("60", ["Tried to allocate 1 GiB."]), ("-1", late)):
        monkeypatch.setattr(sys, "argv", ["bench_gpu", "--rehearse", "--json", str(path), "--seconds", seconds])
        bench_gpu.main()
        written = json.loads(path.read_text())
        assert len(written["rows"]) + len(written["missing"]) == 2
        assert all(row["reason"].startswith(reason) for row, reason in zip(written["missing"], missing, strict=True))
        assert {"device", "date", "torch", "triton", "transformers", "peft"} <= written.keys()

    def broken() -> bench_gpu.Steps:
        raise ValueError("no such layer")

    rows.insert(0, ({"what": "c", "shape": (3,)}, broken))
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--rehearse", "--json", str(path)])
    with pytest.raises(SystemExit, match="1 rows failed"):
        bench_gpu.main()
    written = json.loads(path.read_text())
    assert written["missing"][0]["reason"] == "failed: ValueError: no such layer"
    assert len(written["rows"]) == 1


def test_the_gpu_benchmark_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_gpu.main()


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.parent.name)
def test_the_pages_have_the_tables_of_the_results(page):
    text = page.read_text()
    assert text.count("<!-- table: ") == len(report._BLOCK.findall(text)) > 0
    assert report.rendered(text) == text


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the results with one of a GPU."""
    shutil.copytree(report.RESULTS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    times = {"floor": 1.0, "stock": 4.0, "patched": 2.0, "stock compiled": 3.0, "patched compiled": 2.0}
    times |= {"kernels, split": 1.5, "kernels, fused": 1.5}
    variants = {
        name: {"milliseconds": ms, "device_milliseconds": ms / 2, "peak_bytes": 2**20} for name, ms in times.items()
    }
    del variants["floor"]["device_milliseconds"]
    rows = [{"what": "LoRA linear", "shape": [64, 32, 32, 8], "dropout": 0.1, "variants": variants}]
    missing = [{"what": "BERT", "method": "prefix", "reason": "not measured: the time was up"}]
    about = {"device": "A GPU", "date": "2026-01-02", "torch": "2.13", "triton": "3.7"}
    (tmp_path / "a-gpu-2026-01-02.json").write_text(json.dumps(about | {"rows": rows, "missing": missing}))
    older = [{**rows[0], "dropout": 0.5}]
    (tmp_path / "a-gpu-2026-01-01.json").write_text(json.dumps(about | {"rows": older, "missing": []}))
    return tmp_path


def test_the_table_of_a_gpu(results):
    text = report.table("gpu")
    assert "A GPU, torch 2.13, triton 3.7, 2026-01-02" in text
    assert (
        "| LoRA linear, 64, 32, 32, 8, dropout 0.1 | 1.000 | 4.000 | 2.000 | 0.50 | 0.50 | 3.000 | 2.000 | 1.00 |"
        in text
    )
    assert "Not measured: the time was up: BERT, prefix.\n" in text
    assert "0.5 |" not in text


def test_plots(results):
    drawn = report.draw()
    assert {"time-ratios.png", "traffic.png", "a-gpu.png"} <= {path.name for path in drawn}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_table_without_results():
    with pytest.raises(KeyError):
        report.table("nothing")
    assert report.newest("nothing") is None

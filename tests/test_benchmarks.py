"""The benchmarks run, at tiny sizes on the CPU: on the day of a GPU they must not fail for a silly reason."""

import json
import sys

import pytest
import torch

from benchmarks import bench_gpu

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
    """A row that the time does not reach, or the memory not hold, is written down as missing."""

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


def test_the_gpu_benchmark_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_gpu.main()

"""The file of measured times: damaged, foreign, unwritable, written by many at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_fast import tuning_file

ABOUT = {"device": "Some GPU (80 GB)", "capability": "9.0", "torch": "2.13.0+cu130", "triton": "3.7.1", "kernels": "ab"}
SHAPE = "lora_linear M=64 K=32 N=32 R=8 bfloat16 float32"
TIMES = {"eager": 2.0, "split": 1.0}


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_file, "_read", {})
    tuning_file.warn.cache_clear()
    return tuning_file.path_of(ABOUT)


def test_what_is_kept_is_read_again(path, monkeypatch):
    assert tuning_file.results(ABOUT) == {}
    tuning_file.keep(ABOUT, {SHAPE: TIMES})
    tuning_file.keep(ABOUT, {"another": TIMES})
    monkeypatch.setattr(tuning_file, "_read", {})  # as a new process
    assert tuning_file.results(ABOUT) == {SHAPE: TIMES, "another": TIMES}
    assert path.name == "some-gpu-80-gb-9.0-2.13.0-cu130-3.7.1-ab.json"
    assert len(json.loads(path.read_text())["date"]) == 10
    assert {file.suffix for file in path.parent.iterdir()} == {".json", ".lock"}  # no temporary file is left


@pytest.mark.parametrize("change", ABOUT)
def test_another_device_or_version_has_another_file(path, change):
    assert tuning_file.path_of(ABOUT | {change: "other"}) != path


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning_file.folder() == tmp_path / "cache"
    monkeypatch.delenv("PEFT_FAST_CACHE")
    assert tuning_file.folder() == tmp_path / "xdg" / "peft_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning_file.folder() == tmp_path / ".cache" / "peft_fast"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    assert tuning_file.folder().is_absolute()


def written(times: object = TIMES, about: object = ABOUT) -> str:
    return json.dumps({"about": about, "milliseconds": {SHAPE: times}})


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param(written()[:-9], id="cut off"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param("[]", id="a list"),
        pytest.param(json.dumps({"about": ABOUT}), id="no times"),
        pytest.param(json.dumps({"about": ABOUT, "milliseconds": [1]}), id="times without shapes"),
        pytest.param(written(about=ABOUT | {"device": "Another GPU"}), id="foreign device"),
        pytest.param(written(times=3.0), id="one time"),
        pytest.param(written(times={"eager": "fast"}), id="a word"),
        pytest.param(written(times={"eager": -1.0}), id="negative"),
        pytest.param(written(times={"eager": float("nan")}), id="not a number"),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(path, content):
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="damaged or foreign and is ignored"):
        assert tuning_file.results(ABOUT) == {}
    assert tuning_file.results(ABOUT) == {}  # warns once
    tuning_file.keep(ABOUT, {SHAPE: TIMES})
    assert tuning_file.results(ABOUT) == {SHAPE: TIMES}


def test_what_another_process_writes_is_seen(path):
    tuning_file.keep(ABOUT, {SHAPE: TIMES})
    assert tuning_file.results(ABOUT) == {SHAPE: TIMES}
    other = path.with_suffix(".other")
    other.write_text(written(times={"eager": 1.0, "split": 2.0}))
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)  # within the clock's step
    os.replace(other, path)
    assert tuning_file.results(ABOUT)[SHAPE]["eager"] == 1.0


def test_a_folder_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFT_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="for this process only"):
        tuning_file.keep(ABOUT, {SHAPE: TIMES})
    tuning_file.keep(ABOUT, {"another": TIMES})
    assert tuning_file.results(ABOUT) == {}


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch, path):
    tuning_file.keep(ABOUT, {SHAPE: TIMES})
    before = path.read_text()

    def full(path, text, **options):
        write_text(path, text[: len(text) // 2], **options)
        raise OSError("no space left on device")

    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="no space left"):
        tuning_file.keep(ABOUT, {"another": TIMES})
    assert path.read_text() == before
    assert {file.suffix for file in path.parent.iterdir()} == {".json", ".lock"}


# Alone, since the module needs nothing of the package: a process starts in no time.
_WRITER = """
import importlib.util, json, sys, warnings
warnings.simplefilter("error")  # a reader that meets half a file
spec = importlib.util.spec_from_file_location("tuning_file", sys.argv[1])
tuning_file = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tuning_file)
about = json.loads(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    tuning_file.keep(about, {f"{sys.argv[3]} {i}": {"eager": 2.0, "split": 1.0}})
    tuning_file.results(about)
"""


def start_writer(name: str) -> subprocess.Popen:
    command = [sys.executable, "-c", _WRITER, str(Path(tuning_file.__file__)), json.dumps(ABOUT), name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_processes_that_write_at_once_lose_nothing():
    writers = [start_writer(name) for name in "abc"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    assert tuning_file.results(ABOUT).keys() == {f"{name} {i}" for name in "abc" for i in range(40)}


def test_a_lock_that_is_never_given_back_stops_nobody(monkeypatch, path):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tuning_file, "LOCK_SECONDS", 0.05)
    path.parent.mkdir()
    with open(path.with_suffix(".lock"), "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        tuning_file.keep(ABOUT, {SHAPE: TIMES})
    assert tuning_file.results(ABOUT) == {SHAPE: TIMES}

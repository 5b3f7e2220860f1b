"""The file of measured times: one for each device and versions, in the user's cache folder, shared by processes.

    {"about": {"device": ..., "torch": ..., ...}, "date": ..., "milliseconds": {shape: {plan: time}}}

Whoever reads it sees it as it was before or after a write, never in between, and what others wrote meanwhile is kept.
A file that is damaged or about something else is ignored with a warning, and replaced by the next write.
"""

import contextlib
import functools
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK_SECONDS = 10.0

Times = dict[str, float]  # plan -> median milliseconds of a step

_read: dict[Path, tuple[Any, dict[str, Times]]] = {}  # what a file held, and when


def folder() -> Path:
    """`$PEFT_FAST_CACHE`, else `$XDG_CACHE_HOME/peft_fast`, else `~/.cache/peft_fast`."""
    named = os.environ.get("PEFT_FAST_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base if os.path.isabs(base) else tempfile.gettempdir(), "peft_fast")


def path_of(about: dict[str, str]) -> Path:
    """The file of what is about this device and these versions."""
    return folder() / (re.sub(r"[^\w.]+", "-", "-".join(about.values())).lower() + ".json")


def results(about: dict[str, str]) -> dict[str, Times]:
    """Shape -> times, as the file has them now; read again only where it has changed."""
    path = path_of(about)
    try:
        status = path.stat()
    except OSError:
        return {}
    stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
    if path not in _read or _read[path][0] != stamp:
        _read[path] = (stamp, _load(path, about))
    return _read[path][1]


def _load(path: Path, about: dict[str, str]) -> dict[str, Times]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["about"] != about:
            raise ValueError("it is of another device or other versions")
        results = content["milliseconds"]
        if not all(0 < milliseconds < math.inf for times in results.values() for milliseconds in times.values()):
            raise ValueError("a time is no positive number")
        return results
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        warn(f"{path} is damaged or foreign and is ignored: {type(error).__name__}: {error}")
        return {}


def keep(about: dict[str, str], new: dict[str, Times]) -> None:
    """Add `new` results to the file; where the folder cannot be written, warn."""
    path = path_of(about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(path.with_suffix(".lock")):
            known = _load(path, about) if path.exists() else {}
            content = {"about": about, "date": time.strftime("%Y-%m-%d"), "milliseconds": known | new}
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                new_path = Path(scratch, path.name)
                new_path.write_text(json.dumps(content, indent=1), encoding="utf-8")
                os.replace(new_path, path)
    except OSError as error:
        warn(f"what was measured is kept for this process only: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that processes share, or go on without it after a while: all that may be lost is measured again."""
    with open(path, "a") as file:
        for _ in range(int(100 * LOCK_SECONDS)):
            try:
                import fcntl  # not on Windows

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except (ImportError, OSError):  # or a file system without locks
                break
        yield


@functools.cache
def warn(text: str) -> None:
    """Once for each text."""
    warnings.warn(f"peft_fast: {text}", stacklevel=2)

"""What the tests of tuning share: a process that has measured nothing, and a table in place of a device to time."""

import functools

import pytest
import torch
from torch import nn

from peft_fast import tuning, tuning_file

ABOUT = {"device": "Some GPU", "capability": "9.0", "torch": "2", "triton": "3", "kernels": "ab"}
CPU = torch.device("cpu")
STOCK_WINS = {"eager": 1.0, "split": 2.0, "fused": 3.0}
SPLIT_WINS = {"eager": 3.0, "split": 1.0, "fused": 2.0}
FUSED_WINS = {"eager": 3.0, "split": 2.0, "fused": 1.0}
TILE_WINS = {"eager": 3.0, "split": 2.0, "fused": 1.5, "fused 64x128": 1.0}


@pytest.fixture(autouse=True)
def cold(monkeypatch, tmp_path):
    """A process that has measured nothing yet, on a device without a file."""
    monkeypatch.setenv("PEFT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PEFT_FAST_TUNE", raising=False)
    monkeypatch.setattr(tuning, "device_and_versions", lambda device: ABOUT)
    forget(monkeypatch)


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_waiting", {})
    monkeypatch.setattr(tuning_file, "_read", {})
    tuning_file.warn.cache_clear()
    tuning._by_table.cache_clear()


class Timer:
    """Stands for the device: a step runs, or not where only its time matters, and takes what `times` says."""

    def __init__(self, monkeypatch, times=SPLIT_WINS, *, runs=False):
        self.times, self.trials, self.runs = times, [], runs
        steps = tuning._steps

        def named_steps(shape):
            self.trials.append(shape)
            real = steps(shape) if runs else dict.fromkeys(self.times)
            return {plan: functools.partial(self.step, plan, real[plan]) for plan in self.times}

        monkeypatch.setattr(tuning, "_steps", named_steps)
        monkeypatch.setattr(tuning, "_milliseconds", self.milliseconds)
        monkeypatch.setattr(tuning, "WARM_RUNS", 1)
        monkeypatch.setattr(tuning, "ROUNDS", 1)

    def milliseconds(self, step, stream):
        step()
        return self.times[step.args[0]]

    def step(self, plan, real):
        results = real() if real else ()
        if isinstance(self.times[plan], Exception):
            raise self.times[plan]
        return results


def choose(M=64, K=32, N=48, R=4, *, dropout=False, measure=True, dtype=torch.bfloat16, factor_dtype=torch.float32):
    x, weight = torch.zeros(M, K, dtype=dtype), torch.zeros(N, K, dtype=dtype)
    return tuning.choose(x, weight, torch.zeros(R, K, dtype=factor_dtype), dropout, measure=measure)


def spy(monkeypatch, owner, name):
    """A list of what `owner.name` returns from now on."""
    results, function = [], getattr(owner, name)

    def watched(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, watched)
    return results


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 48)

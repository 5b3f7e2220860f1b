import functools
import importlib.util
import os

import pytest
import torch
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    # Triton reads it when the kernels are defined: before any test imports them.
    os.environ["TRITON_INTERPRET"] = "1"


def add_rows_as_devices_do() -> None:
    """A device adds the rows of a block as a tree; the interpreter adds one after the other, which rounds far more."""
    from triton.runtime.interpreter import ReduceOps

    add = ReduceOps.sum

    def add_rows(self, input):
        values = input.handle.data
        if self.axis != 0 or values.ndim == 1 or self.keep_dims:
            return add(self, input)
        while len(values) > 1:  # blocks are powers of 2
            values = values[: len(values) // 2] + values[len(values) // 2 :]
        return self.to_tensor(values[0], input.dtype)

    ReduceOps.sum = add_rows


def patch_the_language_once_a_launch() -> None:
    """A launch puts the interpreter's functions in the place of `triton.language`'s and takes them back at its end.

    Each call of a device function in between would do so again, which took half of the time.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # an older Triton, which never takes them back
        return
    patch = interpreter._patch_lang

    @functools.cache
    def languages(fn):
        visible = [interpreter.tl, interpreter.tl.core]
        return [value for value in fn.__globals__.values() if any(value is language for language in visible)]

    def patch_once(fn):
        if any(is_builtin(language.load) for language in languages(fn)):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def look_each_dtype_up_once() -> None:
    """The interpreter makes a table of all dtypes whenever it asks for one, 7% of the time of LoRA's tests."""
    from triton.runtime import interpreter

    look_up, found = interpreter._get_np_dtype, {}

    def look_up_once(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    interpreter._get_np_dtype = look_up_once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    add_rows_as_devices_do()
    patch_the_language_once_a_launch()
    look_each_dtype_up_once()

# On a GPU each shape of a test would be measured, and the user's file of times read and written.
os.environ["PEFT_FAST_TUNE"] = "0"

# torch keeps the set of functions that `with torch.device(...)` acts on from its first use. It must not be made while
# `poisoned_empty` stands in for some of them: they would act on the CPU in all later tests.
_device_constructors()

from peft_fast import support  # noqa: E402, with Triton's mode chosen

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def one_thread():
    """For models that are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_lora_calls_are_fused(monkeypatch):
    """As the large ones that the small ones of tests stand for; on the CPU they would be torch's usual calls."""
    monkeypatch.setattr(support, "MIN_CPU_ELEMENTS", 0)
    monkeypatch.setattr(support, "MIN_CPU_DROPOUT_ELEMENTS", 0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Uninitialised floating-point memory holds NaN, so that reading it shows."""

    def poisoned(make):
        @functools.wraps(make)
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            return tensor

        return wrapper

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

"""What the ops share around their autograd functions."""

import contextlib
import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("peft_fast", "FRAGMENT")


def _digest() -> str:
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


# What the ops that torch.compile traces into take as their last argument, `code`. torch keeps what it traced on disk,
# under the graph that it was given, where such an op is a mere name: an older version of this package would run on.
CODE = _digest()


def kernels(name: str) -> Any:
    """A module of Triton kernels, imported when first launched: the package works where Triton is absent."""
    return importlib.import_module(f"peft_fast.kernels.{name}")


def resolve(*arguments: Any) -> list[Any]:
    """Kernels read storage as it is, so a pending minus sign of a tensor is carried out first."""
    return [argument.resolve_neg() if isinstance(argument, Tensor) else argument for argument in arguments]


def rows(tensor: Tensor) -> Tensor:
    """All but the last dimension as one, also where the last has no elements."""
    if tensor.dim() == 2:
        return tensor
    width = tensor.shape[-1]
    return tensor.reshape(-1 if width else tensor.shape[:-1].numel(), width)


def as_tensor(scaling: float | Tensor, like: Tensor) -> Tensor:
    """`scaling` as a 0-d tensor: as a float of a schema each value would compile the graph again.

    A product rather than `full`, which a compiler would specialise as well.
    """
    if isinstance(scaling, Tensor):
        return scaling
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.ones((), dtype=wide, device=like.device) * scaling


def fit(parameter: Any, dtype: torch.dtype) -> Tensor:
    """As an op takes a parameter beside activations of `dtype`: in that dtype, or in float32 beside 16 bits."""
    beside = parameter.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16)
    return parameter if beside else parameter.to(dtype)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """For what computes in the types of its arguments: backward too may be called inside an autocast region."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def saved_tensors(ctx: Any, op: str) -> tuple[Tensor | None, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{op}: a tensor saved for backward was changed in place after that. If it is the layer's input x or what "
            "it returned, change a copy of it, or take this model back with peft_fast.unpatch(model); if it is a "
            "parameter, run backward before optimizer.step()."
        ) from error


def misfit(op: str, what: str, expected: str, tensors: dict[str, Tensor]) -> str:
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return f"{op}: {what} does not fit: expected {expected}, got {found}"


def dtypes(op: str, rule: str, tensors: dict[str, Tensor]) -> str:
    found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
    return f"{op}: {rule}, got {found}"

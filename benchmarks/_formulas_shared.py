"""What the closed forms of all kernels share."""

from typing import Any

import torch
from torch import Tensor

# Bytes of what a dropout mask is drawn from; each tile of a mask reads it.
SEED = 8

Cost = tuple[int, int, int, int]  # bytes read, written and asked for, operations


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.element_size()


def terms(a: torch.dtype, b: torch.dtype) -> int:
    """Products of `_tl.dot`."""
    return 1 if a == b else 3


def split_terms(a: torch.dtype, b: torch.dtype) -> int:
    """Products of `_tl.dot_split`."""
    return 6 if a == torch.float32 else terms(a, b)


def seed_bytes(a: Any) -> int:
    return SEED * (a.seed_ptr is not None)

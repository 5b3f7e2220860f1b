"""Plain PyTorch truth for every op. Imports torch only; a test, never a kernel, reads it.

Each function computes what its op computes, from ordinary differentiable torch calls in the order in which
stock peft makes them. Where an op takes a seed, its reference takes the `keep_mask` that the seed stands for.
"""

import torch.nn.functional as F
from torch import Tensor

DROPOUT_LEVELS = 1 << 16


def drop_threshold(dropout_p: float) -> int:
    """The number of the 2^16 values of a random word that drop an element: `dropout_p` quantised to 2^-16."""
    return min(round(dropout_p * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)


def keep_scale(threshold: int) -> float:
    """1 / (1 - p) for the quantised p, so that dropout keeps the expectation exactly."""
    return DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ, the LoRA linear layer (Hu et al. 2021, equation 3).

    Shapes: x (..., K), weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,), keep_mask like x; y (..., N).
    The base product is computed in x's dtype, the low-rank path in lora_a's, the sum in the wider of the two;
    y has the dtype of the base product.
    """
    base = F.linear(x, weight, bias)
    x = x.to(lora_a.dtype)
    if keep_mask is not None:
        x = x * keep_mask.to(x.dtype) * keep_scale(drop_threshold(dropout_p))
    return (base + F.linear(F.linear(x, lora_a), lora_b) * scaling).to(base.dtype)

"""What the tests of this package, and of code built on it, share: input factories and the one error budget."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, truth: Tensor, eager: Tensor, *, length: int, name: str = "result") -> None:
    """Hold `actual` to the error budget that eager torch's own error sets.

    Args:
        actual: what the op under test gave.
        truth: `reference` in float64 on the same inputs.
        eager: `reference` in the dtypes under test.
        length: the length L of the longest reduction behind one element, for the float64 bound.
        name: what the message calls `actual`.

    fp32, fp16, bf16: max|y - y64| <= 2 (max|y_eager - y64| + eps max|y64|).
    float64: max|y - y64| <= 4 eps sqrt(L) max|y64|. The result must be finite, of eager's shape and dtype.
    """
    assert actual.shape == eager.shape == truth.shape, (
        f"{name}: shape {tuple(actual.shape)}, eager's is {tuple(eager.shape)}, the truth's {tuple(truth.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager's is {eager.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    eps = torch.finfo(actual.dtype).eps
    scale = truth.abs().max().item()
    error = (actual.double() - truth).abs().max().item()
    if actual.dtype == torch.float64:
        budget = 4 * eps * math.sqrt(length) * scale
    else:
        budget = 2 * ((eager.double() - truth).abs().max().item() + eps * scale)
    assert error <= budget, f"{name}: error {error:.3e} exceeds the budget {budget:.3e} (largest value {scale:.3e})"


@dataclass
class LoraLinearInputs:
    """Tensors for one call of `lora_linear` and the gradient `dy` that flows into it."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scaling: float
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "LoraLinearInputs":
        """The same values in another dtype, detached."""
        tensors: dict[str, Any] = {
            name: None if value is None else value.detach().to(dtype)
            for name, value in vars(self).items()
            if name != "scaling"
        }
        return LoraLinearInputs(scaling=self.scaling, **tensors)


def lora_linear_inputs(
    M: int,
    K: int,
    N: int,
    R: int,
    *,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    scaling: float = 2.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> LoraLinearInputs:
    """Random inputs whose low-rank term is about as large as the base product, so that neither hides the other.

    x (M, K), weight (N, K), bias (N,) and dy (M, N) have `dtype`; lora_a (R, K) and lora_b (N, R) have
    `factor_dtype`, `dtype` where it is not given. The values depend on `seed` alone, not on the device.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
        return values.to(device=device, dtype=dtype)

    factor_dtype = factor_dtype or dtype
    return LoraLinearInputs(
        x=normal(M, K),
        weight=normal(N, K, std=K**-0.5),
        lora_a=normal(R, K, std=K**-0.5, dtype=factor_dtype),
        lora_b=normal(N, R, std=R**-0.5 / scaling, dtype=factor_dtype),
        bias=normal(N) if bias else None,
        scaling=scaling,
        dy=normal(M, N),
    )

"""Fused layers for code that does not use PEFT."""

import math

import torch
from torch import Tensor, nn

from peft_fast.ops.lora_linear import lora_linear


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update (Hu et al. 2021): y = base(x) + scaling · drop(x) Aᵀ Bᵀ.

    Args:
        base_layer: the `nn.Linear` to adapt, (N, K). It is kept, and its parameters are frozen.
        r: the rank R >= 1.
        lora_alpha: scaling is lora_alpha / r, with `use_rslora` lora_alpha / sqrt(r) (Kalajdzievski 2023).
        lora_dropout: the probability, in [0, 1), of dropping an element of x on the low-rank path in training.
        use_rslora: see lora_alpha.

    `lora_a` (R, K) starts as `nn.Linear` does and `lora_b` (N, R) as zeros, both in the base weight's dtype, so that
    the layer starts as `base_layer`. x is (..., K), y (..., N).

    Raises ValueError for another kind of layer, a rank below 1 or a dropout out of range.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        if type(base_layer) is not nn.Linear:  # a subclass may compute something else
            raise ValueError(f"base_layer: expected exactly nn.Linear, got {type(base_layer).__name__}")
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected a whole rank of at least 1, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: must lie in [0, 1), got {lora_dropout}")
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.merged = False
        weight = base_layer.weight
        self.lora_a = nn.Parameter(weight.new_empty(r, weight.shape[1]))
        self.lora_b = nn.Parameter(weight.new_zeros(weight.shape[0], r))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        return lora_linear(
            x,
            self.base_layer.weight,
            self.lora_a,
            self.lora_b,
            bias=self.base_layer.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update scaling · B A to the base weight; the layer then costs what the base layer costs."""
        if not self.merged:
            self.base_layer.weight += self._update()
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of the base weight again, up to rounding."""
        if self.merged:
            self.base_layer.weight -= self._update()
            self.merged = False

    def _update(self) -> Tensor:
        return (self.scaling * (self.lora_b.float() @ self.lora_a.float())).to(self.lora_a.dtype)

    def get_extra_state(self) -> dict[str, bool]:
        """Whether the saved base weight holds the update already."""
        return {"merged": self.merged}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        self.merged = state["merged"]

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, merged={self.merged}"

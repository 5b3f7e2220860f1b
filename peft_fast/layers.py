"""Fused layers for code that does not use PEFT."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import reference
from peft_fast.ops.bottleneck_adapter import bottleneck_adapter
from peft_fast.ops.lora_linear import lora_linear
from peft_fast.ops.prefix_attention import prefix_attention

ADAPTER_INITS = ("houlsby", "zero_up")
# Of 0.02, 0.5, 1 and 2 the one that learned best in 150 steps of AdamW at 0.03 on a small BERT (one seed), whose own
# keys and values have about 1.1 and 0.65; with 2 it did not learn.
PREFIX_STD = 0.5


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
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        return (self.scaling * (self.lora_b.to(wide) @ self.lora_a.to(wide))).to(self.lora_a.dtype)

    def get_extra_state(self) -> Tensor:
        """Whether the saved base weight holds the update already; a tensor, since safetensors holds nothing else."""
        return torch.tensor(self.merged)

    def set_extra_state(self, state: Tensor) -> None:
        self.merged = bool(state)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, merged={self.merged}"


class BottleneckAdapter(nn.Module):
    """A trainable bottleneck: y = residual + scaling · drop(act(x Wdᵀ + bd) Wuᵀ + bu) (Houlsby et al. 2019, section 2).

    Called with x alone it is the sequential adapter, whose residual is x; `adapter(x, residual=feed_forward(x))` is the
    parallel one (He et al. 2022, section 3.3).

    Args:
        in_features: K, the width of x.
        bottleneck_size: R >= 1.
        out_features: N, the width of y; in_features where not given.
        activation: see `ops.bottleneck_adapter`.
        scaling: a number, or "learned": a parameter that starts at 1.
        dropout: the probability, in [0, 1), of dropping an element of the adapter's output in training.
        norm_before, norm_after: whether there is a LayerNorm on x, and on the sum y.
        residual_after_norm: add the residual behind the second LayerNorm rather than before it.
        init: "houlsby", weights normal with standard deviation 0.01 cut at two of them; or "zero_up", `down_weight`
            as in `nn.Linear` and `up_weight` zero, so that the layer starts as y = residual. Biases are zero.

    x is (..., K), residual and y (..., N). Raises ValueError where an argument is out of range.
    """

    scaling: float | nn.Parameter

    def __init__(
        self,
        in_features: int,
        bottleneck_size: int,
        out_features: int | None = None,
        *,
        activation: str = "relu",
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        norm_before: bool = False,
        norm_after: bool = False,
        residual_after_norm: bool = False,
        init: str = "zero_up",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        for name, size in {"in_features": in_features, "out_features": out_features}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {size!r}")
        if not isinstance(bottleneck_size, int) or bottleneck_size < 1:
            raise ValueError(f"bottleneck_size: expected a whole number of at least 1, got {bottleneck_size!r}")
        if activation not in reference.ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
        if scaling != "learned" and not isinstance(scaling, (int, float)):
            raise ValueError(f'scaling: expected a number or "learned", got {scaling!r}')
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: must lie in [0, 1), got {dropout}")
        if init not in ADAPTER_INITS:
            raise ValueError(f"init: expected one of {', '.join(ADAPTER_INITS)}, got {init!r}")
        self.activation, self.dropout, self.residual_after_norm = activation, dropout, residual_after_norm
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down_weight = nn.Parameter(torch.empty(bottleneck_size, in_features, **options))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck_size, **options))
        self.up_weight = nn.Parameter(torch.zeros(out_features, bottleneck_size, **options))
        self.up_bias = nn.Parameter(torch.zeros(out_features, **options))
        self.scaling = nn.Parameter(torch.ones(1, **options)) if isinstance(scaling, str) else scaling
        self.norm_before = nn.LayerNorm(in_features, **options) if norm_before else None
        self.norm_after = nn.LayerNorm(out_features, **options) if norm_after else None
        init_adapter(self.down_weight, self.up_weight, init)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return bottleneck_adapter(
            x,
            self.down_weight,
            self.up_weight,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            activation=self.activation,
            scaling=self.scaling,
            residual=x if residual is None else residual,
            dropout_p=self.dropout if self.training else 0.0,
            norm_before=_parameters(self.norm_before),
            norm_after=_parameters(self.norm_after),
            residual_after_norm=self.residual_after_norm,
        )

    def extra_repr(self) -> str:
        (R, K), N = self.down_weight.shape, self.up_weight.shape[0]
        scaling = self.scaling if isinstance(self.scaling, (int, float)) else "learned"
        return f"{K} -> {R} -> {N}, activation={self.activation}, scaling={scaling}, dropout={self.dropout}"


def init_adapter(down_weight: Tensor, up_weight: Tensor, init: str) -> None:
    """Fill the weights of a bottleneck adapter, as `BottleneckAdapter` says of `init`."""
    if init == "houlsby":
        for weight in (down_weight, up_weight):
            nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
    else:
        nn.init.kaiming_uniform_(down_weight, a=math.sqrt(5))
        nn.init.zeros_(up_weight)


def _parameters(norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor] | None:
    return None if norm is None else (norm.weight, norm.bias)


class PrefixAttention(nn.Module):
    """Scaled dot-product attention over a trained prefix and the sequence (Li & Liang 2021, section 4.3).

    Args:
        num_heads: H, the query heads.
        head_dim: DH, the size of a head.
        num_virtual_tokens: P >= 1, the length of the prefix.
        num_key_value_heads: H_KV, of which H is a multiple; H where not given.
        dropout: the probability, in [0, 1), of dropping a weight of the softmax in training.
        gate: a softmax of its own for the prefix, times a trained factor for each head that starts at 0, so that the
            layer starts as attention without a prefix (Zhang et al. 2023, LLaMA-Adapter).

    `prefix_key` and `prefix_value` (H_KV, P, DH) start normal with a standard deviation of 0.5. Called as
    `attention(query, key, value)` with query (Z, H, S, DH), key and value (Z, H_KV, T, DH); gives (Z, H, S, DH). The
    keywords of a call are those of `ops.prefix_attention`: attn_mask, is_causal, scale, sliding_window, softcap.

    Raises ValueError where an argument is out of range.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_virtual_tokens: int,
        num_key_value_heads: int | None = None,
        *,
        dropout: float = 0.0,
        gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = num_heads if num_key_value_heads is None else num_key_value_heads
        sizes = {"num_heads": num_heads, "head_dim": head_dim, "num_virtual_tokens": num_virtual_tokens}
        for name, size in (sizes | {"num_key_value_heads": groups}).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {size!r}")
        if num_heads % groups:
            raise ValueError(f"num_heads: must be a multiple of num_key_value_heads, got {num_heads} and {groups}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: must lie in [0, 1), got {dropout}")
        self.dropout = dropout
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (groups, num_virtual_tokens, head_dim)
        self.prefix_key = nn.Parameter(torch.empty(shape, **options).normal_(std=PREFIX_STD))
        self.prefix_value = nn.Parameter(torch.empty(shape, **options).normal_(std=PREFIX_STD))
        self.gate = nn.Parameter(torch.zeros(num_heads, **options)) if gate else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return prefix_attention(
            query,
            key,
            value,
            self.prefix_key,
            self.prefix_value,
            gate=self.gate,
            dropout_p=self.dropout if self.training else 0.0,
            **options,
        )

    def extra_repr(self) -> str:
        H_KV, P, DH = self.prefix_key.shape
        return f"{H_KV} key-value heads of size {DH}, {P} virtual tokens, dropout={self.dropout}"

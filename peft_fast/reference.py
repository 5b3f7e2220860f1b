"""Plain PyTorch truth for every op. Imports torch only; a test, never a kernel, reads it.

Each function computes what its op computes, from ordinary differentiable torch calls in the order in which
stock peft makes them. Where an op takes a seed, its reference takes the `keep_mask` that the seed stands for.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

DROPOUT_LEVELS = 1 << 16

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": F.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda z: z,
}


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


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "relu",
    scaling: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,
    norm_before: tuple[Tensor, Tensor] | None = None,
    norm_after: tuple[Tensor, Tensor] | None = None,
    residual_after_norm: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """y = residual + scaling · drop(act(x Wdᵀ + bd) Wuᵀ + bu), the bottleneck adapter (Houlsby et al. 2019, section 2).

    Shapes: x (..., K), down_weight (R, K), down_bias (R,), up_weight (N, R), up_bias (N,), residual, keep_mask and y
    (..., N). `norm_before` and `norm_after` are the (weight, bias) of a LayerNorm on x, and on the sum, or where
    `residual_after_norm` on the scaled term alone. Computed in down_weight's dtype; y has x's.
    """
    h = x.to(down_weight.dtype)
    if norm_before is not None:
        h = F.layer_norm(h, h.shape[-1:], *norm_before, eps)
    h = F.linear(ACTIVATIONS[activation](F.linear(h, down_weight, down_bias)), up_weight, up_bias)
    if keep_mask is not None:
        h = h * keep_mask.to(h.dtype) * keep_scale(drop_threshold(dropout_p))
    if isinstance(scaling, Tensor):
        h = h * scaling.reshape(())  # which does not widen h
    elif scaling != 1:
        h = h * scaling
    if residual is not None and not residual_after_norm:
        h = residual + h
    if norm_after is not None:
        h = F.layer_norm(h, h.shape[-1:], *norm_after, eps)
    if residual is not None and residual_after_norm:
        h = residual + h
    return h.to(x.dtype)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,
) -> Tensor:
    """y = drop(softmax(scale · q [Kp; K]ᵀ + mask)) [Vp; V], attention over a prefix (Li & Liang 2021, section 4.3).

    Shapes: query and y (Z, H, S, DH), key and value (Z, H_KV, T, DH), prefix_key and prefix_value (H_KV, P, DH), the
    same for every sequence of the batch, keep_mask (Z, H, S, P + T) with the prefix first. Every query sees all of the
    prefix; `attn_mask` (bool, True = may attend, or additive), `is_causal` (key j is seen by query i where
    j <= i + T - S) and `sliding_window` (and j > i + T - S - sliding_window) concern the sequence alone. With
    `softcap` c, logits are c · tanh(logits / c). With `gate` (H,), prefix and sequence have a softmax each and the
    prefix's is multiplied by the gate (Zhang et al. 2023, equation 4). Computed in query's dtype, the softmax of 16-bit
    inputs in float32.
    """
    (Z, H, S, DH), (_, H_KV, T, _), P = query.shape, key.shape, prefix_key.shape[1]

    def with_prefix(prefix: Tensor, own: Tensor) -> Tensor:
        joint = torch.cat([prefix.to(own.dtype).expand(Z, -1, -1, -1), own], dim=2)
        return joint.repeat_interleave(H // H_KV, dim=1)

    logits = (query @ with_prefix(prefix_key, key).mT) * (DH**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    prefix, own = logits[..., :P], logits[..., P:]
    distance = torch.arange(S, device=query.device)[:, None] + (T - S) - torch.arange(T, device=query.device)
    if is_causal:
        own = own.masked_fill(distance < 0, -torch.inf)
    if sliding_window is not None:
        own = own.masked_fill(distance >= sliding_window, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        own = own.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        own = own + attn_mask.to(own.dtype)
    wide = torch.promote_types(query.dtype, torch.float32)
    if gate is None:
        weights = torch.cat([prefix, own], dim=-1).softmax(-1, dtype=wide)
    else:
        unseeing = (own == -torch.inf).all(-1, keepdim=True)  # their softmax is 0 / 0, and so would be its gradient
        own_weights = own.masked_fill(unseeing, 0).softmax(-1, dtype=wide).masked_fill(unseeing, 0)
        weights = torch.cat([prefix.softmax(-1, dtype=wide) * gate.to(wide)[:, None, None], own_weights], dim=-1)
    weights = weights.to(query.dtype)
    if keep_mask is not None:
        weights = weights * keep_mask.to(weights.dtype) * keep_scale(drop_threshold(dropout_p))
    return weights @ with_prefix(prefix_value, value)

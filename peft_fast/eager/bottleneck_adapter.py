"""The bottleneck adapter from ordinary torch calls: what runs on the CPU.

    z  = LN_before(x) Wdᵀ + bd                         (M, R)
    t  = mask ∘ (act(z) Wuᵀ + bu) / (1-p)              (M, N)
    y  = LN_after(residual + scaling · t)              or residual + LN_after(scaling · t)
    dv = LN_after's gradient, or dy                    dt = scaling · mask ∘ dv / (1-p)
    dz = act'(z) ∘ (dt Wu)   dWu = dtᵀ act(z)   dbu = Σ_M dt   dWd = dzᵀ LN_before(x)   dbd = Σ_M dz
    dx = LN_before's gradient of dz Wd, and the residual's

Kept from forward are x, z and the rows' statistics: what lies between is a product of M·R·N operations away, less than
the passes over the memory that it would take. Without dropout and LN_after no tensor of y's size is written but y:
the residual is where the matmul accumulates.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.eager.dropout import blocks_of, dropped_blocks
from peft_fast.eager.matmul import cast, narrow_mm, tall_mm, wide_dtype
from peft_fast.reference import ACTIVATIONS, keep_scale

Norm = tuple[Tensor, Tensor]

_aten = torch.ops.aten

# act'(z) ∘ da
ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda da, z: _aten.threshold_backward(da, z, 0),
    "gelu": _aten.gelu_backward,
    "gelu_new": lambda da, z: _aten.gelu_backward(da, z, approximate="tanh"),
    "silu": _aten.silu_backward,
    "tanh": lambda da, z: _aten.tanh_backward(da, torch.tanh(z)),
    "leaky_relu": lambda da, z: _aten.leaky_relu_backward(da, z, 0.01, False),
    "identity": lambda da, z: da,
}


def adapter_fwd(
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scaling: float | Tensor,
    norm_before: Norm | None,
    norm_after: Norm | None,
    threshold: int,
    seed: Tensor | None,
    *,
    activation: str,
    residual_after_norm: bool,
    eps: float,
    traced: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y (M, N), z (M, R) and the mean and rstd (2, M) of the rows before each norm, of x (M, K).

    Where calls are being recorded, `traced` names the plan whose mask op they take; elsewhere it is empty.
    """
    wide = wide_dtype(down_weight)
    h, stats_before, stats_after = cast(x, wide), None, None
    if norm_before is not None:
        h, stats_before = _norm(h, norm_before, eps)
    z = _linear(h, down_weight, down_bias)
    inside = None if residual is None or residual_after_norm else cast(residual, wide)
    y = _expand(z, up_weight, up_bias, scaling, inside, threshold, seed, activation, traced)
    if norm_after is not None:
        y, stats_after = _norm(y, norm_after, eps)
    if residual is not None and residual_after_norm:
        y = _add(y, cast(residual, wide), traced)
    return cast(y, x.dtype), z, stats_before, stats_after


def adapter_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scaling: float | Tensor,
    norm_before: Norm | None,
    norm_after: Norm | None,
    z: Tensor,
    stats_before: Tensor | None,
    stats_after: Tensor | None,
    threshold: int,
    seed: Tensor | None,
    *,
    activation: str,
    residual_after_norm: bool,
    eps: float,
    needs: set[str],
    traced: str = "",
) -> dict[str, Any]:
    """The gradients that `needs` names; those of a norm are a (weight, bias) pair.

    Where `residual` is x itself its gradient is part of x's.
    """
    wide = wide_dtype(down_weight)
    wide_dy, scale = cast(dy, wide), _number(scaling, traced)
    grads: dict[str, Any] = {}

    dv = wide_dy
    if norm_after is not None:
        inside = None if residual is None or residual_after_norm else cast(residual, wide)
        v = _expand(z, up_weight, up_bias, scaling, inside, threshold, seed, activation, traced)
        dv, grads["norm_after"] = _norm_grad(wide_dy, v, norm_after, stats_after)
    d_residual = wide_dy if residual_after_norm else dv
    grads["residual"] = d_residual

    dt, keep = dv, 1.0  # without scaling and 1 / (1-p)
    if threshold:
        dt, keep = _masked(dv, threshold, seed, traced), keep_scale(threshold)
    a, scale = ACTIVATIONS[activation](z), scale * keep
    if "up_weight" in needs:
        grads["up_weight"] = tall_mm(a, dt, traced).t() * scale
    if "up_bias" in needs or ("scaling" in needs and up_bias is not None):
        d_bias = dt.sum(0)
        grads["up_bias"] = d_bias * scale

    if needs & {"x", "down_weight", "down_bias", "scaling", "norm_before"}:
        if "scaling" in needs:
            da = torch.mm(dt, cast(up_weight, wide))
            of_bias = 0.0 if up_bias is None else (cast(up_bias, wide) * d_bias).sum()
            grads["scaling"] = ((a * da).sum() + of_bias) * keep
            da = da * scale
        else:
            da = narrow_mm(dt, cast(up_weight, wide), scale, traced)
        dz = ACTIVATION_GRADS[activation](da, z)
        if "down_bias" in needs:
            grads["down_bias"] = dz.sum(0)
        wide_down, h = cast(down_weight, wide), cast(x, wide)
        skip = d_residual if residual is x else None
        if norm_before is not None and needs & {"x", "norm_before"}:
            dx, grads["norm_before"] = _norm_grad(torch.mm(dz, wide_down), h, norm_before, stats_before)
            grads["x"] = dx if skip is None else _add(dx, skip, traced)
        elif "x" in needs:
            grads["x"] = torch.mm(dz, wide_down) if skip is None else torch.addmm(skip, dz, wide_down)
        if "down_weight" in needs:
            if norm_before is not None:
                h, _ = _norm(h, norm_before, eps)
            grads["down_weight"] = tall_mm(dz, h, traced)

    return {name: grads[name] for name in needs}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias in x's dtype."""
    return F.linear(x, cast(weight, x.dtype), bias if bias is None else cast(bias, x.dtype))


def _expand(
    z: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scaling: float | Tensor,
    residual: Tensor | None,
    threshold: int,
    seed: Tensor | None,
    activation: str,
    traced: str,
) -> Tensor:
    """residual + scaling · mask ∘ (act(z) Wuᵀ + bu) / (1-p), a new tensor (M, N)."""
    a, scale = ACTIVATIONS[activation](z), _number(scaling, traced)
    if traced:
        t = _linear(a, up_weight, up_bias)
        if threshold:
            ((_, dropped),) = blocks_of(seed, t.shape, threshold, t.dtype, traced)
            t, scale = dropped.masked(t), scale * keep_scale(threshold)
        return t * scale if residual is None else torch.add(residual, t * scale)
    if not threshold:
        if residual is None:
            return _linear(a, up_weight, up_bias).mul_(scale)
        weight = cast(up_weight, z.dtype)
        if up_bias is None:
            return torch.addmm(residual, a, weight.t(), alpha=scale)
        return torch.add(residual, cast(up_bias, z.dtype), alpha=scale).addmm_(a, weight.t(), alpha=scale)
    scale = scale * keep_scale(threshold)
    y = z.new_empty(z.shape[0], up_weight.shape[0])
    for rows, dropped in dropped_blocks(seed, y.shape, threshold):
        t = _linear(a[rows], up_weight, up_bias)
        dropped.mask_(t)
        if residual is None:
            torch.mul(t, scale, out=y[rows])
        else:
            torch.add(residual[rows], t, alpha=scale, out=y[rows])
    return y


def _masked(dv: Tensor, threshold: int, seed: Tensor | None, traced: str) -> Tensor:
    if traced:
        ((_, dropped),) = blocks_of(seed, dv.shape, threshold, dv.dtype, traced)
        return dropped.masked(dv)
    out = dv.clone(memory_format=torch.contiguous_format)
    for rows, dropped in dropped_blocks(seed, dv.shape, threshold):
        dropped.mask_(out[rows])
    return out


def _norm(x: Tensor, norm: Norm, eps: float) -> tuple[Tensor, Tensor]:
    """LN(x) and the mean and rstd of x's rows, (2, M)."""
    weight, bias = (cast(parameter, x.dtype) for parameter in norm)
    out, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)
    return out, torch.stack((mean.reshape(-1), rstd.reshape(-1)))


def _norm_grad(dy: Tensor, x: Tensor, norm: Norm, stats: Tensor) -> tuple[Tensor, Norm]:
    """The gradients of x and of the norm's weight and bias, of LN(x)."""
    weight, bias = (cast(parameter, x.dtype) for parameter in norm)
    mean, rstd = stats.view(2, -1, 1)
    dx, dweight, dbias = _aten.native_layer_norm_backward(
        dy, x, x.shape[1:], mean, rstd, weight, bias, (True, True, True)
    )
    return dx, (dweight, dbias)


def _add(a: Tensor, b: Tensor, traced: str) -> Tensor:
    return a + b if traced else a.add_(b)


def _number(scaling: Any, traced: str) -> Any:
    """A learned scaling on the CPU as a number, which a matmul takes as its alpha."""
    return scaling if traced or not isinstance(scaling, Tensor) else scaling.item()

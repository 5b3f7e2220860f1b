"""The bottleneck adapter with a LayerNorm on its sum with x, without dropout, from ordinary torch calls.

    z  = x Wdᵀ + bd            v  = x + scaling · (act(z) Wuᵀ + bu)      y = LN(v)
    dv = LN's gradient         dz = act'(z) ∘ (scaling · dv Wu)          dx = dv + dz Wd
    dWu = scaling · dvᵀ act(z)   dbu = scaling · Σ_M dv   dWd = dzᵀ x    dbd = Σ_M dz

LN's gradient needs v, which the usual modules keep beside x. Here v as a rule takes the place of x, since
dzᵀ x = dzᵀ v - scaling · ((dzᵀ act(z)) Wuᵀ + dbd ⊗ bu) are two small products more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.eager.bottleneck_adapter import ACTIVATION_GRADS
from peft_fast.eager.matmul import WIDE, cast, narrow_mm, tall_mm, wide_dtype
from peft_fast.reference import ACTIVATIONS

# Activations whose results give themselves again, and the gradient, stand for what they were made of.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "identity": lambda z: z}

# How large scaling · t may be, in deviations of a row of v, for v to take x's place.
LARGEST_TERM = 2.0


def norm_of_sum_fwd(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scaling: float,
    norm: Sequence[Tensor],
    *,
    activation: str,
    eps: float,
) -> tuple[Any, ...]:
    """Whether v takes x's place, y (M, K) of x (M, K), and what backward wants: z (M, R), mean and rstd (M, 1) of v's
    rows, v (M, K).
    """
    wide = wide_dtype(down_weight)
    h, down, up, weight, bias = (cast(t, wide) for t in (x, down_weight, up_weight, *norm))
    z = F.linear(h, down, None if down_bias is None else cast(down_bias, wide))
    a = IN_PLACE.get(activation, ACTIVATIONS[activation])(z)
    if up_bias is None:
        v = torch.addmm(h, a, up.t(), alpha=scaling)
    else:
        up_bias = cast(up_bias, wide)
        v = torch.add(h, up_bias, alpha=scaling).addmm_(a, up.t(), alpha=scaling)
    y, mean, rstd = torch.native_layer_norm(v, (v.shape[1],), weight, bias, eps)
    replaced = _takes_the_place(v, h, a, rstd, up, scaling)
    return replaced, cast(y, x.dtype), z, mean, rstd, v


def _takes_the_place(v: Tensor, x: Tensor, a: Tensor, rstd: Tensor, up_weight: Tensor, scaling: float) -> bool:
    """Whether x need not be kept beside v, since scaling · t is nowhere so large that dWd would round much more.

    Beside the smallest deviation of a row of v, no element of a few rows may be larger, nor, in any row, what a Wuᵀ is
    where its sums have terms of either sign.
    """
    if x.numel() == 0:
        return False
    (M, R), K, norm_of = a.shape, v.shape[1], torch.linalg.vector_norm
    step = (M // 8) | 1  # odd: not one place of each sequence
    largest = norm_of(v[::step] - x[::step], torch.inf).item()
    usual = norm_of(a, dim=1).amax().item() * norm_of(up_weight).item() / (R * K) ** 0.5
    bounded = LARGEST_TERM / rstd.amax().item()
    # Not where one is no number.
    return largest <= bounded and abs(scaling) * usual <= bounded


def norm_of_sum_bwd(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    v: Tensor,
    x: Tensor | None,
    down_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scaling: float,
    norm: Sequence[Tensor],
    *,
    activation: str,
    needs: Sequence[bool],
) -> list[Any]:
    """The gradients of x, Wd, bd, Wu, bu, scaling and of the norm's weight and bias, each only where `needs` asks.

    x is None where v has taken its place.
    """
    need_x, need_down, need_down_bias, need_up, need_up_bias, need_scaling, *need_norm = needs
    dtype, wide, (weight, bias), down, up = down_weight.dtype, v.dtype, norm, down_weight, up_weight
    dtype_of_x = dy.dtype
    if dtype is not wide or dtype_of_x is not wide:
        dy, down, up, weight, bias = (cast(t, wide) for t in (dy, down, up, weight, bias))
        up_bias, x = (t if t is None else cast(t, wide) for t in (up_bias, x))
    a = z if activation in IN_PLACE else ACTIVATIONS[activation](z)
    dv, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        dy, v, (v.shape[1],), mean, rstd, weight, bias, (True, *need_norm)
    )
    of_x = of_down = of_down_bias = of_up = of_up_bias = of_scaling = sum_dv = sum_dz = None
    if need_up:
        of_up = torch.mm(dv.t(), a) if a.shape[1] >= WIDE else tall_mm(a, dv, "").t().contiguous()
        of_up = of_up if scaling == 1 else of_up.mul_(scaling)
    if up_bias is not None and (need_up_bias or need_scaling):
        sum_dv = dv.sum(0)
    if need_x or need_down or need_down_bias or need_scaling:
        da = narrow_mm(dv, up, 1.0 if need_scaling else scaling, "")
        if need_scaling:
            of_scaling = (a * da).sum()
            if up_bias is not None:
                of_scaling += (up_bias * sum_dv).sum()
            da.mul_(scaling)
        dz = ACTIVATION_GRADS[activation](da, z)
        if need_down_bias or (need_down and x is None and up_bias is not None):
            sum_dz = dz.sum(0)
        if need_down:
            of_down = tall_mm(dz, v if x is None else x, "")
            if x is None:
                of_down.addmm_(torch.mm(dz.t(), a), up.t(), alpha=-scaling)
                if up_bias is not None:
                    of_down.addr_(sum_dz, up_bias, alpha=-scaling)
        if need_x:
            of_x = dv.addmm_(dz, down)
    if need_down_bias:
        of_down_bias = sum_dz
    if need_up_bias:
        of_up_bias = sum_dv if scaling == 1 else sum_dv.mul_(scaling)
    of_parameters = [of_down, of_down_bias, of_up, of_up_bias, of_scaling, of_weight, of_bias]
    if dtype is not wide:
        of_parameters = [grad if grad is None else grad.to(dtype) for grad in of_parameters]
    return [of_x if of_x is None else cast(of_x, dtype_of_x), *of_parameters]

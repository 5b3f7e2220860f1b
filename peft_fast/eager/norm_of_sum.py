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

# How large scaling · t may be beside x for v to take x's place: sums then round 1.2 times as much, 1.6 at worst.
SMALL_TERM = 0.5


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
) -> tuple[Tensor, ...]:
    """y (M, K) of x (M, K); v (M, K), z (M, R), and mean and rstd (M, 1) of v's rows."""
    wide = wide_dtype(down_weight)
    h, down, up, weight, bias = (cast(t, wide) for t in (x, down_weight, up_weight, *norm))
    z = F.linear(h, down, None if down_bias is None else cast(down_bias, wide))
    a = IN_PLACE.get(activation, ACTIVATIONS[activation])(z)
    if up_bias is None:
        v = torch.addmm(h, a, up.t(), alpha=scaling)
    else:
        v = torch.add(h, cast(up_bias, wide), alpha=scaling).addmm_(a, up.t(), alpha=scaling)
    y, mean, rstd = torch.native_layer_norm(v, (v.shape[1],), weight, bias, eps)
    return cast(y, x.dtype), v, z, mean, rstd


def takes_the_place(v: Tensor, x: Tensor) -> bool:
    """Whether x need not be kept beside v: scaling · t is small, as a few rows show.

    A row with a much larger one has a v as large, by which LN divides its gradient.
    """
    if x.numel() == 0:
        return False
    step, norm_of = -(-len(x) // 8), torch.linalg.vector_norm
    few = x[::step]
    return float(norm_of(v[::step] - few)) <= SMALL_TERM * float(norm_of(few))  # not where one is no number


def norm_of_sum_bwd(
    dy: Tensor,
    v: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
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
    wide = v.dtype
    down, up, weight, bias = (cast(t, wide) for t in (down_weight, up_weight, *norm))
    up_bias = None if up_bias is None else cast(up_bias, wide)
    a = z if activation in IN_PLACE else ACTIVATIONS[activation](z)
    dv, *of_norm = torch.ops.aten.native_layer_norm_backward(
        cast(dy, wide), v, (v.shape[1],), mean, rstd, weight, bias, (True, *need_norm)
    )
    of_x = of_down = of_down_bias = of_up = of_up_bias = of_scaling = None
    if need_up:
        of_up = torch.mm(dv.t(), a) if a.shape[1] >= WIDE else tall_mm(a, dv, "").t().contiguous()
    if need_up_bias or (need_scaling and up_bias is not None):
        of_up_bias = dv.sum(0)
    if need_x or need_down or need_down_bias or need_scaling:
        da = narrow_mm(dv, up, 1.0 if need_scaling else scaling, "")
        if need_scaling:
            of_scaling = (a * da).sum()
            if up_bias is not None:
                of_scaling += (up_bias * of_up_bias).sum()
            da.mul_(scaling)
        dz = ACTIVATION_GRADS[activation](da, z)
        instead = x is None and need_down
        if need_down_bias or (instead and up_bias is not None):
            of_down_bias = dz.sum(0)
        if need_down:
            of_down = tall_mm(dz, v if x is None else cast(x, wide), "")
        if instead:
            of_down.addmm_(torch.mm(dz.t(), a), up.t(), alpha=-scaling)
            if up_bias is not None:
                of_down.addr_(of_down_bias, up_bias, alpha=-scaling)
        if need_x:
            of_x = cast(dv.addmm_(dz, down), dy.dtype)
    if scaling != 1:
        of_up, of_up_bias = (grad if grad is None else grad.mul_(scaling) for grad in (of_up, of_up_bias))
    return [of_x, of_down, of_down_bias, of_up, of_up_bias, of_scaling, *of_norm]

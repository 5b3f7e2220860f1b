"""Bottleneck adapter (Houlsby et al. 2019; Pfeiffer et al. 2020), forward and backward.

Shapes: x (M, K), down_weight Wd (R, K), down_bias bd (R,), up_weight Wu (N, R), up_bias bu (N,), residual, y and dy
(M, N), weight and bias of LN_before (K,), of LN_after (N,).

    xn = LN_before(x)                             or x
    z  = xn Wdᵀ + bd                              (M, R)
    t  = mask∘(act(z) Wuᵀ + bu) / (1 - p)         (M, N)
    h  = residual + scaling · t,  y = LN_after(h)                 or y = h
    h  = scaling · t,  y = residual + LN_after(h)                 where `residual_after_norm`

With ĥ = (h - mean) · rstd and x̂ likewise, means taken over a row:

    dh  = rstd · (w∘dy - mean(w∘dy) - ĥ · mean(w∘dy∘ĥ))           or dy
    g   = mask∘dh / (1 - p)
    dWu = scaling · gᵀ act(z),  dbu = scaling · Σ_M g,  LN_after: Σ_M dy∘ĥ, Σ_M dy
    da  = g Wu,  dz = scaling · da∘act'(z),  dscaling = Σ act(z)∘da + Σ g∘bu
    dbd = Σ_M dz,  P = dzᵀ x̂,  dWd = P∘w + dbd bᵀ                 or dzᵀ x
    LN_before: Σ_R Wd∘P, Σ_R dbd∘Wd
    dxn = dz Wd,  dx = rstd · (w∘dxn - mean(w∘dxn) - x̂ · mean(w∘dxn∘x̂))   or dxn, + dresidual where residual is x

Saved: x, z in fp32 (fp64 for fp64), each row's mean and rstd, the residual where LN_after is taken over it, the seed;
never y or the mask. One kernel a direction walks a block of rows from end to end; in backward the skinny pass that LoRA
has too (`factor_grad`) splits the rows for the weights' gradients. Each draws the mask again. Under LN_after backward
computes h again, for the means and for dh; dh goes through memory, in fp32 for fp16 and beside fp32 parameters, since
computing it anew where it is read took an H100 five times as long.

Everything accumulates in fp32 (fp64 for fp64). Parameters of x's type meet operands rounded to that type, as in stock.
Beside fp32 parameters whatever ends in fp32 (z and so the sign that relu sees, every parameter's gradient, and h under
LN_after) has fp32's accuracy on 16-bit tensor cores (`_tl.dot_split`); y and dx take operands rounded to their type.
Sums that several programs share are written as partial sums and added in a fixed order: no atomics.
"""

from typing import Any

import torch
from torch import Tensor

from ._launch import Plan, by_layout, cdiv, needs_int64, precision, rank_block, unit
from .bottleneck_norm import down_grad
from .bottleneck_rows import Norm, adapter_bwd_kernel, adapter_fwd_kernel, adapter_tile, dense
from .partial_sums import Partials, accumulator_dtype, sums
from .skinny import _scaling_arguments, factor_grad


@by_layout
def _fwd_plan(
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    up_weight: Tensor,
    norms: tuple[bool, bool],
    activation: str,
    residual_after_norm: bool,
) -> Plan:
    constexprs = {"ACTIVATION": activation, "RESIDUAL_AFTER_NORM": residual_after_norm}
    return _walk(adapter_fwd_kernel, (x, residual), x, down_weight, up_weight, norms, constexprs)


@by_layout
def _bwd_plan(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    up_weight: Tensor,
    norms: tuple[bool, bool],
    activation: str,
    skip: str,
) -> Plan:
    constexprs = {"ACTIVATION": activation, "SKIP": skip}
    return _walk(adapter_bwd_kernel, (dy, x, residual), x, down_weight, up_weight, norms, constexprs)


def _walk(
    kernel: Any,
    tall: tuple[Tensor | None, ...],
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    norms: tuple[bool, bool],
    constexprs: dict[str, Any],
) -> Plan:
    """A plan with a program for each block of rows of x and of the other `tall` matrices that the kernel reads."""
    M, (R, K), N = x.shape[0], down_weight.shape, up_weight.shape[0]
    tile = adapter_tile(x, down_weight, R, *norms)
    block_r = rank_block(R, tile)
    strides = [0 if matrix is None else matrix.stride(0) for matrix in tall]
    return Plan(
        kernel,
        (cdiv(M, tile.rows),),
        M,
        N,
        K,
        R,
        *strides,
        **constexprs,
        SPLIT=down_weight.dtype != x.dtype,
        BLOCK_M=tile.rows,
        BLOCK_C=tile.cols,
        BLOCK_R=block_r,
        BLOCKS_R=cdiv(R, block_r),
        X_UNIT=unit(K, N, *strides),
        R_UNIT=unit(R),
        WIDE=needs_int64(*tall, down_weight, up_weight) or M * max(K, N, R) > 2**31,
        PRECISION=precision(x.dtype),
        device=x.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, z, stats_before, stats_after): y (M, N), z (M, R), the mean and rstd (2, M) of the rows before each norm.

    Drops where a 16-bit word is below `threshold`; `scaling` may be a tensor on x's device.
    """
    M, (N, R) = x.shape[0], up_weight.shape
    residual = None if residual is None else _rows(residual)
    x, down_weight, up_weight = _rows(x), down_weight.contiguous(), up_weight.contiguous()
    wide = accumulator_dtype(x.dtype)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    z = torch.empty((M, R), dtype=wide, device=x.device)
    stats_before, stats_after = (
        None if norm is None else torch.empty((2, M), dtype=wide, device=x.device) for norm in (norm_before, norm_after)
    )
    norms = (norm_before is not None, norm_after is not None)
    plan = _fwd_plan(x, residual, down_weight, up_weight, norms, activation, residual_after_norm)
    plan(
        x,
        residual,
        down_weight,
        *dense(down_bias),
        up_weight,
        *dense(up_bias, *(norm_before or (None, None)), *(norm_after or (None, None))),
        y,
        z,
        torch.empty_like(z) if plan.constexprs["BLOCKS_R"] > 1 else None,
        stats_before,
        stats_after,
        *_scaling_arguments(scaling),
        eps,
        seed if threshold else None,
        threshold,
    )
    return y, z, stats_before, stats_after


def _rows(x: Tensor) -> Tensor:
    """x, copied only where the elements of a row do not lie side by side."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


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
    needs: set[str],
) -> dict[str, Any]:
    """The gradients that `needs` names; those of a norm are a (weight, bias) pair.

    Where `residual` is x its gradient is part of x's; where it is dy itself, dy is returned. A walk over the rows, two
    skinny passes and one launch for all of their sums, and for LN_before's parameters one more.
    """
    (M, N), (R, K) = dy.shape, down_weight.shape
    skips = residual is x
    wide = z.dtype
    seed = seed if threshold else None
    through_norm = norm_after is not None and not residual_after_norm
    need_dz = bool(needs & {"x", "down_weight", "down_bias", "norm_before"})
    need_dbd = "down_bias" in needs or (norm_before is not None and bool(needs & {"down_weight", "norm_before"}))
    need_dresidual = "residual" in needs and through_norm
    need_g = bool(needs & {"up_weight", "up_bias"})
    skips_norm = skips and through_norm and "x" in needs

    dense_dy, x, down_weight, up_weight = _rows(dy), _rows(x), down_weight.contiguous(), up_weight.contiguous()
    residual = _rows(residual) if residual is not None and through_norm else None
    norms = (norm_before is not None, norm_after is not None)
    skip = "none" if not skips else "dh" if through_norm else "dy"
    walk = _bwd_plan(dense_dy, x, residual, down_weight, up_weight, norms, activation, skip)
    blocks_r, rows = walk.constexprs["BLOCKS_R"], walk.grid[0]

    def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    grads: dict[str, Any] = {}
    act = empty(M, R) if "up_weight" in needs or (norm_after is not None and blocks_r > 1) else None
    dz = empty(M, R) if need_dz else None
    dx = empty(M, K, dtype=x.dtype) if "x" in needs else None
    dh = after_dw = after_db = None
    if norm_after is not None and (need_g or need_dresidual or skips_norm):
        split = down_weight.dtype != x.dtype
        dh = empty(M, N, dtype=wide if split or x.dtype is torch.float16 else x.dtype)  # fp16 thins out below 2^-14
    if "norm_after" in needs:
        after_dw, after_db = empty(rows, N), empty(rows, N)
    dbd = empty(rows, R) if need_dbd else None
    dscaling = empty(rows) if "scaling" in needs else None
    if any(out is not None for out in (act, dz, dh, after_dw, dscaling)):
        walk(
            dense_dy,
            x,
            residual,
            down_weight,
            up_weight,
            *dense(up_bias, (norm_before or (None,))[0], (norm_after or (None,))[0]),
            z,
            stats_before,
            stats_after,
            act,
            dz,
            dx,
            dh,
            after_dw,
            after_db,
            dbd,
            dscaling,
            *_scaling_arguments(scaling),
            seed,
            threshold,
        )
    dtype = down_weight.dtype
    up_sums: Partials = (None, dtype)
    up_bias_sums = down_sums = up_sums
    if need_g:
        up_sums, up_bias_sums, _ = factor_grad(
            dense_dy if norm_after is None else dh,
            act,
            up_weight,
            scaling,
            threshold,
            seed,
            scaled=True,
            split=dh is not None and dh.dtype is not x.dtype,
            needs=("up_weight" in needs, "up_bias" in needs, False),
        )
    through_before = norm_before is not None and bool(needs & {"down_weight", "norm_before"})
    if through_before or "down_weight" in needs:
        down_sums, _, _ = factor_grad(
            x,
            dz,
            down_weight.mT,
            transposed=True,
            stats=stats_before,  # None without LN_before
            needs=(True, False, False),
        )
    down_bias_sums = (dbd, wide if through_before else dtype)
    grads["up_weight"], grads["up_bias"], grads["down_weight"], dbd, *after = sums(
        up_sums, up_bias_sums, down_sums, down_bias_sums, (after_dw, dtype), (after_db, dtype)
    )
    grads["down_bias"], grads["norm_after"] = dbd if dbd is None else dbd.to(dtype), tuple(after)
    if through_before:
        grads.update(down_grad(grads["down_weight"], dbd, down_weight, norm_before, needs))
    if dscaling is not None:
        grads["scaling"] = dscaling.sum().to(scaling.dtype).view(scaling.shape)
    grads["x"], grads["residual"] = dx, dh.to(x.dtype) if need_dresidual else dy
    return {name: grads[name] for name in needs}

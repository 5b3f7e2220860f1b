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
never y or the mask. One kernel a direction walks a block of rows from end to end; in backward two more split the
rows for the weights' gradients. Each draws the mask, and where LN_after is there computes h, again: t is R products an
element, less than reading it from memory costs.

Everything accumulates in fp32 (fp64 for fp64). Parameters of x's type meet operands rounded to that type, as in stock.
Beside fp32 parameters whatever ends in fp32 (z and so the sign that relu sees, every parameter's gradient, and h under
LN_after) has fp32's accuracy on 16-bit tensor cores (`_tl.dot_split`); y and dx take operands rounded to their type.
Sums that several programs share are written as partial sums and added in a fixed order: no atomics.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate, activation_grad
from ._launch import Tile, chip, launch, needs_int64, precision, rank_block, unit
from ._tl import cast, dot_rounded, dot_split, keep_mask, keep_scale, load_stats, load_tile, normalized, tile_ptrs
from .skinny import _accumulator, _chunks, _coefficient, _scaling_arguments, _sum_partials, factor_grad

Norm = tuple[Tensor, Tensor]


def _adapter_tile(x: Tensor, weight: Tensor, R: int, norm_after: Norm | None) -> Tile:
    """A block of rows, and the columns of K or N and the block of R that a step takes."""
    kind = chip(x.device)
    if kind == "interpreter":
        return Tile(32, 128, 0, 64, 4, 1)
    if x.element_size() > 2:
        return Tile(32, 32, 0, 32, 8, 1)
    # Under LN_after h is alive beside its gradient.
    cols = 64 if norm_after is None else 32
    if weight.dtype != x.dtype:
        return Tile(64, cols, 0, 64 if kind == "sm90" and (norm_after is None or R <= 64) else 32, 8, 2)
    return Tile(64, cols, 0, 128, 8, 2)


def _up_grad_tile(dy: Tensor, weight: Tensor, R: int, norm_after: Norm | None) -> Tile:
    """As above; under LN_after the whole of Wu's tile, (cols, rank), stays in registers beside that of dWu."""
    tile = _adapter_tile(dy, weight, R, norm_after)
    if chip(dy.device) == "interpreter" or norm_after is None or dy.element_size() > 2:
        return tile
    rows = 64 if weight.dtype == dy.dtype else 32 if R <= 64 else 16
    return replace(tile, rows=rows, rank=min(tile.rank, 64))


@triton.jit
def _operand(a, DTYPE: tl.constexpr, SPLIT: tl.constexpr):
    """(a', scale) with a = a' · scale: fp32 where products are split, otherwise rounded to DTYPE whatever the range."""
    scale = tl.full((), 1.0, a.dtype)
    if not SPLIT:
        if tl.float16 == DTYPE:
            a, scale = normalized(a)
        a = cast(a, DTYPE)
    return a, scale


@triton.jit
def _times(a, b, acc, DTYPE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, to fp32's accuracy where SPLIT, otherwise with operands rounded to DTYPE."""
    return dot_split(a, b, acc, PRECISION) if SPLIT else dot_rounded(a, b, acc, DTYPE, PRECISION)


@triton.jit
def _load_row(ptr, cols, num_cols, DTYPE: tl.constexpr):
    return tl.load(ptr + cols, mask=cols < num_cols, other=0.0).to(DTYPE)[None, :]


@triton.jit
def _merge_stats(mean, squares, tile, col, num_cols, BLOCK_C: tl.constexpr):
    """Each row's mean and sum of squared deviations, with those of the columns from `col` on merged in.

    tile (BLOCK_M, BLOCK_C) is zero past num_cols. Chan, Golub and LeVeque 1979, equation 2.1: no Σ x² - (Σ x)².
    """
    count = tl.full((), min(BLOCK_C, num_cols - col), mean.dtype)
    share = count / (count + tl.full((), col, mean.dtype))
    tile_mean = tl.sum(tile, 1) / count
    deviation = tl.where((col + tl.arange(0, BLOCK_C) < num_cols)[None, :], tile - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    squares += tl.sum(deviation * deviation, 1) + delta * delta * share * tl.full((), col, mean.dtype)
    return mean + delta * share, squares


@triton.jit
def _h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG: tl.constexpr):
    """h = coefficient · mask∘(act(z) Wuᵀ + bu) + residual at (row, col).

    act(z) is a · scale where R fits one block; otherwise it is read from act_ptr block by block.
    """
    M, N, R = sizes
    act_ptr, wu_ptr, bu_ptr, residual_ptr, seed_ptr = pointers
    X_DTYPE: tl.constexpr = CONFIG[0]
    SPLIT: tl.constexpr = CONFIG[1]
    BLOCK_M: tl.constexpr = CONFIG[2]
    BLOCK_C: tl.constexpr = CONFIG[3]
    BLOCK_R: tl.constexpr = CONFIG[4]
    BLOCKS_R: tl.constexpr = CONFIG[5]
    X_UNIT: tl.constexpr = CONFIG[6]
    R_UNIT: tl.constexpr = CONFIG[7]
    WIDE: tl.constexpr = CONFIG[8]
    PRECISION: tl.constexpr = CONFIG[9]
    DTYPE: tl.constexpr = coefficient.dtype
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_C)

    h = tl.zeros((BLOCK_M, BLOCK_C), DTYPE)
    if BLOCKS_R == 1:
        w = load_tile(wu_ptr, offs_n, tl.arange(0, BLOCK_R), N, R, R, 1, R_UNIT, WIDE)
        h = _times(a, tl.trans(w), h, X_DTYPE, SPLIT, PRECISION) * scale
    else:
        for block_r in range(BLOCKS_R):
            offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
            part = load_tile(act_ptr, offs_m, offs_r, M, R, R, 1, R_UNIT, WIDE)
            w = load_tile(wu_ptr, offs_n, offs_r, N, R, R, 1, R_UNIT, WIDE)
            h = _times(part, tl.trans(w), h, X_DTYPE, SPLIT, PRECISION)
    if bu_ptr is not None:
        h += _load_row(bu_ptr, offs_n, N, DTYPE)
    h *= coefficient
    if seed_ptr is not None:
        h = tl.where(keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_C), h, 0.0)
    if residual_ptr is not None:
        h += load_tile(residual_ptr, offs_m, offs_n, M, N, stride_rm, 1, X_UNIT, WIDE).to(DTYPE)
    return h


@triton.jit
def _coefficients(scaling, scaling_ptr, seed_ptr, threshold, DTYPE: tl.constexpr):
    """scaling / (1 - p) and 1 / (1 - p)."""
    keep = tl.full((), 1.0, DTYPE)
    if seed_ptr is not None:
        keep = keep_scale(threshold, DTYPE)
    return _coefficient(scaling, scaling_ptr, DTYPE) * keep, keep


@triton.jit(do_not_specialize=["threshold"])
def _adapter_fwd_kernel(
    x_ptr,
    residual_ptr,
    wd_ptr,
    bd_ptr,
    wu_ptr,
    bu_ptr,
    before_w_ptr,
    before_b_ptr,
    after_w_ptr,
    after_b_ptr,
    y_ptr,
    z_ptr,
    act_ptr,
    stats_before_ptr,
    stats_after_ptr,
    scaling: tl.float64,
    scaling_ptr,
    eps: tl.float64,
    seed_ptr,
    threshold,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_rm,
    ACTIVATION: tl.constexpr,
    RESIDUAL_AFTER_NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    X_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y, z (M, R) and the rows' mean and rstd (2, M) before each norm, for a block of rows.

    act (M, R) holds act(z) where R takes several blocks.
    """
    K = K // X_UNIT * X_UNIT
    N = N // X_UNIT * X_UNIT
    R = R // R_UNIT * R_UNIT
    row = tl.program_id(0) * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    X_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    UP_SPLIT: tl.constexpr = SPLIT and after_w_ptr is not None
    CONFIG: tl.constexpr = (
        X_DTYPE,
        UP_SPLIT,
        BLOCK_M,
        BLOCK_C,
        BLOCK_R,
        BLOCKS_R,
        X_UNIT,
        R_UNIT,
        WIDE,
        PRECISION,
    )

    mean = tl.zeros((BLOCK_M,), DTYPE)
    rstd = tl.zeros((BLOCK_M,), DTYPE)
    if before_w_ptr is not None:
        for col in range(0, K, BLOCK_C):
            x = load_tile(x_ptr, offs_m, col + tl.arange(0, BLOCK_C), M, K, stride_xm, 1, X_UNIT, WIDE)
            mean, rstd = _merge_stats(mean, rstd, x.to(DTYPE), col, K, BLOCK_C)
        rstd = tl.rsqrt(rstd / K + tl.full((), eps, DTYPE))
        tl.store(stats_before_ptr + offs_m, mean, mask=mask_m)
        tl.store(stats_before_ptr + M + offs_m, rstd, mask=mask_m)

    z = tl.zeros((BLOCK_M, BLOCK_R), DTYPE)
    for block_r in range(BLOCKS_R):
        offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
        z = tl.zeros((BLOCK_M, BLOCK_R), DTYPE)
        for col in range(0, K, BLOCK_C):
            offs_k = col + tl.arange(0, BLOCK_C)
            x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, 1, X_UNIT, WIDE)
            w = load_tile(wd_ptr, offs_r, offs_k, R, K, K, 1, X_UNIT, WIDE)
            if before_w_ptr is not None:
                x = (x.to(DTYPE) - mean[:, None]) * rstd[:, None]
                x = x * _load_row(before_w_ptr, offs_k, K, DTYPE) + _load_row(before_b_ptr, offs_k, K, DTYPE)
                if not SPLIT:
                    x = cast(x, X_DTYPE)
            z = _times(x, tl.trans(w), z, X_DTYPE, SPLIT, PRECISION)
        if bd_ptr is not None:
            z += _load_row(bd_ptr, offs_r, R, DTYPE)
        mask = mask_m[:, None] & (offs_r < R)[None, :]
        tl.store(tile_ptrs(z_ptr, offs_m, offs_r, R, 1, R_UNIT, WIDE), z, mask=mask)
        if BLOCKS_R > 1:
            tl.store(tile_ptrs(act_ptr, offs_m, offs_r, R, 1, R_UNIT, WIDE), activate(z, ACTIVATION), mask=mask)
    if BLOCKS_R > 1:
        tl.debug_barrier()
    a, scale = _operand(activate(z, ACTIVATION), X_DTYPE, UP_SPLIT)

    coefficient, _ = _coefficients(scaling, scaling_ptr, seed_ptr, threshold, DTYPE)
    sizes = (M, N, R)
    pointers = (act_ptr, wu_ptr, bu_ptr, None if RESIDUAL_AFTER_NORM else residual_ptr, seed_ptr)
    if after_w_ptr is not None:
        mean = tl.zeros((BLOCK_M,), DTYPE)
        rstd = tl.zeros((BLOCK_M,), DTYPE)
        for col in range(0, N, BLOCK_C):
            h = _h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
            mean, rstd = _merge_stats(mean, rstd, h, col, N, BLOCK_C)
        rstd = tl.rsqrt(rstd / N + tl.full((), eps, DTYPE))
        tl.store(stats_after_ptr + offs_m, mean, mask=mask_m)
        tl.store(stats_after_ptr + M + offs_m, rstd, mask=mask_m)
    for col in range(0, N, BLOCK_C):
        offs_n = col + tl.arange(0, BLOCK_C)
        h = _h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
        if after_w_ptr is not None:
            h = (h - mean[:, None]) * rstd[:, None]
            h = h * _load_row(after_w_ptr, offs_n, N, DTYPE) + _load_row(after_b_ptr, offs_n, N, DTYPE)
        if RESIDUAL_AFTER_NORM and residual_ptr is not None:
            h += load_tile(residual_ptr, offs_m, offs_n, M, N, stride_rm, 1, X_UNIT, WIDE).to(DTYPE)
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        tl.store(tile_ptrs(y_ptr, offs_m, offs_n, N, 1, X_UNIT, WIDE), cast(h, X_DTYPE), mask=mask)


@triton.jit
def _norm_grad(dy, hat, rstd, sum_dy, sum_dy_hat, weight):
    """dh = rstd · (w∘dy - mean(w∘dy) - ĥ · mean(w∘dy∘ĥ)), the gradient of LN's input."""
    return (dy.to(hat.dtype) * weight - sum_dy[:, None] - hat * sum_dy_hat[:, None]) * rstd[:, None]


@triton.jit
def _dxn_tile(dz, scale, row, col, M, K, R, dz_ptr, wd_ptr, CONFIG: tl.constexpr):
    """dxn = dz Wd at (row, col), operands rounded to dx's type; dz is dz · scale where R fits one block."""
    X_DTYPE: tl.constexpr = CONFIG[0]
    BLOCK_M: tl.constexpr = CONFIG[2]
    BLOCK_C: tl.constexpr = CONFIG[3]
    BLOCK_R: tl.constexpr = CONFIG[4]
    BLOCKS_R: tl.constexpr = CONFIG[5]
    X_UNIT: tl.constexpr = CONFIG[6]
    R_UNIT: tl.constexpr = CONFIG[7]
    WIDE: tl.constexpr = CONFIG[8]
    PRECISION: tl.constexpr = CONFIG[9]
    offs_k = col + tl.arange(0, BLOCK_C)
    dxn = tl.zeros((BLOCK_M, BLOCK_C), dz_ptr.dtype.element_ty)
    if BLOCKS_R == 1:
        w = load_tile(wd_ptr, tl.arange(0, BLOCK_R), offs_k, R, K, K, 1, X_UNIT, WIDE)
        dxn = _times(dz, w, dxn, X_DTYPE, False, PRECISION) * scale
    else:
        for block_r in range(BLOCKS_R):
            offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
            part = load_tile(dz_ptr, row + tl.arange(0, BLOCK_M), offs_r, M, R, R, 1, R_UNIT, WIDE)
            w = load_tile(wd_ptr, offs_r, offs_k, R, K, K, 1, X_UNIT, WIDE)
            dxn = _times(part, w, dxn, X_DTYPE, False, PRECISION)
    return dxn


@triton.jit(do_not_specialize=["threshold"])
def _adapter_bwd_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    wd_ptr,
    wu_ptr,
    bu_ptr,
    before_w_ptr,
    after_w_ptr,
    z_ptr,
    stats_before_ptr,
    stats_after_ptr,
    sums_ptr,
    act_ptr,
    dz_ptr,
    dx_ptr,
    dresidual_ptr,
    dbd_ptr,
    dscaling_ptr,
    scaling: tl.float64,
    scaling_ptr,
    seed_ptr,
    threshold,
    M,
    N,
    K,
    R,
    stride_dym,
    stride_xm,
    stride_rm,
    ACTIVATION: tl.constexpr,
    SKIP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    X_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a block of rows gives: act(z) and dz (M, R), dx, dresidual and the means that dh takes, sums (2, M).

    And of all rows' sums its part: dbd (programs, R), dscaling (programs,). SKIP is the gradient of the residual that
    dx takes up: "dy", "dh" or none. residual is read only where LN_after is taken over it.
    """
    K = K // X_UNIT * X_UNIT
    N = N // X_UNIT * X_UNIT
    R = R // R_UNIT * R_UNIT
    pid = tl.program_id(0)
    row = pid * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    X_DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    UP_SPLIT: tl.constexpr = SPLIT and after_w_ptr is not None
    NEED_DA: tl.constexpr = dz_ptr is not None or dscaling_ptr is not None
    CONFIG: tl.constexpr = (
        X_DTYPE,
        UP_SPLIT,
        BLOCK_M,
        BLOCK_C,
        BLOCK_R,
        BLOCKS_R,
        X_UNIT,
        R_UNIT,
        WIDE,
        PRECISION,
    )
    coefficient, keep = _coefficients(scaling, scaling_ptr, seed_ptr, threshold, DTYPE)
    sizes = (M, N, R)
    pointers = (act_ptr, wu_ptr, bu_ptr, residual_ptr, seed_ptr)

    if act_ptr is not None:
        for block_r in range(BLOCKS_R):
            offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
            z = load_tile(z_ptr, offs_m, offs_r, M, R, R, 1, R_UNIT, WIDE)
            mask = mask_m[:, None] & (offs_r < R)[None, :]
            tl.store(tile_ptrs(act_ptr, offs_m, offs_r, R, 1, R_UNIT, WIDE), activate(z, ACTIVATION), mask=mask)
        if BLOCKS_R > 1:
            tl.debug_barrier()

    if after_w_ptr is not None:
        z = load_tile(z_ptr, offs_m, tl.arange(0, BLOCK_R), M, R, R, 1, R_UNIT, WIDE)
        a, scale = _operand(activate(z, ACTIVATION), X_DTYPE, UP_SPLIT)
        mean, rstd = load_stats(stats_after_ptr, offs_m, M)
        sum_dy = tl.zeros((BLOCK_M,), DTYPE)
        sum_dy_hat = tl.zeros((BLOCK_M,), DTYPE)
        for col in range(0, N, BLOCK_C):
            offs_n = col + tl.arange(0, BLOCK_C)
            hat = _h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
            hat = (hat - mean[:, None]) * rstd[:, None]
            dy = load_tile(dy_ptr, offs_m, offs_n, M, N, stride_dym, 1, X_UNIT, WIDE).to(DTYPE)
            dy *= _load_row(after_w_ptr, offs_n, N, DTYPE)
            sum_dy += tl.sum(dy, 1)
            sum_dy_hat += tl.sum(dy * hat, 1)
        sum_dy /= N
        sum_dy_hat /= N
        if sums_ptr is not None:
            tl.store(sums_ptr + offs_m, sum_dy, mask=mask_m)
            tl.store(sums_ptr + M + offs_m, sum_dy_hat, mask=mask_m)

    dz = tl.zeros((BLOCK_M, BLOCK_R), DTYPE)
    dscaling = tl.zeros((BLOCK_M,), DTYPE)
    if NEED_DA or dresidual_ptr is not None:
        for block_r in range(BLOCKS_R):
            offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
            da = tl.zeros((BLOCK_M, BLOCK_R), DTYPE)
            for col in range(0, N, BLOCK_C):
                offs_n = col + tl.arange(0, BLOCK_C)
                g = load_tile(dy_ptr, offs_m, offs_n, M, N, stride_dym, 1, X_UNIT, WIDE)
                if after_w_ptr is not None:
                    hat = _h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
                    hat = (hat - mean[:, None]) * rstd[:, None]
                    weight = _load_row(after_w_ptr, offs_n, N, DTYPE)
                    g = _norm_grad(g, hat, rstd, sum_dy, sum_dy_hat, weight)
                    g = tl.where((offs_n < N)[None, :], g, 0.0)
                    if dresidual_ptr is not None:
                        mask = mask_m[:, None] & (offs_n < N)[None, :] & (block_r == 0)
                        out_ptrs = tile_ptrs(dresidual_ptr, offs_m, offs_n, N, 1, X_UNIT, WIDE)
                        tl.store(out_ptrs, cast(g, X_DTYPE), mask=mask)
                if seed_ptr is not None:
                    g = tl.where(keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_C), g, 0.0)
                if NEED_DA:
                    w = load_tile(wu_ptr, offs_n, offs_r, N, R, R, 1, R_UNIT, WIDE)
                    da = _times(g, w, da, X_DTYPE, SPLIT, PRECISION)
                if dscaling_ptr is not None and bu_ptr is not None:
                    of_bias = tl.sum(g.to(DTYPE) * _load_row(bu_ptr, offs_n, N, DTYPE), 1)
                    dscaling += tl.where(block_r == 0, of_bias, 0.0)
            z = load_tile(z_ptr, offs_m, offs_r, M, R, R, 1, R_UNIT, WIDE)
            if dscaling_ptr is not None:
                dscaling += tl.sum(activate(z, ACTIVATION) * da, 1)
            if dz_ptr is not None:
                dz = da * coefficient * activation_grad(z, ACTIVATION)
                mask = mask_m[:, None] & (offs_r < R)[None, :]
                tl.store(tile_ptrs(dz_ptr, offs_m, offs_r, R, 1, R_UNIT, WIDE), dz, mask=mask)
            if dbd_ptr is not None:
                tl.store(dbd_ptr + pid.to(tl.int64) * R + offs_r, tl.sum(dz, 0), mask=offs_r < R)
    if dscaling_ptr is not None:
        tl.store(dscaling_ptr + pid, tl.sum(dscaling, 0) * keep)

    if dx_ptr is not None:
        if BLOCKS_R > 1:
            tl.debug_barrier()
        dz, dz_scale = _operand(dz, X_DTYPE, False)
        if before_w_ptr is not None:
            x_mean, x_rstd = load_stats(stats_before_ptr, offs_m, M)
            sum_dx = tl.zeros((BLOCK_M,), DTYPE)
            sum_dx_hat = tl.zeros((BLOCK_M,), DTYPE)
            for col in range(0, K, BLOCK_C):
                offs_k = col + tl.arange(0, BLOCK_C)
                dxn = _dxn_tile(dz, dz_scale, row, col, M, K, R, dz_ptr, wd_ptr, CONFIG)
                dxn *= _load_row(before_w_ptr, offs_k, K, DTYPE)
                x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, 1, X_UNIT, WIDE).to(DTYPE)
                sum_dx += tl.sum(dxn, 1)
                sum_dx_hat += tl.sum(dxn * (x - x_mean[:, None]) * x_rstd[:, None], 1)
            sum_dx /= K
            sum_dx_hat /= K
        for col in range(0, K, BLOCK_C):
            offs_k = col + tl.arange(0, BLOCK_C)
            dx = _dxn_tile(dz, dz_scale, row, col, M, K, R, dz_ptr, wd_ptr, CONFIG)
            if before_w_ptr is not None:
                x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, 1, X_UNIT, WIDE).to(DTYPE)
                hat = (x - x_mean[:, None]) * x_rstd[:, None]
                dx = _norm_grad(dx, hat, x_rstd, sum_dx, sum_dx_hat, _load_row(before_w_ptr, offs_k, K, DTYPE))
            if SKIP != "none":
                g = load_tile(dy_ptr, offs_m, offs_k, M, N, stride_dym, 1, X_UNIT, WIDE)
                if SKIP == "dh":
                    hat = _h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
                    hat = (hat - mean[:, None]) * rstd[:, None]
                    weight = _load_row(after_w_ptr, offs_k, N, DTYPE)
                    g = _norm_grad(g, hat, rstd, sum_dy, sum_dy_hat, weight)
                dx += g.to(DTYPE)
            mask = mask_m[:, None] & (offs_k < K)[None, :]
            tl.store(tile_ptrs(dx_ptr, offs_m, offs_k, K, 1, X_UNIT, WIDE), cast(dx, X_DTYPE), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _up_grad_kernel(
    dy_ptr,
    residual_ptr,
    wu_ptr,
    bu_ptr,
    after_w_ptr,
    act_ptr,
    stats_after_ptr,
    sums_ptr,
    dwu_ptr,
    dbu_ptr,
    dw_ptr,
    db_ptr,
    scaling: tl.float64,
    scaling_ptr,
    seed_ptr,
    threshold,
    M,
    N,
    R,
    M_split,
    stride_dym,
    stride_rm,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    X_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dWu = scaling · gᵀ act(z), dbu = scaling · Σ g, LN_after's dw = Σ dy∘ĥ and db = Σ dy, over a split of the rows.

    dwu (splits, N, R), dbu, dw and db (splits, N), for a block of N and of R.
    """
    N = N // X_UNIT * X_UNIT
    R = R // R_UNIT * R_UNIT
    block_r = tl.program_id(0) % BLOCKS_R
    col = tl.program_id(0) // BLOCKS_R * BLOCK_C
    split = tl.program_id(1)
    offs_n = col + tl.arange(0, BLOCK_C)
    offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    X_DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    DTYPE: tl.constexpr = act_ptr.dtype.element_ty
    UP_SPLIT: tl.constexpr = SPLIT and after_w_ptr is not None
    CONFIG: tl.constexpr = (
        X_DTYPE,
        UP_SPLIT,
        BLOCK_M,
        BLOCK_C,
        BLOCK_R,
        BLOCKS_R,
        X_UNIT,
        R_UNIT,
        WIDE,
        PRECISION,
    )
    coefficient, _ = _coefficients(scaling, scaling_ptr, seed_ptr, threshold, DTYPE)
    sizes = (M, N, R)
    pointers = (act_ptr, wu_ptr, bu_ptr, residual_ptr, seed_ptr)

    dwu = tl.zeros((BLOCK_C, BLOCK_R), DTYPE)
    dbu = tl.zeros((BLOCK_C,), DTYPE)
    dw = tl.zeros((BLOCK_C,), DTYPE)
    db = tl.zeros((BLOCK_C,), DTYPE)
    for row in range(split * M_split, min((split + 1) * M_split, M), BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        g = load_tile(dy_ptr, offs_m, offs_n, M, N, stride_dym, 1, X_UNIT, WIDE)
        act = load_tile(act_ptr, offs_m, offs_r, M, R, R, 1, R_UNIT, WIDE)
        if after_w_ptr is not None:
            a, scale = _operand(act, X_DTYPE, UP_SPLIT)
            mean, rstd = load_stats(stats_after_ptr, offs_m, M)
            hat = _h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
            hat = (hat - mean[:, None]) * rstd[:, None]
            if dw_ptr is not None:
                dw += tl.sum(g.to(DTYPE) * hat, 0)
                db += tl.sum(g.to(DTYPE), 0)
            if sums_ptr is not None:
                sum_dy, sum_dy_hat = load_stats(sums_ptr, offs_m, M)
                g = _norm_grad(g, hat, rstd, sum_dy, sum_dy_hat, _load_row(after_w_ptr, offs_n, N, DTYPE))
                g = tl.where(mask_n[None, :], g, 0.0)
        if seed_ptr is not None:
            g = tl.where(keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_C), g, 0.0)
        if dwu_ptr is not None:
            dwu = _times(tl.trans(g), act, dwu, X_DTYPE, SPLIT, PRECISION)
        if dbu_ptr is not None:
            dbu += tl.sum(g.to(DTYPE), 0)

    if dwu_ptr is not None:
        dwu_ptr += split.to(tl.int64) * N * R
        mask = mask_n[:, None] & (offs_r < R)[None, :]
        tl.store(tile_ptrs(dwu_ptr, offs_n, offs_r, R, 1, R_UNIT, WIDE), dwu * coefficient, mask=mask)
    first = mask_n & (block_r == 0)
    if dbu_ptr is not None:
        tl.store(dbu_ptr + split.to(tl.int64) * N + offs_n, dbu * coefficient, mask=first)
    if dw_ptr is not None:
        tl.store(dw_ptr + split.to(tl.int64) * N + offs_n, dw, mask=first)
        tl.store(db_ptr + split.to(tl.int64) * N + offs_n, db, mask=first)


@triton.jit
def _down_grad_kernel(
    p_ptr,
    dbd_ptr,
    wd_ptr,
    before_w_ptr,
    before_b_ptr,
    dwd_ptr,
    dw_ptr,
    db_ptr,
    R,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dWd = P∘w + dbd bᵀ, dw = Σ_R Wd∘P and db = Σ_R dbd∘Wd, for a block of K; P = dzᵀ x̂ (R, K)."""
    DTYPE: tl.constexpr = p_ptr.dtype.element_ty
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    dw = tl.zeros((BLOCK_K,), DTYPE)
    db = tl.zeros((BLOCK_K,), DTYPE)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        p = load_tile(p_ptr, offs_r, offs_k, R, K, K, 1, 1, WIDE)
        dbd = tl.load(dbd_ptr + offs_r, mask=offs_r < R, other=0.0)[:, None]
        if dwd_ptr is not None:
            dwd = p * _load_row(before_w_ptr, offs_k, K, DTYPE) + dbd * _load_row(before_b_ptr, offs_k, K, DTYPE)
            mask = (offs_r < R)[:, None] & mask_k[None, :]
            dwd = cast(dwd, dwd_ptr.dtype.element_ty)
            tl.store(tile_ptrs(dwd_ptr, offs_r, offs_k, K, 1, 1, WIDE), dwd, mask=mask)
        if dw_ptr is not None:
            wd = load_tile(wd_ptr, offs_r, offs_k, R, K, K, 1, 1, WIDE).to(DTYPE)
            dw += tl.sum(wd * p, 0)
            db += tl.sum(wd * dbd, 0)
    if dw_ptr is not None:
        tl.store(dw_ptr + offs_k, cast(dw, dw_ptr.dtype.element_ty), mask=mask_k)
        tl.store(db_ptr + offs_k, cast(db, db_ptr.dtype.element_ty), mask=mask_k)


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
    (M, K), (N, R) = x.shape, up_weight.shape
    residual = None if residual is None else _rows(residual)
    x, down_weight, up_weight = _rows(x), down_weight.contiguous(), up_weight.contiguous()
    wide = _accumulator(x.dtype)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    z = torch.empty((M, R), dtype=wide, device=x.device)
    stats_before, stats_after = (
        None if norm is None else torch.empty((2, M), dtype=wide, device=x.device) for norm in (norm_before, norm_after)
    )
    tile = _adapter_tile(x, down_weight, R, norm_after)
    block_r = rank_block(R, tile)
    blocks_r = triton.cdiv(R, block_r)
    launch(
        _adapter_fwd_kernel,
        (triton.cdiv(M, tile.rows),),
        x,
        residual,
        down_weight,
        *_dense(down_bias),
        up_weight,
        *_dense(up_bias, *(norm_before or (None, None)), *(norm_after or (None, None))),
        y,
        z,
        None if blocks_r == 1 else torch.empty_like(z),
        stats_before,
        stats_after,
        *_scaling_arguments(scaling),
        eps,
        seed if threshold else None,
        threshold,
        M,
        N,
        K,
        R,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        ACTIVATION=activation,
        RESIDUAL_AFTER_NORM=residual_after_norm,
        SPLIT=down_weight.dtype != x.dtype,
        BLOCK_M=tile.rows,
        BLOCK_C=tile.cols,
        BLOCK_R=block_r,
        BLOCKS_R=blocks_r,
        X_UNIT=unit(K, N, x.stride(0), *(() if residual is None else (residual.stride(0),))),
        R_UNIT=unit(R),
        WIDE=needs_int64(x, residual, down_weight, up_weight, y, z),
        PRECISION=precision(x.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y, z, stats_before, stats_after


def _rows(x: Tensor) -> Tensor:
    """x, copied only where the elements of a row do not lie side by side."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _dense(*vectors: Tensor | None) -> list[Tensor | None]:
    return [vector if vector is None else vector.contiguous() for vector in vectors]


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

    Where `residual` is x its gradient is part of x's; where it is dy itself, dy is returned.
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
    need_act = "up_weight" in needs or (norm_after is not None and bool(needs & {"up_bias", "norm_after"}))

    dense_dy, x, down_weight, up_weight = _rows(dy), _rows(x), down_weight.contiguous(), up_weight.contiguous()
    residual = _rows(residual) if residual is not None and through_norm else None
    tile = _adapter_tile(x, down_weight, R, norm_after)
    block_r = rank_block(R, tile)
    blocks_r, rows = triton.cdiv(R, block_r), triton.cdiv(M, tile.rows)
    constants: dict[str, Any] = {
        "SPLIT": down_weight.dtype != x.dtype,
        "BLOCK_M": tile.rows,
        "BLOCK_C": tile.cols,
        "BLOCK_R": block_r,
        "BLOCKS_R": blocks_r,
        "X_UNIT": unit(K, N, *(tensor.stride(0) for tensor in (dense_dy, x, residual) if tensor is not None)),
        "R_UNIT": unit(R),
        "WIDE": needs_int64(dense_dy, x, residual, down_weight, up_weight, z),
        "PRECISION": precision(x.dtype),
    }

    def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    grads: dict[str, Any] = {}
    sums = empty(2, M) if norm_after is not None and need_g else None
    act = empty(M, R) if need_act or (norm_after is not None and blocks_r > 1) else None
    dz = empty(M, R) if need_dz else None
    dx = empty(M, K, dtype=x.dtype) if "x" in needs else None
    dresidual = empty(M, N, dtype=x.dtype) if need_dresidual else None
    dbd = empty(rows, R) if need_dbd else None
    dscaling = empty(rows) if "scaling" in needs else None
    if need_act or any(out is not None for out in (dz, dresidual, dscaling)):
        launch(
            _adapter_bwd_kernel,
            (rows,),
            dense_dy,
            x,
            residual,
            down_weight,
            up_weight,
            *_dense(up_bias, (norm_before or (None,))[0], (norm_after or (None,))[0]),
            z,
            stats_before,
            stats_after,
            sums,
            act,
            dz,
            dx,
            dresidual,
            dbd,
            dscaling,
            *_scaling_arguments(scaling),
            seed,
            threshold,
            M,
            N,
            K,
            R,
            dense_dy.stride(0),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            ACTIVATION=activation,
            SKIP="none" if not skips else "dh" if through_norm else "dy",
            **constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if need_g or "norm_after" in needs:
        act = z if act is None else act
        outer = (dense_dy, residual, up_weight, up_bias, norm_after, act, stats_after, sums, scaling, threshold, seed)
        grads.update(_up_grad(*outer, needs, constants))
    if dbd is not None:
        dbd = _sum_partials(dbd, wide)
        grads["down_bias"] = dbd.to(down_weight.dtype)
    if norm_before is not None and needs & {"down_weight", "norm_before"}:
        grads.update(_down_grad(x, dz, dbd, down_weight, norm_before, stats_before, needs))
    elif "down_weight" in needs:
        grads["down_weight"], _, _ = factor_grad(x, dz, down_weight.mT, transposed=True, needs=(True, False, False))
    if dscaling is not None:
        grads["scaling"] = _sum_partials(dscaling.view(rows, 1), scaling.dtype).view(scaling.shape)
    grads["x"], grads["residual"] = dx, dresidual if through_norm else dy
    return {name: grads[name] for name in needs}


def _up_grad(
    dy: Tensor,
    residual: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_after: Norm | None,
    act: Tensor,
    stats_after: Tensor | None,
    sums: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
    seed: Tensor | None,
    needs: set[str],
    constants: dict[str, Any],
) -> dict[str, Any]:
    """The gradients of Wu, bu and LN_after's parameters, those which `needs` names."""
    (M, N), R, dtype = dy.shape, up_weight.shape[1], up_weight.dtype
    tile = _up_grad_tile(dy, up_weight, R, norm_after)
    block_r = rank_block(R, tile)
    blocks_r = triton.cdiv(R, block_r)
    programs = triton.cdiv(N, tile.cols) * blocks_r
    splits, M_split = _chunks(M, tile.rows, programs)

    def partials(name: str, *shape: int) -> Tensor | None:
        return torch.empty((splits, *shape), dtype=act.dtype, device=dy.device) if name in needs else None

    names = ("up_weight", "up_bias", "norm_after", "norm_after")
    partial = [partials(name, *((N, R) if name == "up_weight" else (N,))) for name in names]
    launch(
        _up_grad_kernel,
        (programs, splits),
        dy,
        residual,
        up_weight,
        *_dense(up_bias, (norm_after or (None,))[0]),
        act,
        stats_after,
        sums,
        *partial,
        *_scaling_arguments(scaling),
        seed,
        threshold,
        M,
        N,
        R,
        M_split,
        dy.stride(0),
        0 if residual is None else residual.stride(0),
        **(constants | {"BLOCK_M": tile.rows, "BLOCK_C": tile.cols, "BLOCK_R": block_r, "BLOCKS_R": blocks_r}),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    dwu, dbu, dw, db = (None if part is None else _sum_partials(part, dtype) for part in partial)
    return {"up_weight": dwu, "up_bias": dbu, "norm_after": (dw, db)}


def _down_grad(
    x: Tensor,
    dz: Tensor,
    dbd: Tensor,
    down_weight: Tensor,
    norm_before: Norm,
    stats_before: Tensor,
    needs: set[str],
) -> dict[str, Any]:
    """The gradients of Wd and of LN_before's parameters, from P = dzᵀ x̂."""
    weight, bias = _dense(*norm_before)
    R, K = down_weight.shape
    p, _, _ = factor_grad(x, dz, down_weight.mT, transposed=True, stats=stats_before, needs=(True, False, False))
    dwd = torch.empty_like(down_weight) if "down_weight" in needs else None
    dw, db = (torch.empty_like(weight) if "norm_before" in needs else None for _ in range(2))
    launch(
        _down_grad_kernel,
        (triton.cdiv(K, 128),),
        p,
        dbd,
        down_weight,
        weight,
        bias,
        dwd,
        dw,
        db,
        R,
        K,
        BLOCK_R=16,
        BLOCK_K=128,
        WIDE=needs_int64(p),
        num_warps=4,
        num_stages=1,
    )
    return {"down_weight": dwd, "norm_before": (dw, db)}

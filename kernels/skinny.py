"""Skinny passes: one read of a tall matrix x (M, K) that gives, or meets, a matrix of rank R.

    s  = scaling · drop(x) F         (M, R)    `shrink`
    dF = drop(x)ᵀ s                  (K, R)    `factor_grad`, and from the same read
    dbias = Σ_M x                    (K,)
    ds = scaling · x F               (M, R)

They are memory-bound. All accumulate in fp32 (fp64 for fp64); what several programs share they write as partial
sums, which a second pass adds in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Plan, Tile, by_layout, cdiv, chip, needs_int64, precision, rank_block, unit
from ._tl import (
    accumulator,
    cast,
    dot,
    dot_rounded,
    dot_split,
    keep_mask,
    keep_scale,
    load_stats,
    load_tile,
    tile_ptrs,
)
from .partial_sums import Partials, accumulator_dtype, chunks, sums

# Elements of x from which a skinny pass takes large tiles.
_LARGE = 1 << 25

# Columns of x up to which dF takes small ones: more programs side by side split the sum less.
_NARROW = 2048


def _skinny_tile(
    x: Tensor,
    factor: Tensor,
    *,
    grad: bool = False,
    with_ds: bool = False,
    with_stats: bool = False,
    split: bool = False,
) -> Tile:
    """The tile of x that meets all of, or a block of, the rank in one step of a skinny pass; `grad`: of `factor_grad`.

    Each block of rows reads the factor again and each block of columns s; larger blocks leave fewer programs, whose
    number splits the sum further: more partial sums. Beside few ranks the two cost the same for s at about
    sqrt(M K e / 2^11) rows, e the bytes of an element of the factor, and for dF at sqrt(M K / 2^9) columns.
    """
    kind = chip(x.device)
    if kind != "interpreter" and x.element_size() > 2:
        if split and kind != "sm90":  # three terms of either operand
            return Tile(64, 64, 0, 16, 8, 2)
        if kind in ("sm100", "sm120") and x.dtype is torch.float32:
            # Behind a dropout mask Triton 3.7 takes fp32 for TF32 in products of 64 rows, those of tcgen05.
            if precision(x.dtype) == "ieee":
                return Tile(64, 32, 0, 32, 8, 3) if grad else Tile(32, 64, 0, 32, 8, 3)
            return Tile(64, 32 if kind == "sm120" and with_stats else 64, 0, 32, 8, 2)
        # Three stages of fp64 do not fit 100 KiB.
        return Tile(64, 64, 0, 32, 8, 1 if x.element_size() == 8 else 2 if kind == "gfx9" else 3)
    num_stages = 2 if kind == "gfx9" else 3
    mixed = factor.dtype != x.dtype
    # Three terms of the factor beside 256 columns spill on AMD chips, of dF on tcgen05 and, at 64 rows, on wgmma.
    crowded = mixed and (kind == "gfx9" or (kind == "sm100" and grad))
    if factor.shape[1] <= 16 and not with_stats:
        if kind == "sm90" and mixed and (with_ds or not grad):
            # Timed on an H100: 6 to 40% less than with twice the rows or columns, though s or the factor is read twice
            # as often, from the second-level cache.
            return Tile(64, 128, 0, 16, 4, 3) if grad else Tile(128, 64, 0, 16, 8, 3)
        if (with_ds or x.numel() >= _LARGE) and not crowded:
            halved = with_ds if kind == "gfx9" else mixed and kind == "sm90"
            rows, cols = (32 if halved else 64, 256) if grad else (256, 64)
            return Tile(rows, cols, 0, 16, 8, 2 if kind in ("sm86", "sm120") else num_stages)
        if crowded and kind == "sm100":
            return Tile(64, 64, 0, 16, 8, num_stages)
        if crowded and with_ds:
            return Tile(32, 128, 0, 16, 8, num_stages)
        if mixed and kind in ("sm86", "sm120") and not grad:
            return Tile(128, 64, 0, 16, 8, num_stages)
    if not mixed:
        if with_ds:
            # Wide, because each block of columns leaves partial sums of ds.
            return Tile(64, 128 if kind == "gfx9" else 256, 0, 32, 8, num_stages)
        if grad and x.shape[1] <= _NARROW and factor.shape[1] <= 64:
            return Tile(64, 64, 0, 64, 4 if kind == "sm90" else 8, num_stages)
        # Of fp16, sm_80 spills beside 128 ranks and sm_100 with three stages of dF.
        rank, half = factor.shape[1], x.dtype is torch.float16
        narrow = kind in ("sm86", "sm120") or (kind in ("sm80", "gfx9") and half)
        stages = 2 if kind == "sm100" and half and grad and rank > 16 else num_stages
        return Tile(64, 128, 0, 64 if narrow else 128, 8, stages)
    # Three terms of the factor are alive at once; without wgmma each warp holds them all in registers.
    if kind in ("sm90", "interpreter") or with_ds:
        return Tile(64, 128, 0, 64, 8, num_stages)
    return Tile(32 if with_stats else 64, 64, 0, 32, 8, 2 if kind in ("sm86", "sm120") else num_stages)


def reads_dy_once(dy: Tensor, factor: Tensor) -> bool:
    """Whether ds comes with dB rather than from a second read of dy.

    Partial sums of ds, written and read, cost 4R/cols of dy's bytes (16-bit dy): at most half of a second read here. At
    R = 64 and 256 columns they would cost all of it.
    """
    return dy.element_size() == 2 and 8 * factor.shape[1] <= _skinny_tile(dy, factor, grad=True, with_ds=True).cols


@triton.jit
def _coefficient(scaling, scaling_ptr, DTYPE: tl.constexpr):
    return tl.full((), scaling, DTYPE) if scaling_ptr is None else tl.load(scaling_ptr).to(DTYPE)


@triton.jit(do_not_specialize=["threshold"])
def _shrink_kernel(
    x_ptr,
    f_ptr,
    s_ptr,
    scaling: tl.float64,
    scaling_ptr,
    seed_ptr,
    threshold,
    M,
    K,
    R,
    K_split,
    stride_xm,
    stride_xk,
    stride_fk,
    stride_fr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    X_UNIT: tl.constexpr,
    F_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s[split] = scaling · drop(x) F over the split's columns of x; s (splits, M, R)."""
    K = K // X_UNIT * X_UNIT
    R = R // R_UNIT * R_UNIT
    blocks_r = tl.cdiv(R, BLOCK_R)
    # Programs that share rows of x run side by side.
    row = tl.program_id(0) // blocks_r * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    DTYPE: tl.constexpr = s_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_M, BLOCK_R), DTYPE)
    for col in range(split * K_split, min((split + 1) * K_split, K), BLOCK_K):
        offs_k = col + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk, X_UNIT, WIDE)
        f = load_tile(f_ptr, offs_k, offs_r, K, R, stride_fk, stride_fr, F_UNIT, WIDE)
        if seed_ptr is not None:
            x = tl.where(keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_K), x, 0.0)
        acc = dot(x, f, acc, PRECISION)
    acc *= _coefficient(scaling, scaling_ptr, DTYPE)
    if seed_ptr is not None:
        acc *= keep_scale(threshold, DTYPE)

    s_ptr += split.to(tl.int64) * M * R
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    tl.store(tile_ptrs(s_ptr, offs_m, offs_r, R, 1, R_UNIT, WIDE), acc, mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _factor_grad_kernel(
    x_ptr,
    s_ptr,
    f_ptr,
    df_ptr,
    dbias_ptr,
    ds_ptr,
    stats_ptr,
    scaling: tl.float64,
    scaling_ptr,
    seed_ptr,
    threshold,
    M,
    K,
    R,
    M_split,
    stride_xm,
    stride_xk,
    stride_fk,
    stride_fr,
    stride_dfk,
    stride_dfr,
    SCALED: tl.constexpr,
    ROUND_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    X_UNIT: tl.constexpr,
    F_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Up to three results of one read of x, which is x itself (dA) or dy (dB, dbias, ds).

    df[split] = drop(x)ᵀ s and dbias[split] = Σ drop(x) over the split's rows, times scaling where SCALED; df
    (splits, K·R), dbias (splits, K). With stats (2, M), the rows' means and reciprocal deviations, x stands for
    (x - mean) · rstd.
    ds[block] = scaling · x F over the block's columns; ds (blocks of K, M, R), only where R fits one block.
    """
    K = K // X_UNIT * X_UNIT
    R = R // R_UNIT * R_UNIT
    blocks_r = tl.cdiv(R, BLOCK_R)
    block_k = tl.program_id(0) // blocks_r
    block_r = tl.program_id(0) % blocks_r
    col = block_k * BLOCK_K
    offs_k = col + tl.arange(0, BLOCK_K)
    offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    split = tl.program_id(1)
    X_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    DTYPE: tl.constexpr = accumulator(X_DTYPE)

    df = tl.zeros((BLOCK_K, BLOCK_R), DTYPE)
    dbias = tl.zeros((BLOCK_K,), DTYPE)
    if ds_ptr is not None:
        f = load_tile(f_ptr, offs_k, offs_r, K, R, stride_fk, stride_fr, F_UNIT, WIDE)
        ds_ptr += block_k.to(tl.int64) * M * R
    for row in range(split * M_split, min((split + 1) * M_split, M), BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk, X_UNIT, WIDE)
        if seed_ptr is not None:
            x = tl.where(keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_K), x, 0.0)
        if stats_ptr is not None:
            mean, rstd = load_stats(stats_ptr, offs_m, M)
            x = (x.to(DTYPE) - mean[:, None]) * rstd[:, None]
            if ROUND_S:
                x = cast(x, X_DTYPE)
        if df_ptr is not None:
            s = load_tile(s_ptr, offs_m, offs_r, M, R, R, 1, R_UNIT, WIDE)
            if ROUND_S:
                df = dot_rounded(tl.trans(x), s, df, X_DTYPE, PRECISION)
            else:
                df = dot_split(tl.trans(x), s, df, PRECISION)
        if dbias_ptr is not None:
            dbias += tl.sum(x.to(DTYPE), 0)
        if ds_ptr is not None:
            ds = dot(x, f, tl.zeros((BLOCK_M, BLOCK_R), DTYPE), PRECISION)
            ds *= _coefficient(scaling, scaling_ptr, DTYPE)
            mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
            tl.store(tile_ptrs(ds_ptr, offs_m, offs_r, R, 1, R_UNIT, WIDE), ds, mask=mask)

    coefficient = tl.full((), 1.0, DTYPE)
    if SCALED:
        coefficient = _coefficient(scaling, scaling_ptr, DTYPE)
    if seed_ptr is not None:
        coefficient *= keep_scale(threshold, DTYPE)
    if df_ptr is not None:
        df *= coefficient
        df_ptr += split.to(tl.int64) * K * R
        mask = mask_k[:, None] & (offs_r < R)[None, :]
        tl.store(tile_ptrs(df_ptr, offs_k, offs_r, stride_dfk, stride_dfr, min(X_UNIT, R_UNIT), WIDE), df, mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + split.to(tl.int64) * K + offs_k, dbias * coefficient, mask=mask_k & (block_r == 0))


def _scaling_arguments(scaling: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, scaling) if isinstance(scaling, Tensor) else (float(scaling), None)


@by_layout
def _shrink_plan(x: Tensor, factor: Tensor) -> tuple[Plan, int]:
    (M, K), R = x.shape, factor.shape[1]
    tile = _skinny_tile(x, factor)
    block_r = rank_block(R, tile)
    programs = cdiv(M, tile.rows) * cdiv(R, block_r)
    splits, K_split = chunks(K, tile.cols, programs)
    plan = Plan(
        _shrink_kernel,
        (programs, splits),
        M,
        K,
        R,
        K_split,
        *x.stride(),
        *factor.stride(),
        BLOCK_M=tile.rows,
        BLOCK_K=tile.cols,
        BLOCK_R=block_r,
        X_UNIT=unit(x, K),
        F_UNIT=unit(factor),
        R_UNIT=unit(R),
        WIDE=needs_int64(x, factor) or M * R > 2**31,
        PRECISION=precision(x.dtype),
        device=x.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return plan, splits


def shrink(
    x: Tensor, factor: Tensor, scaling: float | Tensor, threshold: int = 0, seed: Tensor | None = None
) -> Tensor:
    """scaling · drop(x) F; x (M, K), F (K, R)."""
    M, R = x.shape[0], factor.shape[1]
    plan, splits = _shrink_plan(x, factor)
    shape = (M, R) if splits == 1 else (splits, M, R)
    s: Any = torch.empty(shape, dtype=accumulator_dtype(x.dtype), device=x.device)
    plan(x, factor, s, *_scaling_arguments(scaling), seed, threshold)
    if splits > 1:
        (s,) = sums((s, s.dtype))
    return s


@by_layout
def _factor_grad_plan(
    x: Tensor, factor: Tensor, needs: tuple[bool, bool, bool], scaled: bool, split: bool, transposed: bool, stats: bool
) -> tuple[Plan, int, int]:
    need_df, _, need_ds = needs
    (M, K), R = x.shape, factor.shape[1]
    tile = _skinny_tile(x, factor, grad=True, with_ds=need_ds, with_stats=stats, split=split)
    block_r = rank_block(R, tile)
    blocks_k = cdiv(K, tile.cols)
    programs = blocks_k * cdiv(R, block_r)
    splits, M_split = chunks(M, tile.rows, programs)
    plan = Plan(
        _factor_grad_kernel,
        (programs, splits),
        M,
        K,
        R,
        M_split,
        *x.stride(),
        *factor.stride(),
        *((1, K) if transposed else (R, 1)),
        SCALED=scaled,
        ROUND_S=factor.dtype == x.dtype and not split,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.cols,
        BLOCK_R=block_r,
        X_UNIT=unit(x, K),
        F_UNIT=unit(factor),
        R_UNIT=unit(R),
        WIDE=needs_int64(x, factor) or ((need_df or need_ds) and M * R > 2**31),
        PRECISION=precision(x.dtype),
        device=x.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return plan, splits, blocks_k


def factor_grad(
    x: Tensor,
    s: Tensor | None,
    factor: Tensor,
    scaling: float | Tensor = 1.0,
    threshold: int = 0,
    seed: Tensor | None = None,
    *,
    scaled: bool = False,
    split: bool = False,
    transposed: bool = False,
    stats: Tensor | None = None,
    needs: tuple[bool, bool, bool],
) -> tuple[Partials, Partials, Partials]:
    """df = drop(x)ᵀ s, dbias = Σ_M drop(x) and ds = scaling · x F, those which `needs` asks for, for `sums` to add.

    x (M, K), s (M, R), F (K, R); df (K, R), or (R, K) where `transposed`. Where `scaled`, df and dbias are times
    scaling too, and both of F's type; otherwise dbias is of x's. Where `split`, products of fp32 operands run on 16-bit
    tensor cores. With stats (2, M), the rows' means and reciprocal deviations, x stands for (x - mean) · rstd, and df
    is not rounded to F's type.
    """
    need_df, need_dbias, need_ds = needs
    (M, K), R = x.shape, factor.shape[1]
    plan, splits, blocks_k = _factor_grad_plan(x, factor, needs, scaled, split, transposed, stats is not None)
    wide = accumulator_dtype(x.dtype)

    def partials(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=wide, device=x.device)

    df = (partials(splits, R, K) if transposed else partials(splits, K, R)) if need_df else None
    dbias = partials(splits, K) if need_dbias else None
    ds = partials(blocks_k, M, R) if need_ds else None
    plan(
        x,
        s if need_df else None,
        factor if need_ds else None,
        df,
        dbias,
        ds,
        stats,
        *_scaling_arguments(scaling),
        seed,
        threshold,
    )
    return (
        (df, factor.dtype if stats is None else wide),
        (dbias, factor.dtype if scaled else x.dtype),
        (ds, wide),
    )

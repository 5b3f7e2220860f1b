"""The gradients of the bottleneck adapter's weights, each split over the rows; formulas in `bottleneck_adapter`."""

import itertools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Tile, chip, launch, needs_int64, rank_block
from ._tl import cast, keep_mask, load_stats, load_tile, tile_ptrs
from .bottleneck_rows import Norm, adapter_tile, coefficients, dense, h_tile, load_row, norm_grad, operand, times
from .skinny import _chunks, _scaling_arguments, factor_grad


def _up_grad_tile(dy: Tensor, weight: Tensor, R: int, norm_after: Norm | None) -> Tile:
    """As `adapter_tile`; under LN_after the whole of Wu's tile, (cols, rank), stays in registers beside that of dWu."""
    tile, kind = adapter_tile(dy, weight, R, norm_after), chip(dy.device)
    if kind == "interpreter" or dy.element_size() > 2:
        return tile
    if norm_after is None:
        return tile if kind == "sm90" else replace(tile, rows=32)
    rows = 64 if weight.dtype == dy.dtype else 32 if R <= 64 else 16
    return replace(tile, rows=rows, rank=min(tile.rank, 64))


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
    stride_split,
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

    dwu (N, R), dbu, dw and db (N,) of each split lie stride_split behind those of the last; for a block of N and of R.
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
    coefficient, _ = coefficients(scaling, scaling_ptr, seed_ptr, threshold, DTYPE)
    sizes = (M, N, R)
    pointers = (act_ptr, wu_ptr, bu_ptr, residual_ptr, seed_ptr)

    dwu = tl.zeros((BLOCK_C, BLOCK_R), DTYPE)
    g_sum = tl.zeros(
        (BLOCK_M, BLOCK_C), DTYPE
    )  # one sum over rows, after the loop: there threads exchange what they have
    dw = tl.zeros((BLOCK_C,), DTYPE)
    db = tl.zeros((BLOCK_C,), DTYPE)
    for row in range(split * M_split, min((split + 1) * M_split, M), BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        g = load_tile(dy_ptr, offs_m, offs_n, M, N, stride_dym, 1, X_UNIT, WIDE)
        act = load_tile(act_ptr, offs_m, offs_r, M, R, R, 1, R_UNIT, WIDE)
        if after_w_ptr is not None:
            a, scale = operand(act, X_DTYPE, UP_SPLIT)
            mean, rstd = load_stats(stats_after_ptr, offs_m, M)
            hat = h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
            hat = (hat - mean[:, None]) * rstd[:, None]
            if dw_ptr is not None:
                dw += tl.sum(g.to(DTYPE) * hat, 0)
                db += tl.sum(g.to(DTYPE), 0)
            if sums_ptr is not None:
                sum_dy, sum_dy_hat = load_stats(sums_ptr, offs_m, M)
                g = norm_grad(g, hat, rstd, sum_dy, sum_dy_hat, load_row(after_w_ptr, offs_n, N, DTYPE))
                g = tl.where(mask_n[None, :], g, 0.0)
        if seed_ptr is not None:
            g = tl.where(keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_C), g, 0.0)
        if dwu_ptr is not None:
            dwu = times(tl.trans(g), act, dwu, X_DTYPE, SPLIT, PRECISION)
        if dbu_ptr is not None:
            g_sum += g.to(DTYPE)

    if dwu_ptr is not None:
        dwu_ptr += split.to(tl.int64) * stride_split
        mask = mask_n[:, None] & (offs_r < R)[None, :]
        tl.store(tile_ptrs(dwu_ptr, offs_n, offs_r, R, 1, R_UNIT, WIDE), dwu * coefficient, mask=mask)
    first = mask_n & (block_r == 0)
    if dbu_ptr is not None:
        dbu = tl.sum(g_sum, 0) * coefficient
        tl.store(dbu_ptr + split.to(tl.int64) * stride_split + offs_n, dbu, mask=first)
    if dw_ptr is not None:
        tl.store(dw_ptr + split.to(tl.int64) * stride_split + offs_n, dw, mask=first)
        tl.store(db_ptr + split.to(tl.int64) * stride_split + offs_n, db, mask=first)


@triton.jit
def _sum_up_grads_kernel(
    partials_ptr,
    dwu_ptr,
    dbu_ptr,
    dw_ptr,
    db_ptr,
    splits,
    size,
    end_dwu,
    end_dbu,
    end_dw,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sums over splits, in order, of partials (splits, size), whose rows hold dwu, dbu, dw and db side by side."""
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    for split in range(splits):
        acc += tl.load(partials_ptr + tl.cast(split, tl.int64) * size + index, mask=index < size, other=0.0)
    if dwu_ptr is not None:
        tl.store(dwu_ptr + index, cast(acc, dwu_ptr.dtype.element_ty), mask=index < end_dwu)
    if dbu_ptr is not None:
        mask = (index >= end_dwu) & (index < end_dbu)
        tl.store(dbu_ptr + index - end_dwu, cast(acc, dbu_ptr.dtype.element_ty), mask=mask)
    if dw_ptr is not None:
        mask = (index >= end_dbu) & (index < end_dw)
        tl.store(dw_ptr + index - end_dbu, cast(acc, dw_ptr.dtype.element_ty), mask=mask)
        mask = (index >= end_dw) & (index < size)
        tl.store(db_ptr + index - end_dw, cast(acc, db_ptr.dtype.element_ty), mask=mask)


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
            dwd = p * load_row(before_w_ptr, offs_k, K, DTYPE) + dbd * load_row(before_b_ptr, offs_k, K, DTYPE)
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


def up_grad(
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

    shapes = {"up_weight": (N, R), "up_bias": (N,), "norm_after": (N,)}
    names = ("up_weight", "up_bias", "norm_after", "norm_after")
    outs = [torch.empty(shapes[name], dtype=dtype, device=dy.device) if name in needs else None for name in names]
    ends = list(itertools.accumulate(0 if out is None else out.numel() for out in outs))
    partials = torch.empty((splits, ends[-1]), dtype=act.dtype, device=dy.device)
    starts = [0, *ends[:-1]]
    launch(
        _up_grad_kernel,
        (programs, splits),
        dy,
        residual,
        up_weight,
        *dense(up_bias, (norm_after or (None,))[0]),
        act,
        stats_after,
        sums,
        *(None if out is None else partials[:, start:] for out, start in zip(outs, starts, strict=True)),
        *_scaling_arguments(scaling),
        seed,
        threshold,
        M,
        N,
        R,
        M_split,
        ends[-1],
        dy.stride(0),
        0 if residual is None else residual.stride(0),
        **(constants | {"BLOCK_M": tile.rows, "BLOCK_C": tile.cols, "BLOCK_R": block_r, "BLOCKS_R": blocks_r}),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    launch(
        _sum_up_grads_kernel,
        (triton.cdiv(ends[-1], 1024),),
        partials,
        *outs,
        splits,
        ends[-1],
        *ends[:-1],
        BLOCK=1024,
        WIDE=ends[-1] >= 2**31,
        num_warps=4,
        num_stages=1,
    )
    dwu, dbu, dw, db = outs
    return {"up_weight": dwu, "up_bias": dbu, "norm_after": (dw, db)}


def down_grad(
    x: Tensor,
    dz: Tensor,
    dbd: Tensor,
    down_weight: Tensor,
    norm_before: Norm,
    stats_before: Tensor,
    needs: set[str],
) -> dict[str, Any]:
    """The gradients of Wd and of LN_before's parameters, from P = dzᵀ x̂."""
    weight, bias = dense(*norm_before)
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

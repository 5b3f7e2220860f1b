"""What LN_before makes of the bottleneck adapter's weight gradients; formulas in `bottleneck_adapter`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Plan, by_layout, cdiv, needs_int64
from ._tl import cast, load_tile, tile_ptrs
from .bottleneck_rows import Norm, dense, load_row


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


@by_layout
def _down_grad_plan(p: Tensor) -> Plan:
    R, K = p.shape
    return Plan(
        _down_grad_kernel,
        (cdiv(K, 128),),
        R,
        K,
        BLOCK_R=16,
        BLOCK_K=128,
        WIDE=needs_int64(p),
        device=p.device,
        num_warps=4,
        num_stages=1,
    )


def down_grad(p: Tensor, dbd: Tensor, down_weight: Tensor, norm_before: Norm, needs: set[str]) -> dict[str, Any]:
    """The gradients of Wd and of LN_before's parameters; p = dzᵀ x̂ (R, K), dbd (R,)."""
    weight, bias = dense(*norm_before)
    dwd = torch.empty_like(down_weight) if "down_weight" in needs else None
    dw, db = (torch.empty_like(weight) if "norm_before" in needs else None for _ in range(2))
    _down_grad_plan(p)(p, dbd, down_weight, weight, bias, dwd, dw, db)
    return {"down_weight": dwd, "norm_before": (dw, db)}

"""Wide matrices (M, N) with a term of rank R, [mask / (1 - p)] ∘ (s F); s (M, R), F (R, N).

    out  = x G + bias + [mask / (1 - p)] ∘ (s F)    `matmul`, which serves y and dx
    out += [mask / (1 - p)] ∘ (s F)                 `update`, after the vendor's matmul

Accumulated in fp32 (fp64 for fp64). s and F are rounded to the type of `out`, so that 16-bit tensor cores serve.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import Plan, Tile, by_layout, cdiv, chip, needs_int64, precision, rank_block, unit
from ._tl import accumulator, cast, dot, dot_rounded, keep_mask, keep_scale, load_tile, swizzle, tile_ptrs

# What `matmul` takes by name beside its own tile, for ranks of one block: with smaller tiles a result of few rows has
# enough programs. Whether one is faster is for a measurement on the device to say.
_NAMED_TILES = {"128x128": Tile(128, 128, 64, 64, 8, 3), "64x128": Tile(64, 128, 64, 64, 4, 3)}

# Its own tile, with x and G read by the tensor memory accelerator. Compiled by Triton 3.7.1 for sm_90, bf16 and R = 16,
# a step of the loop is 91 instructions for y and 86 for dx instead of 143 and 138; a persistent variant, whose loop
# spans tiles and carries the low-rank term along, took 236. Not timed.
TMA = "tma"


def named_tiles(x: Tensor, R: int) -> list[str]:
    """The names of the tiles other than its own that `matmul` may be given for x (M, K) and rank R."""
    kind = chip(x.device)
    if R > 64 or kind == "gfx9" or (kind != "interpreter" and x.element_size() > 2):
        return []
    names = [name for name, tile in _NAMED_TILES.items() if tile != _matmul_tile(x, R)]
    if kind == "sm100":
        names.remove("128x128")  # which spills fp16 there
    return [*names, TMA] if kind == "sm90" else names


def _matmul_tile(x: Tensor, R: int, name: str = "") -> Tile:
    if name and name != TMA:
        return _NAMED_TILES[name]
    kind = chip(x.device)
    if kind != "interpreter" and x.element_size() > 2:
        if precision(x.dtype) != "tf32":
            return Tile(64, 64, 16, 16, 8, 3)
        return Tile(128, 128, 16 if kind == "sm120" else 32, 32, 8, 2 if kind == "sm100" else 3)
    if kind in ("sm86", "sm120") and R > 64:  # fp32 factors take up to 160 KiB with blocks of 64
        return Tile(128, 128, 64, 32, 8, 3)
    # Beside 256 columns several blocks of the rank spill up to 3 KB on sm_90, and fp32 factors overflow shared memory.
    if kind in ("sm80", "sm86", "sm120") or (R > 64 and kind != "gfx9"):
        return Tile(128, 128, 64, 64, 8, 3)
    if kind == "gfx9":
        return Tile(256, 128, 64, 64, 8, 2) if R <= 64 else Tile(128, 128, 64, 32, 8, 2)
    return Tile(128, 256, 64, 64, 8, 4 if kind == "sm90" and R <= 16 else 3)


def _update_tile(out: Tensor) -> Tile:
    kind = chip(out.device)
    if kind != "interpreter" and out.element_size() > 2:
        return Tile(64, 64, 0, 16, 8, 1)
    return Tile(64, 128, 0, 32 if kind == "sm120" else 64, 8, 1)


@triton.jit
def _low_rank_tile(
    s_ptr,
    f_ptr,
    seed_ptr,
    threshold,
    row,
    col,
    M,
    N,
    R,
    stride_fr,
    stride_fn,
    OPERAND: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    F_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[mask / (1 - p)] ∘ (s F) at (row, col), both operands rounded to OPERAND."""
    R = R // R_UNIT * R_UNIT
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for block_r in range(BLOCKS_R):
        offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
        s = load_tile(s_ptr, offs_m, offs_r, M, R, R, 1, R_UNIT, WIDE)
        f = load_tile(f_ptr, offs_r, offs_n, R, N, stride_fr, stride_fn, F_UNIT, WIDE)
        acc = dot_rounded(s, f, acc, OPERAND, PRECISION)
    if seed_ptr is not None:
        keep = keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * keep_scale(threshold, DTYPE), 0.0)
    return acc


@triton.jit(do_not_specialize=["threshold"])
def _matmul_kernel(
    x_ptr,
    g_ptr,
    bias_ptr,
    s_ptr,
    f_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_gk,
    stride_gn,
    stride_fr,
    stride_fn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    X_UNIT: tl.constexpr,
    F_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x G + bias + [mask / (1 - p)] ∘ (s F); x (M, K), G (K, N), s (M, R), F (R, N).

    y and dx are both of this form. The low-rank term comes first, so that a single accumulator is alive: masked
    after the loop it would be a second one, and spill. Where DESCRIBED, x and G are tensor descriptors, which read
    zeros past the end: "KN" has G as it is, "NK" its transpose.
    """
    K = K // X_UNIT * X_UNIT
    N = N // X_UNIT * X_UNIT
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = pid_m * BLOCK_M
    col = pid_n * BLOCK_N
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_N)
    X_DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    DTYPE: tl.constexpr = accumulator(X_DTYPE)

    acc = _low_rank_tile(
        s_ptr,
        f_ptr,
        seed_ptr,
        threshold,
        row,
        col,
        M,
        N,
        R,
        stride_fr,
        stride_fn,
        X_DTYPE,
        DTYPE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        BLOCKS_R,
        F_UNIT,
        R_UNIT,
        WIDE,
        PRECISION,
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(DTYPE)[None, :]
    if DESCRIBED != "":
        for k in range(0, K, BLOCK_K):
            g = g_ptr.load([k, col]) if DESCRIBED == "KN" else tl.trans(g_ptr.load([col, k]))
            acc = dot(x_ptr.load([row, k]), g, acc, PRECISION)
    else:
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = tile_ptrs(x_ptr, offs_m, offs_k, stride_xm, stride_xk, X_UNIT, WIDE)
        g_ptrs = tile_ptrs(g_ptr, offs_k, offs_n, stride_gk, stride_gn, X_UNIT, WIDE)
        step_x = BLOCK_K * tl.cast(stride_xk, tl.int64 if WIDE else tl.int32)
        step_g = BLOCK_K * tl.cast(stride_gk, tl.int64 if WIDE else tl.int32)
        for k in range(0, K, BLOCK_K):
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
            g = tl.load(g_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
            acc = dot(x, g, acc, PRECISION)
            x_ptrs += step_x
            g_ptrs += step_g

    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(tile_ptrs(out_ptr, offs_m, offs_n, N, 1, X_UNIT, WIDE), cast(acc, X_DTYPE), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _update_kernel(
    out_ptr,
    s_ptr,
    f_ptr,
    seed_ptr,
    threshold,
    M,
    N,
    R,
    stride_fr,
    stride_fn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    X_UNIT: tl.constexpr,
    F_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out += [mask / (1 - p)] ∘ (s F); out (M, N) contiguous, s (M, R), F (R, N)."""
    N = N // X_UNIT * X_UNIT
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // blocks_n * BLOCK_M
    col = tl.program_id(0) % blocks_n * BLOCK_N
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_N)
    OUT_DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    DTYPE: tl.constexpr = accumulator(OUT_DTYPE)

    acc = _low_rank_tile(
        s_ptr,
        f_ptr,
        seed_ptr,
        threshold,
        row,
        col,
        M,
        N,
        R,
        stride_fr,
        stride_fn,
        OUT_DTYPE,
        DTYPE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        BLOCKS_R,
        F_UNIT,
        R_UNIT,
        WIDE,
        PRECISION,
    )
    acc += load_tile(out_ptr, offs_m, offs_n, M, N, N, 1, X_UNIT, WIDE).to(DTYPE)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(tile_ptrs(out_ptr, offs_m, offs_n, N, 1, X_UNIT, WIDE), cast(acc, OUT_DTYPE), mask=mask)


@by_layout
def _matmul_plan(x: Tensor, g: Tensor, factor: Tensor, tile_name: str, described: str) -> Plan:
    (M, K), (R, N) = x.shape, factor.shape
    tile = _matmul_tile(x, R, tile_name)
    block_r = rank_block(R, tile)
    return Plan(
        _matmul_kernel,
        (cdiv(M, tile.rows) * cdiv(N, tile.cols),),
        M,
        N,
        K,
        R,
        *x.stride(),
        *g.stride(),
        *factor.stride(),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.inner,
        BLOCK_R=block_r,
        BLOCKS_R=cdiv(R, block_r),
        GROUP_M=8,
        X_UNIT=unit(x, g, K, N),
        F_UNIT=unit(factor),
        R_UNIT=unit(R),
        DESCRIBED=described,
        WIDE=needs_int64(x, g, factor) or M * max(N, R) > 2**31,
        PRECISION=precision(x.dtype),
        device=x.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def matmul(
    x: Tensor,
    g: Tensor,
    bias: Tensor | None,
    s: Tensor,
    factor: Tensor,
    threshold: int = 0,
    seed: Tensor | None = None,
    *,
    tile_name: str = "",
) -> Tensor:
    """x G + bias + [mask / (1 - p)] ∘ (s F); x (M, K), G (K, N), s (M, R), F (R, N).

    The tile is the one that `tile_name`, one of `named_tiles`, stands for, and the launcher's own where it is empty.
    """
    out = torch.empty((x.shape[0], factor.shape[1]), dtype=x.dtype, device=x.device)
    described = ""
    if tile_name == TMA and _can_be_described(x):
        described = "KN" if _can_be_described(g) else "NK" if _can_be_described(g.mT) else ""
    plan = _matmul_plan(x, g, factor, tile_name, described)
    left: Any = x
    right: Any = g
    if described:
        rows, cols, inner = (plan.constexprs[f"BLOCK_{name}"] for name in "MNK")
        left = TensorDescriptor.from_tensor(x, [rows, inner])
        right = g if described == "KN" else g.mT
        right = TensorDescriptor.from_tensor(right, [inner, cols] if described == "KN" else [cols, inner])
    plan(left, right, bias, s, factor, out, seed, threshold)
    return out


def _can_be_described(x: Tensor) -> bool:
    """Whether a tensor descriptor can: rows without gaps that start at multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and x.stride(0) > 0 and aligned and x.numel() > 0


@by_layout
def _update_plan(out: Tensor, factor: Tensor) -> Plan:
    M, (R, N) = out.shape[0], factor.shape
    tile = _update_tile(out)
    block_r = rank_block(R, tile)
    return Plan(
        _update_kernel,
        (cdiv(M, tile.rows) * cdiv(N, tile.cols),),
        M,
        N,
        R,
        *factor.stride(),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_R=block_r,
        BLOCKS_R=cdiv(R, block_r),
        X_UNIT=unit(out, N),
        F_UNIT=unit(factor),
        R_UNIT=unit(R),
        WIDE=needs_int64(out, factor) or M * R > 2**31,
        PRECISION=precision(out.dtype),
        device=out.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def update(out: Tensor, s: Tensor, factor: Tensor, threshold: int = 0, seed: Tensor | None = None) -> Tensor:
    """out + [mask / (1 - p)] ∘ (s F), in place; out (M, N) contiguous, s (M, R), F (R, N)."""
    _update_plan(out, factor)(out, s, factor, seed, threshold)
    return out

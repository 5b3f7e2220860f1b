"""LoRA linear layer: y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ (Hu et al. 2021), forward and backward.

Shapes: x (M, K), weight W (N, K), lora_a A (R, K), lora_b B (N, R), bias (N,), y and dy (M, N).
drop(x) = mask∘x / (1 - p). The graph is cut at the two small tensors, both fp32 (fp64 for fp64) with scaling in them:

    s  = scaling · drop(x) Aᵀ  (M, R)    forward, one read of x; saved
    y  = x Wᵀ + bias + s Bᵀ
    ds = scaling · dy B        (M, R)    backward
    dB = dyᵀ s,  dbias = Σ_M dy          in the same read of dy
    dx = dy W + mask∘(ds A) / (1 - p)
    dA = dsᵀ drop(x)                     one read of x

Saved: x, s and the seed, never the mask or drop(x); each kernel draws the mask again. s, y, ds and dx are
products of a tall matrix and a "factor", given as F (inner, outer); A and B enter as Aᵀ, Bᵀ or as they are,
which is only a matter of strides.

Everything accumulates in fp32 (fp64 for fp64). With fp32 factors for a 16-bit activation s, ds, dA and dB have
fp32's accuracy (`_tl.dot`); with factors of the activation's type dA and dB take s and ds rounded to that type, as
stock does. s Bᵀ and ds A end in y and dx, so both operands are rounded to the type of y and dx. Sums that several
programs share are written as partial sums and added in a fixed order: no atomics.

`plan` "fused": one Triton matmul with the low-rank term, serving y and dx. "split": the vendor's matmul, then a
rank-R update in place.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import chip, launch, needs_int64, unit
from ._tl import accumulator, cast, dot, keep_mask, keep_scale, load_tile, swizzle, tile_ptrs

# Programs that a skinny pass is split into: about two for each multiprocessor of a large chip. A constant, so that
# a sum has the same bits on every chip.
_PROGRAMS = 256


@dataclass(frozen=True)
class _Tile:
    """A rows×cols tile of the result or of the tall operand, `inner` elements of K and `rank` of R a step."""

    rows: int
    cols: int
    inner: int
    rank: int
    num_warps: int
    num_stages: int


# Tiles are the largest that ptxas compiles without stack or spills for ranks up to 384, with and without dropout
# (tests/test_codegen_lora_linear.py holds them to it). They were read off compiled code, not timed. fp32 means IEEE
# dots on the ordinary cores, whose operands are registers: small tiles.


def _matmul_tile(x: Tensor) -> _Tile:
    kind = chip(x.device)
    if kind != "interpreter" and x.element_size() > 2:
        return _Tile(128, 128, 32, 32, 8, 3) if _precision(x.dtype) == "tf32" else _Tile(64, 64, 16, 16, 8, 3)
    if kind in ("sm80", "sm86"):
        return _Tile(128, 128, 64, 64, 8, 3)
    if kind == "gfx9":
        return _Tile(256, 128, 64, 64, 8, 2)
    return _Tile(128, 256, 64, 64, 8, 3)


def _update_tile(out: Tensor) -> _Tile:
    if chip(out.device) != "interpreter" and out.element_size() > 2:
        return _Tile(64, 64, 0, 16, 8, 1)
    return _Tile(64, 128, 0, 64, 8, 1)


def _skinny_tile(x: Tensor, factor: Tensor, *, with_ds: bool = False) -> _Tile:
    """The tile of x that meets all of, or a block of, the rank in one step of a skinny pass."""
    kind = chip(x.device)
    if kind != "interpreter" and x.element_size() > 2:
        return _Tile(64, 64, 0, 32, 8, 3)
    num_stages = 2 if kind == "gfx9" else 3
    if factor.dtype == x.dtype:
        if with_ds:
            # Wide, because each block of columns leaves partial sums of ds.
            return _Tile(64, 256, 0, 32, 8, num_stages)
        return _Tile(64, 128, 0, 64 if kind == "sm86" else 128, 8, num_stages)
    # Three terms of the factor are alive at once; without wgmma each warp holds them all in registers.
    if kind in ("sm90", "interpreter") or with_ds:
        return _Tile(64, 128, 0, 64, 8, num_stages)
    return _Tile(64, 64, 0, 32, 8, num_stages)


def _reads_dy_once(dy: Tensor, factor: Tensor) -> bool:
    """Whether ds comes with dB rather than from a second read of dy.

    Partial sums of ds, written and read, cost 4R/cols of dy's bytes (16-bit dy): at most half of a second read.
    """
    return dy.element_size() == 2 and 8 * factor.shape[1] <= _skinny_tile(dy, factor, with_ds=True).cols


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
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s[split] = scaling · drop(x) F over the split's columns of x; s (splits, M, R)."""
    K = K // X_UNIT * X_UNIT
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
    tl.store(tile_ptrs(s_ptr, offs_m, offs_r, R, 1, 1, WIDE), acc, mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _factor_grad_kernel(
    x_ptr,
    s_ptr,
    f_ptr,
    df_ptr,
    dbias_ptr,
    ds_ptr,
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
    ROUND_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    X_UNIT: tl.constexpr,
    F_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Up to three results of one read of x, which is x itself (dA) or dy (dB, dbias, ds).

    df[split] = drop(x)ᵀ s and dbias[split] = Σ x over the split's rows; df (splits, K·R), dbias (splits, K).
    ds[block] = scaling · x F over the block's columns; ds (blocks of K, M, R), only where R fits one block.
    """
    K = K // X_UNIT * X_UNIT
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
        if df_ptr is not None:
            s = load_tile(s_ptr, offs_m, offs_r, M, R, R, 1, 1, WIDE)
            if ROUND_S:
                s = cast(s, X_DTYPE)
            df = dot(tl.trans(x), s, df, PRECISION)
        if dbias_ptr is not None:
            dbias += tl.sum(x.to(DTYPE), 0)
        if ds_ptr is not None:
            ds = dot(x, f, tl.zeros((BLOCK_M, BLOCK_R), DTYPE), PRECISION)
            ds *= _coefficient(scaling, scaling_ptr, DTYPE)
            mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
            tl.store(tile_ptrs(ds_ptr, offs_m, offs_r, R, 1, 1, WIDE), ds, mask=mask)

    if df_ptr is not None:
        if seed_ptr is not None:
            df *= keep_scale(threshold, DTYPE)
        df_ptr += split.to(tl.int64) * K * R
        mask = mask_k[:, None] & (offs_r < R)[None, :]
        tl.store(tile_ptrs(df_ptr, offs_k, offs_r, stride_dfk, stride_dfr, 1, WIDE), df, mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + split.to(tl.int64) * K + offs_k, dbias, mask=mask_k & (block_r == 0))


@triton.jit
def _sum_partials_kernel(partials_ptr, out_ptr, count, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """out = Σ partials over their first dimension, in order; partials (count, size)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    acc = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    for i in range(count):
        acc += tl.load(partials_ptr + tl.cast(i, tl.int64) * size + index, mask=mask, other=0.0)
    tl.store(out_ptr + index, cast(acc, out_ptr.dtype.element_ty), mask=mask)


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
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[mask / (1 - p)] ∘ (s F) at (row, col), both operands rounded to OPERAND."""
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for block_r in range(BLOCKS_R):
        offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
        s = load_tile(s_ptr, offs_m, offs_r, M, R, R, 1, 1, WIDE)
        f = load_tile(f_ptr, offs_r, offs_n, R, N, stride_fr, stride_fn, F_UNIT, WIDE)
        acc = dot(cast(s, OPERAND), cast(f, OPERAND), acc, PRECISION)
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
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x G + bias + [mask / (1 - p)] ∘ (s F); x (M, K), G (K, N), s (M, R), F (R, N).

    y and dx are both of this form. The low-rank term comes first, so that a single accumulator is alive: masked
    after the loop it would be a second one, and spill.
    """
    K = K // X_UNIT * X_UNIT
    N = N // X_UNIT * X_UNIT
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = pid_m * BLOCK_M
    col = pid_n * BLOCK_N
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_N)
    X_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
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
        WIDE,
        PRECISION,
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(DTYPE)[None, :]
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
        WIDE,
        PRECISION,
    )
    acc += load_tile(out_ptr, offs_m, offs_n, M, N, N, 1, X_UNIT, WIDE).to(DTYPE)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(tile_ptrs(out_ptr, offs_m, offs_n, N, 1, X_UNIT, WIDE), cast(acc, OUT_DTYPE), mask=mask)


def _block_r(R: int, tile: _Tile) -> int:
    # Tensor cores want at least 16 of the rank, as a reduction length as well as a width.
    return min(max(16, triton.next_power_of_2(R)), tile.rank)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _precision(dtype: torch.dtype) -> str:
    """TF32 only where torch's own switch asks for it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _scaling_arguments(scaling: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)


def _chunks(length: int, block: int, programs: int) -> tuple[int, int]:
    """(number, size) of the pieces, whole blocks each, into which `programs` programs split `length` further."""
    size = block * triton.cdiv(triton.cdiv(length, block), max(1, _PROGRAMS // max(1, programs)))
    return max(1, triton.cdiv(length, max(1, size))), max(1, size)


def _sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension of `partials`."""
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    launch(
        _sum_partials_kernel,
        (triton.cdiv(out.numel(), 1024),),
        partials,
        out,
        partials.shape[0],
        out.numel(),
        BLOCK=1024,
        WIDE=needs_int64(out),
        num_warps=4,
        num_stages=1,
    )
    return out


def _shrink(
    x: Tensor, factor: Tensor, scaling: float | Tensor, threshold: int = 0, seed: Tensor | None = None
) -> Tensor:
    """scaling · drop(x) F; x (M, K), F (K, R)."""
    (M, K), R = x.shape, factor.shape[1]
    tile = _skinny_tile(x, factor)
    block_r = _block_r(R, tile)
    programs = triton.cdiv(M, tile.rows) * triton.cdiv(R, block_r)
    splits, K_split = _chunks(K, tile.cols, programs)
    s = torch.empty((splits * M, R), dtype=_accumulator(x.dtype), device=x.device)
    launch(
        _shrink_kernel,
        (programs, splits),
        x,
        factor,
        s,
        *_scaling_arguments(scaling),
        seed,
        threshold,
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
        WIDE=needs_int64(x, factor, s[:M]),
        PRECISION=_precision(x.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return s if splits == 1 else _sum_partials(s.view(splits, M, R), s.dtype)


def _factor_grad(
    x: Tensor,
    s: Tensor | None,
    factor: Tensor,
    scaling: float | Tensor = 1.0,
    threshold: int = 0,
    seed: Tensor | None = None,
    *,
    transposed: bool = False,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """df = drop(x)ᵀ s, dbias = Σ_M x and ds = scaling · x F, those which `needs` asks for.

    x (M, K), s (M, R), F (K, R); df (K, R), or (R, K) where `transposed`.
    """
    need_df, need_dbias, need_ds = needs
    (M, K), R = x.shape, factor.shape[1]
    tile = _skinny_tile(x, factor, with_ds=need_ds)
    block_r = _block_r(R, tile)
    blocks_k = triton.cdiv(K, tile.cols)
    programs = blocks_k * triton.cdiv(R, block_r)
    splits, M_split = _chunks(M, tile.rows, programs)

    def partials(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=_accumulator(x.dtype), device=x.device)

    df = (partials(splits, R, K) if transposed else partials(splits, K, R)) if need_df else None
    dbias = partials(splits, K) if need_dbias else None
    ds = partials(blocks_k, M, R) if need_ds else None
    launch(
        _factor_grad_kernel,
        (programs, splits),
        x,
        s if need_df else None,
        factor if need_ds else None,
        df,
        dbias,
        ds,
        *_scaling_arguments(scaling),
        seed,
        threshold,
        M,
        K,
        R,
        M_split,
        *x.stride(),
        *factor.stride(),
        *((1, K) if transposed else (R, 1)),
        ROUND_S=factor.dtype == x.dtype,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.cols,
        BLOCK_R=block_r,
        X_UNIT=unit(x, K),
        F_UNIT=unit(factor),
        WIDE=needs_int64(x, factor, s),
        PRECISION=_precision(x.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return (
        None if df is None else _sum_partials(df, factor.dtype),
        None if dbias is None else _sum_partials(dbias, x.dtype),
        None if ds is None else _sum_partials(ds, ds.dtype),
    )


def _matmul(
    x: Tensor,
    g: Tensor,
    bias: Tensor | None,
    s: Tensor,
    factor: Tensor,
    threshold: int = 0,
    seed: Tensor | None = None,
) -> Tensor:
    """x G + bias + [mask / (1 - p)] ∘ (s F); x (M, K), G (K, N), s (M, R), F (R, N)."""
    (M, K), (R, N) = x.shape, factor.shape
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    tile = _matmul_tile(x)
    block_r = _block_r(R, tile)
    launch(
        _matmul_kernel,
        (triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.cols),),
        x,
        g,
        bias,
        s,
        factor,
        out,
        seed,
        threshold,
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
        BLOCKS_R=triton.cdiv(R, block_r),
        GROUP_M=8,
        X_UNIT=unit(x, g, out, K, N),
        F_UNIT=unit(factor),
        WIDE=needs_int64(x, g, s, factor, out),
        PRECISION=_precision(x.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _update(out: Tensor, s: Tensor, factor: Tensor, threshold: int = 0, seed: Tensor | None = None) -> Tensor:
    """out + [mask / (1 - p)] ∘ (s F), in place; out (M, N) contiguous, s (M, R), F (R, N)."""
    M, (R, N) = s.shape[0], factor.shape
    tile = _update_tile(out)
    block_r = _block_r(R, tile)
    launch(
        _update_kernel,
        (triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.cols),),
        out,
        s,
        factor,
        seed,
        threshold,
        M,
        N,
        R,
        *factor.stride(),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_R=block_r,
        BLOCKS_R=triton.cdiv(R, block_r),
        X_UNIT=unit(out, N),
        F_UNIT=unit(factor),
        WIDE=needs_int64(out, s, factor),
        PRECISION=_precision(out.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def lora_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
    seed: Tensor | None,
    *,
    plan: str,
) -> tuple[Tensor, Tensor]:
    """(y, s). Drops where a 16-bit word is below `threshold`; `scaling` may be a tensor on x's device."""
    seed = seed if threshold else None
    s = _shrink(x, lora_a.mT, scaling, threshold, seed)
    if plan == "fused":
        return _matmul(x, weight.mT, bias, s, lora_b.mT), s
    assert plan == "split", plan
    return _update(F.linear(x, weight, bias), s, lora_b.mT), s


def lora_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scaling: float | Tensor,
    threshold: int,
    seed: Tensor | None,
    *,
    needs: tuple[bool, bool, bool, bool],
    plan: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, da, db, dbias), None where `needs` says so."""
    need_dx, need_da, need_db, need_dbias = needs
    need_ds = need_dx or need_da
    seed = seed if threshold else None
    dx = da = db = dbias = ds = None

    if need_db or need_dbias:
        with_ds = need_ds and _reads_dy_once(dy, lora_b)
        db, dbias, ds = _factor_grad(dy, s, lora_b, scaling, needs=(need_db, need_dbias, with_ds))
    if need_ds and ds is None:
        ds = _shrink(dy, lora_b, scaling)
    if need_da:
        da, _, _ = _factor_grad(
            x, ds, lora_a.mT, threshold=threshold, seed=seed, transposed=True, needs=(True, False, False)
        )
    if need_dx and plan == "fused":
        dx = _matmul(dy, weight, None, ds, lora_a, threshold, seed)
    elif need_dx:
        assert plan == "split", plan
        dx = _update(torch.mm(dy, weight), ds, lora_a, threshold, seed)
    return dx, da, db, dbias

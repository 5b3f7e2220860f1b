"""The walks of the bottleneck adapter over a block of rows, forward and backward; formulas in `bottleneck_adapter`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate, activation_grad
from ._launch import Tile, chip, precision
from ._tl import cast, dot_rounded, dot_split, keep_mask, keep_scale, load_stats, load_tile, normalized, tile_ptrs
from .skinny import _coefficient

Norm = tuple[Tensor, Tensor]


_ROWS_TO_FILL = 4096  # with blocks of 32 rows, all multiprocessors of a large chip


# As in `_launch` tiles that ptxas compiles without stack or spills, which tests/test_codegen.py holds them to. Those of
# sm90 are timed on an H100: what counts is how many programs run side by side, as each waits for memory at every step.
# The others are the largest, read off compiled code.
def adapter_tile(x: Tensor, weight: Tensor, R: int, norm_before: bool, norm_after: bool) -> Tile:
    """A block of rows, and the columns of K or N and the block of R that a step takes."""
    kind = chip(x.device)
    if kind == "interpreter":
        return Tile(32, 128, 0, 64, 4, 1)
    if x.element_size() > 2:
        # Of 8 warps with 32 columns sm_80's and sm_86's ptxas gives the kernels without LN_after 40 or 48 registers and
        # spills; with 64, in IEEE products, sm_86's does too.
        tf32 = precision(x.dtype) == "tf32"
        plain = x.dtype is torch.float32 and not norm_after
        wide = plain and (kind == "sm80" or (kind == "sm86" and tf32))
        few = (plain and not tf32) if kind == "sm86" else kind == "sm120" and not (tf32 and norm_after)
        return Tile(32, 64 if wide else 32, 0, 16, 4 if few else 8, 1)
    mixed = weight.dtype != x.dtype
    if kind == "sm90":
        if norm_after:
            if R > 64:
                return Tile(16, 32, 0, 64, 8, 2) if mixed else Tile(32, 32, 0, 64, 8, 2)
            return Tile(32, 64, 0, 64, 8, 2) if mixed else Tile(32, 64, 0, 64, 4, 3)
        if x.shape[0] < _ROWS_TO_FILL:
            return Tile(16, 256 if R <= 64 and not mixed else 64, 0, 64, 8, 3)
        if mixed:
            return Tile(32, 64, 0, 64, 4, 3) if R <= 64 else Tile(32, 64, 0, 64, 8, 2)
        return Tile(32, 256 if R <= 64 and not norm_before else 64, 0, 128, 4, 3)
    if not norm_after:
        if kind == "gfx9":
            return Tile(64, 64, 0, 32 if mixed else 128, 8, 2)
        if R <= 64 and x.shape[0] < _ROWS_TO_FILL and (kind == "sm80" or (kind == "sm100" and not mixed)):
            return Tile(16, 64 if kind == "sm80" else 256, 0, 64, 8, 3)
        # Where all of the rank fits a block, x is read once. Blackwell's ptxas spills a few bytes beside 32 rows.
        blackwell = kind in ("sm100", "sm120")
        if mixed:
            crowded = blackwell and norm_before and x.dtype is torch.bfloat16
            return Tile(16 if blackwell else 32, 64, 0, 32 if crowded else 64, 8, 2)
        if R <= 64 and not blackwell:
            return Tile(32, 64, 0, 128, 4, 3)
        # Triton 3.7 fails to compile backward's sums over rows beside tcgen05, which takes 64 rows: 32 take mma.sync.
        return Tile(32, 64, 0, 64 if kind == "sm120" else 128, 8, 3 if kind == "sm80" else 2)
    # h is alive beside its gradient.
    if mixed:
        return Tile(16 if kind == "sm100" else 64, 32, 0, 32, 8, 2)
    if kind == "sm100" or (kind == "sm120" and (R <= 64 or x.dtype is torch.float16)):
        return Tile(32, 32, 0, 64, 8 if x.dtype is torch.float16 and R <= 64 else 4, 2)
    narrow = kind == "gfx9" or (kind in ("sm80", "sm86") and x.dtype is torch.float16)
    return Tile(32, 32, 0, 64 if narrow else 128, 8, 2)


@triton.jit
def operand(a, DTYPE: tl.constexpr, SPLIT: tl.constexpr):
    """(a', scale) with a = a' · scale: fp32 where products are split, otherwise rounded to DTYPE whatever the range."""
    scale = tl.full((), 1.0, a.dtype)
    if not SPLIT:
        if tl.float16 == DTYPE:
            a, scale = normalized(a)
        a = cast(a, DTYPE)
    return a, scale


@triton.jit
def times(a, b, acc, DTYPE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, to fp32's accuracy where SPLIT, otherwise with operands rounded to DTYPE."""
    return dot_split(a, b, acc, PRECISION) if SPLIT else dot_rounded(a, b, acc, DTYPE, PRECISION)


@triton.jit
def load_row(ptr, cols, num_cols, DTYPE: tl.constexpr):
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
def h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG: tl.constexpr):
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
        h = times(a, tl.trans(w), h, X_DTYPE, SPLIT, PRECISION) * scale
    else:
        for block_r in range(BLOCKS_R):
            offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
            part = load_tile(act_ptr, offs_m, offs_r, M, R, R, 1, R_UNIT, WIDE)
            w = load_tile(wu_ptr, offs_n, offs_r, N, R, R, 1, R_UNIT, WIDE)
            h = times(part, tl.trans(w), h, X_DTYPE, SPLIT, PRECISION)
    if bu_ptr is not None:
        h += load_row(bu_ptr, offs_n, N, DTYPE)
    h *= coefficient
    if seed_ptr is not None:
        h = tl.where(keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_C), h, 0.0)
    if residual_ptr is not None:
        h += load_tile(residual_ptr, offs_m, offs_n, M, N, stride_rm, 1, X_UNIT, WIDE).to(DTYPE)
    return h


@triton.jit
def coefficients(scaling, scaling_ptr, seed_ptr, threshold, DTYPE: tl.constexpr):
    """scaling / (1 - p) and 1 / (1 - p)."""
    keep = tl.full((), 1.0, DTYPE)
    if seed_ptr is not None:
        keep = keep_scale(threshold, DTYPE)
    return _coefficient(scaling, scaling_ptr, DTYPE) * keep, keep


@triton.jit(do_not_specialize=["threshold"])
def adapter_fwd_kernel(
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
        # Of no columns 0 / 1, never 0 / 0.
        rstd = tl.rsqrt(rstd / max(K, 1) + tl.full((), eps, DTYPE))
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
                x = x * load_row(before_w_ptr, offs_k, K, DTYPE) + load_row(before_b_ptr, offs_k, K, DTYPE)
                if not SPLIT:
                    x = cast(x, X_DTYPE)
            z = times(x, tl.trans(w), z, X_DTYPE, SPLIT, PRECISION)
        if bd_ptr is not None:
            z += load_row(bd_ptr, offs_r, R, DTYPE)
        mask = mask_m[:, None] & (offs_r < R)[None, :]
        tl.store(tile_ptrs(z_ptr, offs_m, offs_r, R, 1, R_UNIT, WIDE), z, mask=mask)
        if BLOCKS_R > 1:
            tl.store(tile_ptrs(act_ptr, offs_m, offs_r, R, 1, R_UNIT, WIDE), activate(z, ACTIVATION), mask=mask)
    if BLOCKS_R > 1:
        tl.debug_barrier()
    a, scale = operand(activate(z, ACTIVATION), X_DTYPE, UP_SPLIT)

    coefficient, _ = coefficients(scaling, scaling_ptr, seed_ptr, threshold, DTYPE)
    sizes = (M, N, R)
    pointers = (act_ptr, wu_ptr, bu_ptr, None if RESIDUAL_AFTER_NORM else residual_ptr, seed_ptr)
    if after_w_ptr is not None:
        mean = tl.zeros((BLOCK_M,), DTYPE)
        rstd = tl.zeros((BLOCK_M,), DTYPE)
        for col in range(0, N, BLOCK_C):
            h = h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
            mean, rstd = _merge_stats(mean, rstd, h, col, N, BLOCK_C)
        rstd = tl.rsqrt(rstd / max(N, 1) + tl.full((), eps, DTYPE))
        tl.store(stats_after_ptr + offs_m, mean, mask=mask_m)
        tl.store(stats_after_ptr + M + offs_m, rstd, mask=mask_m)
    for col in range(0, N, BLOCK_C):
        offs_n = col + tl.arange(0, BLOCK_C)
        h = h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
        if after_w_ptr is not None:
            h = (h - mean[:, None]) * rstd[:, None]
            h = h * load_row(after_w_ptr, offs_n, N, DTYPE) + load_row(after_b_ptr, offs_n, N, DTYPE)
        if RESIDUAL_AFTER_NORM and residual_ptr is not None:
            h += load_tile(residual_ptr, offs_m, offs_n, M, N, stride_rm, 1, X_UNIT, WIDE).to(DTYPE)
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        tl.store(tile_ptrs(y_ptr, offs_m, offs_n, N, 1, X_UNIT, WIDE), cast(h, X_DTYPE), mask=mask)


@triton.jit
def norm_grad(dy, hat, rstd, sum_dy, sum_dy_hat, weight):
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
        dxn = times(dz, w, dxn, X_DTYPE, False, PRECISION) * scale
    else:
        for block_r in range(BLOCKS_R):
            offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
            part = load_tile(dz_ptr, row + tl.arange(0, BLOCK_M), offs_r, M, R, R, 1, R_UNIT, WIDE)
            w = load_tile(wd_ptr, offs_r, offs_k, R, K, K, 1, X_UNIT, WIDE)
            dxn = times(part, w, dxn, X_DTYPE, False, PRECISION)
    return dxn


@triton.jit(do_not_specialize=["threshold"])
def adapter_bwd_kernel(
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
    act_ptr,
    dz_ptr,
    dx_ptr,
    dh_ptr,
    after_dw_ptr,
    after_db_ptr,
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
    """What a block of rows gives: act(z) and dz (M, R), dx, and dh (M, N) where there is LN_after.

    And of all rows' sums its part: LN_after's dw and db (programs, N), dbd (programs, R), dscaling (programs,). SKIP is
    the gradient of the residual that dx takes up: "dy", "dh" or none. residual is read only where LN_after is taken
    over it.
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
    coefficient, keep = coefficients(scaling, scaling_ptr, seed_ptr, threshold, DTYPE)
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
        a, scale = operand(activate(z, ACTIVATION), X_DTYPE, UP_SPLIT)
        mean, rstd = load_stats(stats_after_ptr, offs_m, M)
        sum_dy = tl.zeros((BLOCK_M,), DTYPE)
        sum_dy_hat = tl.zeros((BLOCK_M,), DTYPE)
        for col in range(0, N, BLOCK_C):
            offs_n = col + tl.arange(0, BLOCK_C)
            hat = h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
            hat = (hat - mean[:, None]) * rstd[:, None]
            dy = load_tile(dy_ptr, offs_m, offs_n, M, N, stride_dym, 1, X_UNIT, WIDE).to(DTYPE)
            if after_dw_ptr is not None:
                part = pid.to(tl.int64) * N + offs_n
                tl.store(after_dw_ptr + part, tl.sum(dy * hat, 0), mask=offs_n < N)
                tl.store(after_db_ptr + part, tl.sum(dy, 0), mask=offs_n < N)
            dy *= load_row(after_w_ptr, offs_n, N, DTYPE)
            sum_dy += tl.sum(dy, 1)
            sum_dy_hat += tl.sum(dy * hat, 1)
        sum_dy /= max(N, 1)
        sum_dy_hat /= max(N, 1)

    dz = tl.zeros((BLOCK_M, BLOCK_R), DTYPE)
    dscaling = tl.zeros((BLOCK_M,), DTYPE)
    if NEED_DA or dh_ptr is not None:
        for block_r in range(BLOCKS_R):
            offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
            da = tl.zeros((BLOCK_M, BLOCK_R), DTYPE)
            for col in range(0, N, BLOCK_C):
                offs_n = col + tl.arange(0, BLOCK_C)
                g = load_tile(dy_ptr, offs_m, offs_n, M, N, stride_dym, 1, X_UNIT, WIDE)
                if after_w_ptr is not None:
                    hat = h_tile(a, scale, row, col, sizes, pointers, coefficient, threshold, stride_rm, CONFIG)
                    hat = (hat - mean[:, None]) * rstd[:, None]
                    weight = load_row(after_w_ptr, offs_n, N, DTYPE)
                    g = norm_grad(g, hat, rstd, sum_dy, sum_dy_hat, weight)
                    g = tl.where((offs_n < N)[None, :], g, 0.0)
                    if dh_ptr is not None:
                        mask = mask_m[:, None] & (offs_n < N)[None, :] & (block_r == 0)
                        out_ptrs = tile_ptrs(dh_ptr, offs_m, offs_n, N, 1, X_UNIT, WIDE)
                        tl.store(out_ptrs, cast(g, dh_ptr.dtype.element_ty), mask=mask)
                if seed_ptr is not None:
                    g = tl.where(keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_C), g, 0.0)
                if NEED_DA:
                    w = load_tile(wu_ptr, offs_n, offs_r, N, R, R, 1, R_UNIT, WIDE)
                    da = times(g, w, da, X_DTYPE, SPLIT, PRECISION)
                if dscaling_ptr is not None and bu_ptr is not None:
                    of_bias = tl.sum(g.to(DTYPE) * load_row(bu_ptr, offs_n, N, DTYPE), 1)
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
        if BLOCKS_R > 1 or SKIP == "dh":
            tl.debug_barrier()
        dz, dz_scale = operand(dz, X_DTYPE, False)
        if before_w_ptr is not None:
            x_mean, x_rstd = load_stats(stats_before_ptr, offs_m, M)
            sum_dx = tl.zeros((BLOCK_M,), DTYPE)
            sum_dx_hat = tl.zeros((BLOCK_M,), DTYPE)
            for col in range(0, K, BLOCK_C):
                offs_k = col + tl.arange(0, BLOCK_C)
                dxn = _dxn_tile(dz, dz_scale, row, col, M, K, R, dz_ptr, wd_ptr, CONFIG)
                dxn *= load_row(before_w_ptr, offs_k, K, DTYPE)
                x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, 1, X_UNIT, WIDE).to(DTYPE)
                sum_dx += tl.sum(dxn, 1)
                sum_dx_hat += tl.sum(dxn * (x - x_mean[:, None]) * x_rstd[:, None], 1)
            sum_dx /= max(K, 1)
            sum_dx_hat /= max(K, 1)
        for col in range(0, K, BLOCK_C):
            offs_k = col + tl.arange(0, BLOCK_C)
            dx = _dxn_tile(dz, dz_scale, row, col, M, K, R, dz_ptr, wd_ptr, CONFIG)
            if before_w_ptr is not None:
                x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, 1, X_UNIT, WIDE).to(DTYPE)
                hat = (x - x_mean[:, None]) * x_rstd[:, None]
                dx = norm_grad(dx, hat, x_rstd, sum_dx, sum_dx_hat, load_row(before_w_ptr, offs_k, K, DTYPE))
            if SKIP == "dy":
                dx += load_tile(dy_ptr, offs_m, offs_k, M, N, stride_dym, 1, X_UNIT, WIDE).to(DTYPE)
            if SKIP == "dh":
                dx += load_tile(dh_ptr, offs_m, offs_k, M, N, N, 1, X_UNIT, WIDE).to(DTYPE)
            mask = mask_m[:, None] & (offs_k < K)[None, :]
            tl.store(tile_ptrs(dx_ptr, offs_m, offs_k, K, 1, X_UNIT, WIDE), cast(dx, X_DTYPE), mask=mask)


def dense(*vectors: Tensor | None) -> list[Tensor | None]:
    return [vector if vector is None else vector.contiguous() for vector in vectors]

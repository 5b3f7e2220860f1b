"""Closed forms of the kernels of a LoRA layer, launch by launch; `formulas` says of what."""

from typing import Any

from benchmarks._formulas_shared import Cost, cdiv, seed_bytes, size, split_terms, terms


def _shrink(a: Any) -> Cost:
    e, f, w, seed = size(a.x_ptr), size(a.f_ptr), size(a.s_ptr), seed_bytes(a)
    scale, splits = size(a.scaling_ptr), a.grid[1]
    rows, steps, blocks_r = cdiv(a.M, a.BLOCK_M), cdiv(a.K, a.BLOCK_K), cdiv(a.R, a.BLOCK_R)
    read = a.M * a.K * e + a.K * a.R * f + seed + scale
    written = splits * a.M * a.R * w
    asked = blocks_r * a.M * a.K * e + rows * a.K * a.R * f + rows * blocks_r * (steps * seed + splits * scale)
    products = rows * a.BLOCK_M * steps * a.BLOCK_K * blocks_r * a.BLOCK_R
    return read, written, asked + written, 2 * products * terms(a.x_ptr.dtype, a.f_ptr.dtype)


def _factor_grad(a: Any) -> Cost:
    e, f, seed, scale = size(a.x_ptr), size(a.f_ptr), seed_bytes(a), size(a.scaling_ptr)
    s, stats, splits = size(a.s_ptr), size(a.stats_ptr), a.grid[1]
    w = max(size(a.df_ptr), size(a.dbias_ptr), size(a.ds_ptr))
    rows, cols, blocks_r = cdiv(a.M, a.BLOCK_M), cdiv(a.K, a.BLOCK_K), cdiv(a.R, a.BLOCK_R)
    scale *= a.ds_ptr is not None or a.SCALED
    read = a.M * a.K * e + a.M * a.R * s + a.K * a.R * f + 2 * a.M * stats + seed + scale
    written = w * (
        splits * a.K * a.R * (a.df_ptr is not None)
        + splits * a.K * (a.dbias_ptr is not None)
        + cols * a.M * a.R * (a.ds_ptr is not None)
    )
    asked = blocks_r * a.M * a.K * e + cols * a.M * a.R * s + splits * a.K * a.R * f
    asked += cols * blocks_r * (2 * a.M * stats + rows * seed + (splits if a.SCALED else rows) * scale)
    products = rows * a.BLOCK_M * cols * a.BLOCK_K * blocks_r * a.BLOCK_R
    count = 0
    if a.df_ptr is not None:
        x = a.x_ptr.dtype if stats == 0 else a.stats_ptr.dtype
        count += 1 if a.ROUND_S else split_terms(x, a.s_ptr.dtype)
    if a.ds_ptr is not None:
        count += terms(a.x_ptr.dtype, a.f_ptr.dtype)
    return read, written, asked + written, 2 * products * count


def _sum_partials(a: Any) -> Cost:
    read = written = 0
    for i in range(6):
        partials, out, count, length = (getattr(a, f"{name}_{i}") for name in ("partials", "out", "count", "size"))
        read += count * length * size(partials)
        written += length * size(out)
    return read, written, read + written, 0


def _matmul(a: Any) -> Cost:
    e, f, w, seed, bias = size(a.x_ptr), size(a.f_ptr), size(a.s_ptr), seed_bytes(a), size(a.bias_ptr)
    rows, cols, steps = cdiv(a.M, a.BLOCK_M), cdiv(a.N, a.BLOCK_N), cdiv(a.K, a.BLOCK_K)
    read = (a.M * a.K + a.K * a.N) * e + a.N * bias + a.M * a.R * w + a.R * a.N * f + seed
    written = a.M * a.N * e
    asked = cols * a.M * (a.K * e + a.R * w) + rows * a.N * (a.K * e + a.R * f + bias) + rows * cols * seed
    inner = steps * a.BLOCK_K + a.BLOCKS_R * a.BLOCK_R
    return read, written, asked + written, 2 * rows * a.BLOCK_M * cols * a.BLOCK_N * inner


def _update(a: Any) -> Cost:
    e, f, w, seed = size(a.out_ptr), size(a.f_ptr), size(a.s_ptr), seed_bytes(a)
    rows, cols = cdiv(a.M, a.BLOCK_M), cdiv(a.N, a.BLOCK_N)
    read = a.M * a.N * e + a.M * a.R * w + a.R * a.N * f + seed
    written = a.M * a.N * e
    asked = a.M * a.N * e + cols * a.M * a.R * w + rows * a.R * a.N * f + rows * cols * seed
    products = rows * a.BLOCK_M * cols * a.BLOCK_N * a.BLOCKS_R * a.BLOCK_R
    return read, written, asked + written, 2 * products


KERNELS = {
    "_shrink_kernel": _shrink,
    "_factor_grad_kernel": _factor_grad,
    "_sum_partials_kernel": _sum_partials,
    "_matmul_kernel": _matmul,
    "_update_kernel": _update,
}

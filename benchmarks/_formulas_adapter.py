"""Closed forms of the kernels of a bottleneck adapter without LayerNorms; `formulas` says of what."""

from typing import Any

from benchmarks._formulas_shared import Cost, cdiv, seed_bytes, size, split_terms


def _forward(a: Any) -> Cost:
    assert a.before_w_ptr is None is a.after_w_ptr, "no closed form with a LayerNorm"
    e, f, w, seed = size(a.x_ptr), size(a.wd_ptr), size(a.z_ptr), seed_bytes(a)
    rows, steps_k, cols_n, blocks_r = cdiv(a.M, a.BLOCK_M), cdiv(a.K, a.BLOCK_C), cdiv(a.N, a.BLOCK_C), a.BLOCKS_R
    biases = a.R * size(a.bd_ptr) + a.N * size(a.bu_ptr)
    scale = size(a.scaling_ptr)
    act = a.M * a.R * w * (blocks_r > 1)  # act(z) goes through memory where R takes several blocks
    residual = a.M * a.N * size(a.residual_ptr)
    read = a.M * a.K * e + (0 if a.residual_ptr is a.x_ptr else residual) + a.R * (a.K + a.N) * f + biases
    read += seed + scale + act
    written = a.M * a.N * e + a.M * a.R * w + act
    asked = blocks_r * a.M * a.K * e + residual + rows * (a.R * (a.K + a.N) * f + biases + scale)
    asked += cols_n * (rows * seed + act)
    down = rows * a.BLOCK_M * blocks_r * a.BLOCK_R * steps_k * a.BLOCK_C
    up = rows * a.BLOCK_M * blocks_r * a.BLOCK_R * cols_n * a.BLOCK_C
    count = split_terms(a.x_ptr.dtype, a.wd_ptr.dtype) if a.SPLIT else 1
    return read, written, asked + written, 2 * (down * count + up)


def _backward(a: Any) -> Cost:
    assert a.before_w_ptr is None is a.after_w_ptr, "no closed form with a LayerNorm"
    e, f, w, seed, scale = size(a.dy_ptr), size(a.wu_ptr), size(a.z_ptr), seed_bytes(a), size(a.scaling_ptr)
    rows, cols_n, cols_k, blocks_r = cdiv(a.M, a.BLOCK_M), cdiv(a.N, a.BLOCK_C), cdiv(a.K, a.BLOCK_C), a.BLOCKS_R
    assert a.dz_ptr is not None, "no closed form where only the up projection is trained"
    learned, has_dx, skips = a.dscaling_ptr is not None, a.dx_ptr is not None, a.SKIP == "dy"
    small = a.M * a.R * w
    bias = a.N * size(a.bu_ptr) * learned
    again = small * (has_dx and blocks_r > 1)  # dz goes through memory where R takes several blocks
    read = a.M * a.N * e + small + a.N * a.R * f + a.R * a.K * f * has_dx + again + bias + seed + scale
    written = small * (1 + (a.act_ptr is not None)) + a.M * a.K * e * has_dx
    written += rows * (a.R * size(a.dbd_ptr) + size(a.dscaling_ptr))
    asked = (blocks_r + (skips and has_dx)) * a.M * a.N * e + small * (1 + (a.act_ptr is not None))
    asked += rows * (a.N * a.R * f + a.R * a.K * f * has_dx + blocks_r * bias + cols_n * blocks_r * seed + scale)
    asked += cols_k * again
    up = rows * a.BLOCK_M * blocks_r * a.BLOCK_R * cols_n * a.BLOCK_C
    down = rows * a.BLOCK_M * blocks_r * a.BLOCK_R * cols_k * a.BLOCK_C * has_dx
    count = split_terms(a.dy_ptr.dtype, a.wu_ptr.dtype) if a.SPLIT else 1
    return read, written, asked + written, 2 * (up * count + down)


KERNELS = {"adapter_fwd_kernel": _forward, "adapter_bwd_kernel": _backward}

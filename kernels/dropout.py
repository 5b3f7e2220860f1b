"""The dropout mask that the kernels apply, as a tensor: what a reference needs to check them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Plan, cdiv, needs_int64
from ._tl import keep_mask, tile_ptrs

_BLOCK_M = 64
_BLOCK_K = 128


@triton.jit(do_not_specialize=["threshold"])
def _dropout_mask_kernel(
    out_ptr, seed_ptr, threshold, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M
    col = tl.program_id(1) * BLOCK_K
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_K)
    keep = keep_mask(seed_ptr, threshold, row, col, BLOCK_M, BLOCK_K)
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    tl.store(tile_ptrs(out_ptr, rows, cols, K, 1, 1, WIDE), keep, mask=mask)


def dropout_mask(seed: Tensor, shape: tuple[int, ...], threshold: int) -> Tensor:
    """The mask, True where an element is kept, of an activation of `shape` (..., K): rows are all leading dimensions.

    seed: one int64 element; threshold: how many of the 2^16 values of an element's word drop it.
    """
    out = torch.empty(shape, dtype=torch.bool, device=seed.device)
    K = shape[-1]
    M = out.numel() // max(K, 1)
    plan = Plan(
        _dropout_mask_kernel,
        (cdiv(M, _BLOCK_M), cdiv(K, _BLOCK_K)),
        M,
        K,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        WIDE=needs_int64(out),
        device=out.device,
        num_warps=4,
        num_stages=1,
    )
    plan(out, seed, threshold)
    return out

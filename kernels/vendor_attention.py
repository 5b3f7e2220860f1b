"""The vendor's fused attention, as torch has it, over the own keys; `prefix_attention` adds the prefix.

Shapes and names as there. Its backward knows weights as exp(b - lse) and δ as Σ_DH dy∘y: given the joint lse and the
joint y, of prefix and own keys together, it gives dk, dv and the own keys' part of dq.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ._launch import _recording

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION.value, SDPBackend.CUDNN_ATTENTION.value

# S·T and head size from which on the vendor's kernels save more than it costs to add the prefix to y and dq in memory.
# On an H100, 1024 by 1024 of 128 features took 0.87 of the time that our kernels take, causal 0.97; 512 by 512 of 64 as
# much, causal 1.09.
MIN_LOGITS = 2**20
MIN_FEATURES = 65


def serves(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> bool:
    """Whether `fwd` and `bwd` can take this call and are worth it; no mask, cap, window or dropout is known here."""
    S, DH, T = *query.shape[2:], key.shape[2]
    if not query.is_cuda or torch.version.hip or _recording.get() is not None:
        return False
    if query.dtype not in (torch.float16, torch.bfloat16) or DH % 8 or not MIN_FEATURES <= DH <= 128 or scale <= 0:
        return False
    # Their causal mask begins at the first key.
    if S == 1 or S * T < MIN_LOGITS or query.numel() == 0 or (is_causal and S != T):
        return False
    if torch.cuda.get_device_capability(query.device) < (8, 0) or not all(map(_is_aligned, (query, key, value))):
        return False
    return _choice(query, key, value, is_causal, scale) in (FLASH, CUDNN)


def _is_aligned(x: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes, and no two at the same one."""
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])


def _choice(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> int:
    """Which kernel torch itself would run, by the number of its `SDPBackend`."""
    grouped = query.shape[1] != key.shape[1]
    return torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=grouped)


def fwd(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(y, lse) over the own keys alone: y (Z, H, S, DH) in query's layout, lse (Z, H, S) natural, fp32."""
    if _choice(query, key, value, is_causal, scale) == CUDNN:
        op = torch.ops.aten._scaled_dot_product_cudnn_attention
        y, lse, *_ = op(query, key, value, None, True, 0.0, is_causal, False, scale=scale)
    else:
        op = torch.ops.aten._scaled_dot_product_flash_attention
        y, lse, *_ = op(query, key, value, 0.0, is_causal, False, scale=scale)
    return y, lse.reshape(query.shape[:3]).contiguous()


def bwd(
    dy: Tensor, y: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(the own keys' part of dq, dk, dv) from the joint y and the joint lse (Z, H, S), each in its input's layout.

    Not the same bits each time: both kernels add to dq with atomics.
    """
    S, T = query.shape[2], key.shape[2]
    dy = dy if dy.data_ptr() % 16 == 0 else dy.clone()
    if _choice(query, key, value, is_causal, scale) == CUDNN:
        # torch keeps what cuDNN compiled for one layout of y and dy, and some versions take it for any other.
        dy, y = (_laid_out_as(query, x) for x in (dy, y))
        lse = lse.view(*lse.shape, *_cudnn_lse_tail())
        seed, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))  # of no dropout
        op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        rest: tuple[Any, ...] = (seed, offset, None, None, None, S, T, 0.0, is_causal)
    else:
        seed = torch.empty(2, dtype=torch.uint64, device=query.device)
        offset = torch.empty((), dtype=torch.uint64, device=query.device)
        op = torch.ops.aten._scaled_dot_product_flash_attention_backward
        rest = (None, None, S, T, 0.0, is_causal, seed, offset)
    return op(dy, query, key, value, y, lse, *rest, scale=scale)


def _laid_out_as(query: Tensor, x: Tensor) -> Tensor:
    """x in the layout that an output of torch's has for `query`, copied only where it is not."""
    strides = torch.empty_like(query, device="meta").stride()
    return x if x.stride() == strides else torch.empty_like(query).copy_(x)


@functools.cache
def _cudnn_lse_tail() -> tuple[int, ...]:
    """What follows (Z, H, S) in the shape of cuDNN's lse: a 1, or in some versions of torch nothing."""
    x = torch.empty(1, 1, 8, 8, dtype=torch.float16, device="meta")
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].shape[3:]

"""The LoRA linear layer from ordinary torch calls: what runs on the CPU.

    s  = scaling · drop(x) Aᵀ          (M, R), fp32
    y  = (bias + s Bᵀ) + x Wᵀ          (M, N)
    ds = scaling · dy B                (M, R), fp32
    dx = mask ∘ (ds A) / (1-p) + dy W  (M, K)
    dA = dsᵀ drop(x)   dB = dyᵀ s   dbias = Σ_M dy

The low-rank term is written first and the frozen product accumulated onto it, so that it costs no pass of its own
over y or dx: the matmul adds to its output where it would have copied the bias. 1 / (1-p) is folded into s and ds.
16-bit activations meet the factors in fp32. Dropout works in blocks of rows that stay in the cache; where a graph
is being traced, the mask is one opaque op and everything else is aten calls that a compiler can fuse.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.eager.dropout import Dropped, dropped_blocks
from peft_fast.reference import keep_scale

SMALL_DY = 1 << 12


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
    traced: str = "",
) -> tuple[Tensor, Tensor]:
    """y (M, N) and s (M, R) of x (M, K).

    Where calls are being recorded, `traced` names the plan whose mask op they take ("eager" but for a backward that
    Triton cannot serve); elsewhere it is empty.
    """
    wide = _wide_dtype(lora_a)
    wide_x, a_t, b_t = _cast(x, wide), _cast(lora_a, wide).t(), _cast(lora_b, wide).t()
    if threshold:
        scale, blocks = scaling * keep_scale(threshold), _blocks(seed, x.shape, threshold, wide, traced)
        parts = [_scaled_mm(dropped.masked(wide_x[rows]), a_t, scale, traced) for rows, dropped in blocks]
        s = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        s = _scaled_mm(wide_x, a_t, scaling, traced)
    if x.dtype is wide:
        y = torch.mm(s, b_t) if bias is None else torch.addmm(bias, s, b_t)
        return _add_mm(y, x, weight.t(), traced), s
    return _add_mm(F.linear(x, weight, bias).to(wide), s, b_t, traced).to(x.dtype), s


def lora_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
    seed: Tensor | None,
    *,
    needs: tuple[bool, bool, bool, bool],
    traced: str = "",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and dbias from dy (M, N), each only where `needs` asks for it.

    x is read for dA alone and s for dB alone; they may be None where those are not needed.
    """
    need_x, need_a, need_b, need_bias = needs
    wide = _wide_dtype(lora_a)
    wide_dy = _cast(dy, wide)
    dx = da = db = dbias = None
    # dyᵀ s and dy B by way of sᵀ dy and Bᵀ dyᵀ: several times faster in the CPU's BLAS, unless all is small
    transposed = dy.numel() > SMALL_DY
    if need_b:  # dB = dyᵀ s
        db = torch.mm(s.t(), wide_dy).t() if transposed else torch.mm(wide_dy.t(), s)
        db = _cast(db, lora_b.dtype)
    if need_bias:
        dbias = _cast(wide_dy.sum(0), dy.dtype)
    if need_x or need_a:
        wide_a, wide_b = _cast(lora_a, wide), _cast(lora_b, wide)
        scale = scaling * keep_scale(threshold) if threshold else scaling
        # ds = scaling · dy B
        if transposed:
            ds = _scaled_mm(wide_b.t(), wide_dy.t(), scale, traced).t()
        else:
            ds = _scaled_mm(wide_dy, wide_b, scale, traced)
        if need_x:
            dx = torch.mm(ds, wide_a)
        if threshold:
            wide_x = _cast(x, wide) if need_a else None
            for rows, dropped in _blocks(seed, (dy.shape[0], lora_a.shape[1]), threshold, wide, traced):
                if need_x and isinstance(dropped, Dropped):
                    dropped.mask_(dx[rows])
                elif need_x:  # traced: rows are all rows
                    dx = dropped.masked(dx)
                if need_a:  # dA = dsᵀ (mask ∘ x)
                    ds_t, masked_x = ds[rows].t(), dropped.masked(wide_x[rows])
                    da = torch.mm(ds_t, masked_x) if da is None else da.addmm_(ds_t, masked_x)
        elif need_a:
            da = torch.mm(ds.t(), _cast(x, wide))
        if need_a:
            da = _cast(da, lora_a.dtype)
    if need_x:  # dx = mask ∘ (ds A) + dy W
        dx = _add_mm(dx, dy, weight, traced) if dy.dtype is wide else (dx + torch.mm(dy, weight)).to(dy.dtype)
    return dx, da, db, dbias


def _wide_dtype(factor: Tensor) -> torch.dtype:
    return torch.float64 if factor.dtype is torch.float64 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`to` takes microseconds even where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _scaled_mm(a: Tensor, b: Tensor, scale: Any, traced: str) -> Tensor:
    """scale · a b; a number is the matmul's alpha, since multiplying by one costs as much as two small matmuls."""
    if traced:
        return torch.mm(a, b) * scale
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


# Nothing is written in place into what a traced call gave: selective checkpointing keeps it, a batch may stand for it.


def _add_mm(out: Tensor, a: Tensor, b: Tensor, traced: str) -> Tensor:
    return torch.addmm(out, a, b) if traced else out.addmm_(a, b)


class _Mask:
    """What is dropped, as a traced graph has it: a mask of all rows."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def masked(self, x: Tensor) -> Tensor:
        return x * self.mask


def _blocks(
    seed: Tensor, shape: Sequence[int], threshold: int, dtype: torch.dtype, traced: str
) -> Iterable[tuple[slice, Dropped | _Mask]]:
    if traced:
        return [(slice(None), _Mask(torch.ops.peft_fast.dropout_mask(seed, shape, threshold, traced).to(dtype)))]
    return dropped_blocks(seed, shape, threshold)

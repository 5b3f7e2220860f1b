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

# The CPU's BLAS multiplies a tall matrix by a narrow one at a fraction of its speed; see `_narrow_mm` and `_tall_mm`.
NARROW = range(2, 16)
BATCHED_ELEMENTS = 1 << 16


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
        parts = [_narrow_mm(dropped.masked(wide_x[rows]), a_t, scale, traced) for rows, dropped in blocks]
        s = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        s = _narrow_mm(wide_x, a_t, scaling, traced)
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
    if need_b:  # dB = dyᵀ s
        db = _cast(_tall_mm(s, wide_dy, traced).t().contiguous(), lora_b.dtype)
    if need_bias:
        dbias = _cast(wide_dy.sum(0), dy.dtype)
    if need_x or need_a:
        wide_a, wide_b = _cast(lora_a, wide), _cast(lora_b, wide)
        scale = scaling * keep_scale(threshold) if threshold else scaling
        ds = _narrow_mm(wide_dy, wide_b, scale, traced)  # ds = scaling · dy B
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
                    part = _tall_mm(ds[rows], dropped.masked(wide_x[rows]), traced)
                    da = part if da is None else da.add_(part)
        elif need_a:
            da = _tall_mm(ds, _cast(x, wide), traced)
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


def _narrow_mm(x: Tensor, factor: Tensor, scale: Any, traced: str) -> Tensor:
    """scale · x F; x (M, K), F (K, R).

    A number is the matmul's alpha, since multiplying by one costs as much as two small matmuls. For R below 16 one
    product Fᵀ xᵀ for each thread takes half to two thirds of the time.
    """
    (M, K), R = x.shape, factor.shape[1]
    narrow = R in NARROW and (traced or M * K >= BATCHED_ELEMENTS)  # a graph must not depend on M
    if traced:
        return (torch.mm(factor.t(), x.t()).t() if narrow else torch.mm(x, factor)) * scale
    ignored = x.new_empty(1)
    if not narrow:
        return torch.addmm(ignored, x, factor, beta=0, alpha=scale)
    if batches := _batches(x):
        x_t, factor_t = x.view(batches, -1, K).transpose(1, 2), factor.t().expand(batches, R, K)
        out = torch.baddbmm(ignored, factor_t, x_t, beta=0, alpha=scale)
        return out.transpose(1, 2).reshape(M, R)
    return torch.addmm(ignored, factor.t(), x.t(), beta=0, alpha=scale).t()


def _tall_mm(s: Tensor, x: Tensor, traced: str) -> Tensor:
    """sᵀ x; s (M, R), x (M, K). One product for each thread, added, takes a tenth to a third less time."""
    (M, K), R = x.shape, s.shape[1]
    if traced or M * K < BATCHED_ELEMENTS or not (batches := _batches(x)):
        return torch.mm(s.t(), x)
    return torch.bmm(s.view(batches, -1, R).transpose(1, 2), x.view(batches, -1, K)).sum(0)


def _batches(x: Tensor) -> int:
    """One batch of rows for each of the CPU's threads, 0 where they would be unequal or few."""
    rows, threads = x.shape[0], torch.get_num_threads()
    return threads if x.is_cpu and rows % threads == 0 and rows >= 32 * threads else 0


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

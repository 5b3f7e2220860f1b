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

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.eager.dropout import Dropped, blocks_of
from peft_fast.eager.matmul import add_linear, cast, linear_plus, narrow_mm, tall_mm, wide_dtype
from peft_fast.reference import keep_scale


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
    wide = wide_dtype(lora_a)
    wide_x, a_t, b_t = cast(x, wide), cast(lora_a, wide).t(), cast(lora_b, wide).t()
    if threshold:
        scale, blocks = scaling * keep_scale(threshold), blocks_of(seed, x.shape, threshold, wide, traced)
        parts = [narrow_mm(dropped.masked(wide_x[rows]), a_t, scale, traced) for rows, dropped in blocks]
        s = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        s = narrow_mm(wide_x, a_t, scaling, traced)
    if x.dtype is wide:
        return linear_plus(x, weight, bias, s, b_t, traced), s
    return add_linear(F.linear(x, weight, bias).to(wide), s, b_t.t(), traced).to(x.dtype), s


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
    wide = wide_dtype(lora_a)
    wide_dy = cast(dy, wide)
    dx = da = db = dbias = None
    if need_b:  # dB = dyᵀ s
        db = cast(tall_mm(s, wide_dy, traced).t().contiguous(), lora_b.dtype)
    if need_bias:
        dbias = cast(wide_dy.sum(0), dy.dtype)
    if need_x or need_a:
        wide_a, wide_b = cast(lora_a, wide), cast(lora_b, wide)
        scale = scaling * keep_scale(threshold) if threshold else scaling
        ds = narrow_mm(wide_dy, wide_b, scale, traced)  # ds = scaling · dy B
        plain = need_x and not threshold and dy.dtype is wide
        if plain:
            dx = linear_plus(dy, weight.t(), None, ds, wide_a, traced)
        elif need_x:
            dx = torch.mm(ds, wide_a)
        if threshold:
            wide_x = cast(x, wide) if need_a else None
            for rows, dropped in blocks_of(seed, (dy.shape[0], lora_a.shape[1]), threshold, wide, traced):
                if need_x and isinstance(dropped, Dropped):
                    dropped.mask_(dx[rows])
                elif need_x:  # traced: rows are all rows
                    dx = dropped.masked(dx)
                if need_a:  # dA = dsᵀ (mask ∘ x)
                    part = tall_mm(ds[rows], dropped.masked(wide_x[rows]), traced)
                    da = part if da is None else da.add_(part)
        elif need_a:
            da = tall_mm(ds, cast(x, wide), traced)
        if need_a:
            da = cast(da.contiguous(), lora_a.dtype)
        if need_x and not plain:  # dx = mask ∘ (ds A) + dy W
            dx = (
                add_linear(dx, dy, weight.t(), traced) if dy.dtype is wide else (dx + torch.mm(dy, weight)).to(dy.dtype)
            )
    return dx, da, db, dbias

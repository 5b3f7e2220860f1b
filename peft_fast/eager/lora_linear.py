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

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.eager.dropout import keep_blocks
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
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and s (M, R) of x (M, K)."""
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    wide_x, wide_a, wide_b = x.to(wide), lora_a.to(wide), lora_b.to(wide)
    if threshold:
        blocks = _blocks(seed, x.shape, threshold, wide, traced)
        s = torch.cat([torch.mm(keep.mul_(wide_x[rows]), wide_a.t()) for rows, keep in blocks])
    else:
        s = torch.mm(wide_x, wide_a.t())
    s.mul_(scaling * keep_scale(threshold))
    if x.dtype == wide:
        y = torch.mm(s, wide_b.t()) if bias is None else torch.addmm(bias, s, wide_b.t())
        return y.addmm_(x, weight.t()), s
    return F.linear(x, weight, bias).to(wide).addmm_(s, wide_b.t()).to(x.dtype), s


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
    traced: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and dbias from dy (M, N), each only where `needs` asks for it.

    x is read for dA alone and s for dB alone; they may be None where those are not needed.
    """
    need_x, need_a, need_b, need_bias = needs
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    wide_dy = dy.to(wide)
    dx = da = db = dbias = None
    if need_b:
        db = torch.mm(s.t(), wide_dy).t().contiguous().to(lora_b.dtype)  # dB = dyᵀ s
    if need_bias:
        dbias = wide_dy.sum(0).to(dy.dtype)
    if need_x or need_a:
        # ds = scaling · dy B, in the orientation in which the CPU's BLAS is several times faster at small ranks
        ds = torch.mm(lora_b.t().to(wide), wide_dy.t()).t().contiguous()
        ds.mul_(scaling * keep_scale(threshold))
        if need_x:
            dx = torch.mm(ds, lora_a.to(wide))
        if need_a and not threshold:
            da = torch.mm(ds.t(), x.to(wide))  # dA = dsᵀ x
        if threshold:
            if need_a:
                da, wide_x = torch.zeros_like(lora_a, dtype=wide), x.to(wide)
            for rows, keep in _blocks(seed, (dy.shape[0], lora_a.shape[1]), threshold, wide, traced):
                if need_x:
                    dx[rows].mul_(keep)
                if need_a:
                    da.addmm_(ds[rows].t(), keep.mul_(wide_x[rows]))  # dA = dsᵀ (mask ∘ x)
        if need_a:
            da = da.to(lora_a.dtype)
    if need_x:  # dx = mask ∘ (ds A) + dy W
        dx = dx.addmm_(dy, weight) if dy.dtype == wide else dx.add_(torch.mm(dy, weight)).to(dy.dtype)
    return dx, da, db, dbias


def _blocks(
    seed: Tensor, shape: tuple[int, int], threshold: int, dtype: torch.dtype, traced: bool
) -> Iterable[tuple[slice, Tensor]]:
    if traced:
        return [(slice(None), torch.ops.peft_fast.dropout_mask(seed, shape, threshold).to(dtype))]
    return keep_blocks(seed, shape, threshold, dtype)

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

`plan` "fused": one Triton matmul with the low-rank term, serving y and dx; "fused 64x128": the same with a tile of that
name (`low_rank.named_tiles`). "split": the vendor's matmul, then a rank-R update in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import matmul, update
from .partial_sums import sums
from .skinny import factor_grad, reads_dy_once, shrink


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
    s = shrink(x, lora_a.mT, scaling, threshold, seed)
    plan, _, tile_name = plan.partition(" ")
    if plan == "fused":
        return matmul(x, weight.mT, bias, s, lora_b.mT, tile_name=tile_name), s
    assert plan == "split", plan
    return update(F.linear(x, weight, bias), s, lora_b.mT), s


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
    plan, _, tile_name = plan.partition(" ")

    if need_db or need_dbias:
        with_ds = need_ds and reads_dy_once(dy, lora_b)
        db, dbias, ds = sums(*factor_grad(dy, s, lora_b, scaling, needs=(need_db, need_dbias, with_ds)))
    if need_ds and ds is None:
        ds = shrink(dy, lora_b, scaling)
    if need_da:
        partials, _, _ = factor_grad(
            x, ds, lora_a.mT, threshold=threshold, seed=seed, transposed=True, needs=(True, False, False)
        )
        (da,) = sums(partials)
    if need_dx and plan == "fused":
        dx = matmul(dy, weight, None, ds, lora_a, threshold, seed, tile_name=tile_name)
    elif need_dx:
        assert plan == "split", plan
        dx = update(torch.mm(dy, weight), ds, lora_a, threshold, seed)
    return dx, da, db, dbias

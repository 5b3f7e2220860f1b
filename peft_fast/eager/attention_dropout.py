"""Attention with dropout on its probabilities, from ordinary torch calls; the formulas are those of the op."""

import torch
from torch import Tensor

from peft_fast.eager.dropout import dropped_blocks
from peft_fast.reference import keep_scale


def dropped_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, threshold: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """y (Z, H, S, DH) and p (Z, H, S, T) of query (Z, H, S, DH), key and value (Z, H, T, DH)."""
    logits = _product(_matrices(query), _matrices(key).mT, scale).view(*query.shape[:3], key.shape[2])
    if bias is not None:
        logits += bias
    p = torch.softmax(logits, -1, out=logits)
    weights = _dropped(p, seed, threshold)
    y = _product(_matrices(weights), _matrices(value), keep_scale(threshold))
    return y.view(query.shape), p


def dropped_attention_bwd(
    dy: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    p: Tensor,
    scale: float,
    threshold: int,
    seed: Tensor,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv from dy (Z, H, S, DH), each only where `needs` asks for it.

    Query, key and value may be None where neither dq nor dk is needed.
    """
    need_query, need_key, need_value = needs
    Z, H, _, DH = dy.shape
    keep = keep_scale(threshold)
    dy = _matrices(dy)
    dq = dk = dv = None
    if query is None or key is None or value is None:
        weights = _dropped(p, seed, threshold)
    else:
        dp = _product(dy, _matrices(value).mT, keep).view(p.shape)
        weights = _dropped(p, seed, threshold, dp)
        ds = _matrices(torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp))
        if need_query:
            dq = _product(ds, _matrices(key), scale).view(query.shape)
        if need_key:
            dk = _product(ds.mT, _matrices(query), scale).view(key.shape)
    if need_value:
        dv = _product(_matrices(weights).mT, dy, keep).view(Z, H, -1, DH)
    return dq, dk, dv


def _dropped(p: Tensor, seed: Tensor, threshold: int, dp: Tensor | None = None) -> Tensor:
    """mask ∘ p, new, of p (Z, H, S, T); dp = mask ∘ dp in place."""
    weights = torch.empty_like(p)
    p_rows, rows_of_weights, dp_rows = (t if t is None else t.view(-1, t.shape[-1]) for t in (p, weights, dp))
    for rows, dropped in dropped_blocks(seed, p_rows.shape, threshold):
        dropped.masked(p_rows[rows], out=rows_of_weights[rows])
        if dp_rows is not None:
            dropped.mask_(dp_rows[rows])
    return weights


def _matrices(tensor: Tensor) -> Tensor:
    """(Z, H, S, D) as (Z · H, S, D)."""
    return tensor.reshape(-1, *tensor.shape[2:])


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha · a b."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=alpha)

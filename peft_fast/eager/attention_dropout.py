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
    weights = p.clone()
    _drop_(seed, threshold, weights)
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
    weights, dy = p.clone(), _matrices(dy)
    dq = dk = dv = None
    if query is None or key is None or value is None:
        _drop_(seed, threshold, weights)
    else:
        dp = _product(dy, _matrices(value).mT, keep).view(p.shape)
        _drop_(seed, threshold, weights, dp)
        ds = _matrices(torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp))
        if need_query:
            dq = _product(ds, _matrices(key), scale).view(query.shape)
        if need_key:
            dk = _product(ds.mT, _matrices(query), scale).view(key.shape)
    if need_value:
        dv = _product(_matrices(weights).mT, dy, keep).view(Z, H, -1, DH)
    return dq, dk, dv


def _drop_(seed: Tensor, threshold: int, *tensors: Tensor) -> None:
    """Set to zero what the seed drops of tensors (Z, H, S, T)."""
    matrices = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
    for rows, dropped in dropped_blocks(seed, matrices[0].shape, threshold):
        for matrix in matrices:
            dropped.mask_(matrix[rows])


def _matrices(tensor: Tensor) -> Tensor:
    """(Z, H, S, D) as (Z · H, S, D)."""
    return tensor.reshape(-1, *tensor.shape[2:])


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha · a b."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=alpha)

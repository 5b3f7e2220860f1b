"""Attention whose probabilities are dropped, on the CPU, for the frozen model around the adapters.

    p  = softmax(scale · q Kᵀ + bias)    y  = drop(p) V           dV = drop(p)ᵀ dy
    dp = drop(dy Vᵀ)                     ds = p ∘ (dp - Σ p dp)   dq = scale · ds K     dK = scale · dsᵀ q

torch's fused attention does not serve dropout there. What runs instead draws one Bernoulli variable after the other,
looks for rows that see nothing and keeps p, the mask and drop(p) until backward. Here p is kept, and a seed.
"""

import torch
from torch import Tensor

from peft_fast import eager, reference, support
from peft_fast.ops import _shared


class _AttentionDropout(torch.autograd.Function):
    """Saves p, the seed and, for the gradients of query and key, the inputs: whoever watches the call, the same ones,
    since checkpointing compares them.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, scale, threshold, seed):
        if support.runs_plainly(query):
            y, p = eager.dropped_attention_fwd(query, key, value, bias, scale, threshold, seed)
        else:
            p = _probabilities(query, key, bias, scale)
            y = (p * _weights_mask(p, threshold, seed)) @ value
        ctx.scale, ctx.threshold = scale, threshold
        inputs = (query, key, value, bias) if any(ctx.needs_input_grad[:2]) else (None,) * 4
        ctx.save_for_backward(*inputs, p, seed)
        return y

    @staticmethod
    def backward(ctx, dy):
        with _shared.without_autocast(dy.device.type):
            return *_backward(ctx, dy), None, None, None, None


def _backward(ctx, dy):
    query, key, value, bias, p, seed = ctx.saved_tensors
    needs, scale, threshold = ctx.needs_input_grad[:3], ctx.scale, ctx.threshold
    if support.runs_plainly(dy) and not torch.is_grad_enabled():
        return eager.dropped_attention_bwd(dy, query, key, value, p, scale, threshold, seed, needs=needs)
    need_query, need_key, need_value = needs
    if torch.is_grad_enabled() and query is not None:  # create_graph=True
        p = _probabilities(query, key, bias, scale)
    mask = _weights_mask(p, threshold, seed)
    dq = dk = dv = None
    if need_value:
        dv = (p * mask).mT @ dy
    if need_query or need_key:
        dp = mask * (dy @ value.mT)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq = scale * ds @ key if need_query else None
        dk = scale * ds.mT @ query if need_key else None
    return dq, dk, dv


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = scale * query @ key.mT
    return torch.ops.aten._safe_softmax(logits if bias is None else logits + bias, -1)


def _weights_mask(p: Tensor, threshold: int, seed: Tensor) -> Tensor:
    """mask / (1 - p_drop) for probabilities (Z, H, S, T)."""
    mask = torch.ops.peft_fast.dropout_mask(seed, (p.shape[:-1].numel(), p.shape[-1]), threshold, "eager")
    return mask.view(p.shape) * reference.keep_scale(threshold)


def apply_attention_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    threshold: int,
    seed: Tensor | None = None,
) -> Tensor:
    """y (Z, H, S, DH) of query (Z, H, S, DH), key and value (Z, H, T, DH); p = threshold / 2^16 of the weights dropped.

    The bias broadcasts to (Z, H, S, T), gets no gradient and, but for compiled calls, leaves each query a key that is
    not at -inf.
    """
    seed = eager.draw_seed(query.device) if seed is None else seed
    if torch.compiler.is_compiling():
        p = _probabilities(query, key, bias, scale)
        return (p * _weights_mask(p, threshold, seed)) @ value
    return _AttentionDropout.apply(query, key, value, bias, scale, threshold, seed)

"""Attention whose probabilities are dropped, on the CPU, for the frozen model around the adapters.

    p = softmax(scale · q Kᵀ + bias)     y  = drop(p) V          dV = drop(p)ᵀ dy
    dp = drop(dy Vᵀ)                     ds = p ∘ (dp - Σ p dp)   dq = scale · ds K     dK = scale · dsᵀ q

torch's fused attention does not serve dropout there. What runs instead draws one Bernoulli variable after the other,
looks for rows that see nothing and keeps p, the mask and drop(p) until backward. Here p is kept, and a seed.
"""

import torch
from torch import Tensor

from peft_fast import eager, reference, support


class _AttentionDropout(torch.autograd.Function):
    """Saves query, key and value, the bias, p and the seed, whoever watches the call: checkpointing compares them."""

    @staticmethod
    def forward(ctx, query, key, value, bias, scale, threshold, seed):
        ctx.scale, ctx.threshold = scale, threshold
        if support.runs_plainly(query):
            y, p = eager.dropped_attention_fwd(query, key, value, bias, scale, threshold, seed)
        else:
            y, p = _differentiable(query, key, value, bias, scale, threshold, seed)
        ctx.save_for_backward(query, key, value, bias, p, seed)
        return y

    @staticmethod
    def backward(ctx, dy):
        query, key, value, bias, p, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        create_graph = torch.is_grad_enabled()
        if support.runs_plainly(dy) and not create_graph:
            grads = eager.dropped_attention_bwd(dy, query, key, value, p, ctx.scale, ctx.threshold, seed, needs=needs)
            return *grads, None, None, None, None
        with torch.enable_grad():
            # Nodes of their own: where one input is a function of another, this must not run on through its history.
            query, key, value = (tensor.view_as(tensor) for tensor in (query, key, value))
            if not create_graph:
                query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
            y, _ = _differentiable(query, key, value, bias, ctx.scale, ctx.threshold, seed)
            inputs = [tensor for tensor, need in zip((query, key, value), needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, inputs, dy, create_graph=create_graph))
        return *(next(found) if need else None for need in needs), None, None, None, None


def _differentiable(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, threshold: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    logits = scale * query @ key.mT
    p = torch.softmax(logits if bias is None else logits + bias, -1)
    mask = torch.ops.peft_fast.dropout_mask(seed, (p.shape[:-1].numel(), p.shape[-1]), threshold, "eager")
    return reference.keep_scale(threshold) * (p * mask.view(p.shape)) @ value, p


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

    The bias broadcasts to (Z, H, S, T), gets no gradient and leaves each query a key that is not at -inf.
    """
    seed = eager.draw_seed(query.device) if seed is None else seed
    return _AttentionDropout.apply(query, key, value, bias, scale, threshold, seed)

"""The prefix attention op."""

from torch import Tensor

from peft_fast import reference


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    keep_mask = None
    if dropout_p:
        Z, H, S, _ = query.shape
        keep_mask = query.new_empty(Z, H, S, prefix_key.shape[1] + key.shape[2]).bernoulli_(1 - dropout_p)
    return reference.prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        gate=gate,
        dropout_p=dropout_p,
        keep_mask=keep_mask,
    )

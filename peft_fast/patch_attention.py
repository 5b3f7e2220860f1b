"""Attention dropout of the base model on the CPU, through transformers' attention interface.

Where an attention module's config says "sdpa" and has attention dropout, its config names a function of this file
instead, and the module has a mark. That function looks at every call, and hands those that would not gain, and those of
modules without the mark, to the function that "sdpa" stands for.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from peft_fast import support
from peft_fast.methods.prefix_interface import dispatches
from peft_fast.ops.attention_dropout import apply_attention_dropout

NAME = "peft_fast_sdpa"
_MARK = "_peft_fast_attention_dropout"
# What the function of "sdpa" does with these is its own affair.
_OTHER = ("position_bias", "cache", "softcap", "output_attentions")


def takes(module: Any) -> bool:
    """Whether `swap` would do something: the module asks for "sdpa", and its config drops of attention.

    Modules share a config, which may have been changed for another one.
    """
    if is_swapped(module) or not dispatches(module):
        return False
    return module.config._attn_implementation in ("sdpa", NAME) and _drops(module.config)


def swap(module: Any) -> None:
    module.__dict__[_MARK] = True
    # The public setter would also change the configs of the model's other parts.
    module.config._attn_implementation_internal = NAME


def swap_back(module: Any) -> None:
    del module.__dict__[_MARK]
    if module.config._attn_implementation == NAME:
        module.config._attn_implementation_internal = "sdpa"


def is_swapped(module: nn.Module) -> bool:
    return _MARK in module.__dict__


def _drops(config: Any) -> bool:
    """Whether a config sets attention dropout, under any of the names that models have for it."""
    return any("att" in name and "drop" in name and value for name, value in vars(config).items())


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query (Z, H, S, DH), key and value (Z, H, T, DH) to y (Z, S, H, DH)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    threshold = 0
    if is_swapped(module) and not any(kwargs.get(name) is not None for name in _OTHER):
        threshold = support.fusable_attention_dropout(query, key, value, attention_mask, dropout, causal)
    if not threshold:
        return AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if causal:
        attention_mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    bias = None
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(~attention_mask, -torch.inf)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return apply_attention_dropout(query, key, value, bias, scale, threshold).transpose(1, 2).contiguous(), None


def register() -> None:
    """Add this file's function to transformers' tables. Doing it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])

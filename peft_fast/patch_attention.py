"""Attention dropout of the base model on the CPU, through transformers' attention interface.

Attention modules whose config has attention dropout get a mark, and the function that the interface has for "sdpa" is
replaced by one that looks at every call: calls of marked modules that gain run here, all others go to transformers'
function. Configs, on whose names models and masks depend, stay as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peft_fast import support
from peft_fast.methods.prefix_interface import CHILD, FOLLOWERS, behind, dispatches, put_behind
from peft_fast.ops.attention_dropout import apply_attention_dropout

_MARK = "_peft_fast_attention_dropout"


def takes(module: nn.Module) -> bool:
    """Whether `swap` would do something: its config has attention dropout, and "sdpa" is no function of a user's.

    A model that was patched in another process brings its marks along, but not what "sdpa" stands for.
    """
    function = behind()
    is_free = function in FOLLOWERS and not (is_swapped(module) and function is _attention)
    return is_free and dispatches(module) and _drops(getattr(module, "config", None))


def swap(module: nn.Module) -> None:
    module.__dict__[_MARK] = True
    put_behind(_attention)


def swap_back(module: nn.Module) -> None:
    del module.__dict__[_MARK]


def is_swapped(module: nn.Module) -> bool:
    return _MARK in module.__dict__


def is_used(module: Any) -> bool:
    """Whether calls of the module come here: it has the mark, and asks for "sdpa"."""
    if not is_swapped(module) or behind() is not _attention or hasattr(module, CHILD):
        return False
    return getattr(module.config, "_attn_implementation", None) == "sdpa"


def _drops(config: Any) -> bool:
    """Whether a config sets attention dropout, under any of the names that models have for it."""
    settings = getattr(config, "__dict__", {})
    return any("att" in name and "drop" in name and value for name, value in settings.items())


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
    threshold = 0
    if dropout and is_swapped(module) and not _asks_for_more(kwargs):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        threshold = support.fusable_attention_dropout(query, key, value, attention_mask, dropout, causal)
    if not threshold:
        return sdpa_attention_forward(
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


FOLLOWERS.append(_attention)


def _asks_for_more(kwargs: dict[str, Any]) -> bool:
    """Whether a call has arguments that transformers' function answers in ways of its own."""
    given = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    return given or bool(kwargs.get("output_attentions"))

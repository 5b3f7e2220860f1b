"""The positions of the tokens behind a prefix.

Behind a prefix the position of a token counts, not only its distance to other tokens. In a rotary model whose caller
gives a mask and no positions, a row that starts with padding would see the prefix from further away: its first real
token is made position 0, as `generate` does. Learned absolute positions move only where a config has `position_offset`.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_fast.methods.prefix_interface import cache_of

_LEARNED = ("position_embeddings", "wpe", "embed_positions")


def rotary_owners(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of the model that turn `position_ids` into rotary embeddings for their layers."""
    for module in model.modules():
        rotary = any(
            name.endswith("inv_freq") for child in module.children() for name, _ in child.named_buffers(recurse=False)
        )
        if rotary and {"position_ids", "attention_mask"} <= set(inspect.signature(module.forward).parameters):
            yield module


def learned_positions(model: nn.Module) -> list[nn.Embedding]:
    """The embeddings of absolute positions, which transformers' models call by few names."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _LEARNED
    ]


def hook_positions(model: nn.Module, layers: Iterable[Any], offsets: dict[str, int]) -> list[RemovableHandle]:
    """Hook everything in the model that reads positions; `offsets` by adapter name."""
    layers = list(layers)
    handles = [
        owner.register_forward_pre_hook(_FromMask(owner, layers), with_kwargs=True) for owner in rotary_owners(model)
    ]
    if any(offsets.values()):
        learned = learned_positions(model)
        if not learned:
            raise ValueError(f"position_offset: the model has no learned absolute positions, got {offsets}")
        handles += [module.register_forward_pre_hook(_Offset(layers, offsets), with_kwargs=True) for module in learned]
    return handles


class _FromMask:
    """Fills in `position_ids`."""

    def __init__(self, owner: nn.Module, layers: list[Any]) -> None:
        self.names = tuple(inspect.signature(owner.forward).parameters)
        self.layers = layers

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        mask: Any = given.get("attention_mask")
        if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        if not any(layer.active_prefixes() for layer in self.layers):
            return None
        tokens = given.get("input_ids")
        S = (given["inputs_embeds"] if tokens is None else tokens).shape[1]
        past = cache_of(given)
        start = 0 if past is None else past.get_seq_length()
        padding = (mask != 0).long().argmax(1, keepdim=True)
        positions = (torch.arange(S, device=mask.device) + start - padding).clamp(min=0)
        return args, kwargs | {"position_ids": positions}


class _Offset:
    """Moves the positions that an embedding looks up."""

    def __init__(self, layers: list[Any], offsets: dict[str, int]) -> None:
        self.layers = layers
        self.offsets = offsets

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        active = {name for layer in self.layers for name in layer.active_prefixes()}
        offset = sum(self.offsets[name] for name in active)
        if not offset:
            return None
        if isinstance(positions := kwargs.get("position_ids"), Tensor):
            return args, kwargs | {"position_ids": positions + offset}
        if len(args) == 1:
            return (args[0] + offset,), kwargs
        raise ValueError(f"position_offset: {type(module).__name__} was called without position_ids")

"""The first prefix from the model itself: the keys and values that it computes for a text in each attention module."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from peft_fast.methods.prefix_config import PrefixConfig
from peft_fast.methods.prefix_interface import CHILD
from peft_fast.methods.prefix_positions import rotary_owners


def initial_tokens(model: Any, config: PrefixConfig) -> Tensor | None:
    """The P token ids whose keys and values `config` asks for; None where it asks for none, or has been trained."""
    if config.init not in ("text", "vocab") or config.trained:
        return None
    P = config.num_virtual_tokens
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(f"init: {config.init!r} needs a model that reads token ids, got a {type(model).__name__}")
    if config.init == "vocab":
        text_config = model.config.get_text_config()
        odds = torch.ones(text_config.vocab_size)
        special = (getattr(text_config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
        odds[[i for i in special if isinstance(i, int) and 0 <= i < len(odds)]] = 0
        return torch.multinomial(odds, P, replacement=int(odds.sum()) < P)
    ids: Any = config.init_text
    if isinstance(ids, str):
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
        ids = tokenizer(ids, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"init_text: has no tokens, got {config.init_text!r}")
    return torch.tensor(ids).repeat(-(-P // len(ids)))[:P]


@torch.no_grad()
def init_from_tokens(model: Any, adapter_name: str, tokens: Tensor) -> None:
    """Overwrite an adapter's prefixes with the keys and values of `tokens` (P,), on which the bare model runs once.

    Rotary models run at positions -P to -1, so that the prefix stands in front of the first token. A module that runs
    several times, as where layers share weights, keeps its first keys and values.
    """
    P = len(tokens)
    layers = {name: getattr(module, CHILD) for name, module in model.named_modules() if hasattr(module, CHILD)}
    wanted = {name: layer for name, layer in layers.items() if adapter_name in layer.prefix_config}
    if any(layer.prefix_key[adapter_name].is_meta for layer in wanted.values()):
        return
    was_training = [module for module in model.modules() if module.training]
    for layer in layers.values():
        layer.recorded = []
    try:
        model.eval()
        model(**_inputs(model, tokens))
        for name, layer in wanted.items():
            if not layer.recorded or layer.recorded[0][0].shape[2] != P:
                raise ValueError(f"init: {name} did not compute keys of the {P} tokens; exclude it, or use 'random'")
            key, value = layer.recorded[0]
            layer.prefix_key[adapter_name].copy_(key[0])
            layer.prefix_value[adapter_name].copy_(value[0])
    finally:
        for layer in layers.values():
            layer.recorded = None
        for module in was_training:
            module.training = True


def _inputs(model: Any, tokens: Tensor) -> dict[str, Any]:
    P = len(tokens)
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": tokens.to(model.device)[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if any(True for _ in rotary_owners(model)):
        inputs["position_ids"] = torch.arange(-P, 0, device=model.device)[None]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs

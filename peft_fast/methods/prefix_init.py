"""The first prefix from the model itself: the keys and values that it computes for a text in each attention module."""

import inspect
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoTokenizer

from peft_fast.methods.prefix_config import PrefixConfig
from peft_fast.methods.prefix_input import Front
from peft_fast.methods.prefix_interface import CHILD
from peft_fast.methods.prefix_positions import rotary_owners


def initial_tokens(model: Any, config: PrefixConfig) -> Tensor | None:
    """The P token ids whose keys and values `config` asks for; None where it asks for none, or has been trained."""
    if config.init not in ("text", "vocab") or config.trained:
        return None
    if config.init == "vocab":
        return _from_vocabulary(model, config)
    _check_reads_tokens(model, config)
    ids: Any = config.init_text
    if isinstance(ids, str):
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
        ids = tokenizer(ids, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"init_text: has no tokens, got {config.init_text!r}")
    P = config.num_virtual_tokens
    return torch.tensor(ids).repeat(-(-P // len(ids)))[:P]


def _from_vocabulary(model: Any, config: PrefixConfig) -> Tensor:
    _check_reads_tokens(model, config)
    text_config = model.config.get_text_config()
    odds = torch.ones(text_config.vocab_size)
    special = (getattr(text_config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    odds[[i for i in special if isinstance(i, int) and 0 <= i < len(odds)]] = 0
    P = config.num_virtual_tokens
    return torch.multinomial(odds, P, replacement=int(odds.sum()) < P)


def _check_reads_tokens(model: Any, config: PrefixConfig) -> None:
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(f"init: {config.init!r} needs a model that reads token ids, got a {type(model).__name__}")


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
    recorded = _record(model, _inputs(model, tokens))
    for name, layer in wanted.items():
        if not recorded[layer] or recorded[layer][0][0].shape[2] != P:
            raise ValueError(f"init: {name} did not compute keys of the {P} tokens; exclude it, or use 'random'")
        (key, value), *others = recorded[layer]
        if any(other is key for other, _ in others):
            raise ValueError(f"init: {name} attends to its keys more than once; use 'random'")
        layer.prefix_key[adapter_name].copy_(key[0])
        layer.prefix_value[adapter_name].copy_(value[0])


@torch.no_grad()
def init_input(front: Front, adapter_name: str, config: PrefixConfig) -> None:
    """Overwrite an adapter's rows at the input layer with what stands there for tokens, or give them its scale.

    Of a model that reads images, the scale is that of noise.
    """
    model, rows = front.stack.owner, front.layer.prefix_input[adapter_name]
    if rows.is_meta or config.trained:
        return
    tokens = initial_tokens(model, config)
    if tokens is None and model.main_input_name == "pixel_values":
        size = model.config.image_size
        shape = (1, model.config.num_channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
        inputs = {"pixel_values": torch.randn(shape).to(model.device, model.dtype)}
    else:
        inputs = _inputs(model, _from_vocabulary(model, config) if tokens is None else tokens)
    hidden = _record(model, inputs)[front.layer][0][0].to(rows)
    rows.copy_(rows * hidden.std() if tokens is None else hidden)
    front.try_out()


def _record(model: Any, inputs: dict[str, Any]) -> dict[nn.Module, list]:
    """What stands at the places of the prefixes while the bare model runs, by layer."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "recorded")]
    was_training = [module for module in model.modules() if module.training]
    for layer in layers:
        layer.recorded = []
    try:
        model.eval()
        model(**inputs)
        return {layer: layer.recorded for layer in layers}
    finally:
        for layer in layers:
            layer.recorded = None
        for module in was_training:
            module.training = True


def _inputs(model: Any, tokens: Tensor) -> dict[str, Any]:
    P = len(tokens)
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": tokens.to(model.device)[None]}
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if any(True for _ in rotary_owners(model)):
        inputs["position_ids"] = torch.arange(-P, 0, device=model.device)[None]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs

"""Prefixes trained with peft's prefix tuning, read into a peft model of this package.

peft puts the prefix into the cache, at positions 0 to P - 1, and the tokens at P and on. Here the tokens start at 0:

    rotary models                 q at p + P sees k as q at p sees R(-P) k, so the keys are rotated back by P
    learned absolute positions    `position_offset` = P moves the tokens' positions

peft stores the keys and values themselves, also where a perceptron computed them in training.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_fast.methods.prefix_config import PrefixConfig
from peft_fast.methods.prefix_interface import CHILD
from peft_fast.methods.prefix_positions import learned_positions, rotary_owners
from peft_fast.methods.prefix_targets import find_attention, sizes

_CONFIG_FILE = "adapter_config.json"
_SAFE_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_ROWS = "prompt_embeddings"


def load_peft_prefix(model: Any, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Put a prefix that peft's prefix tuning saved on a model, with the outputs that it has in peft.

    Args:
        model: the transformers model that the prefix was trained on, or a `PeftModel` with prefixes of this package, to
            which it is added.
        folder: what peft's `save_pretrained` wrote: `adapter_config.json` beside `adapter_model.safetensors` or
            `adapter_model.bin`, which is read as weights only.
        adapter_name: the name that the prefix gets.

    Returns the peft model, whose prefix can be trained on, saved and loaded as any other. A head that was trained
    beside the prefix is loaded too.

    The outputs are peft's where peft is right: without padding on the left, within a sliding window, and not for
    packed sequences. Behind an absolute-position prefix, P + T positions are needed as in peft.

    Raises ValueError for another kind of checkpoint, for an encoder-decoder model, whose layers share prefixes in peft,
    and for a prefix that does not fit.
    """
    folder = Path(folder)
    saved = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    if saved.get("peft_type") != "PREFIX_TUNING":
        raise ValueError(f"{folder / _CONFIG_FILE}: not a prefix of peft's, found {saved.get('peft_type')!r}")
    weights = _read_weights(folder)
    if _ROWS not in weights:
        raise ValueError(f"{folder}: has no {_ROWS}, found {sorted(weights)}")
    base: Any = model.base_model.model if isinstance(model, PeftModel) else model
    prefixes = convert_peft_prefix(base, weights.pop(_ROWS))
    config = PrefixConfig(
        num_virtual_tokens=saved["num_virtual_tokens"],
        task_type=saved.get("task_type"),
        modules_to_save=saved.get("modules_to_save"),
        position_offset=saved["num_virtual_tokens"] if learned_positions(base) else 0,
        base_model_name_or_path=saved.get("base_model_name_or_path"),
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    with torch.no_grad():
        for name, (key, value) in prefixes.items():
            layer = getattr(base.get_submodule(name), CHILD)
            layer.prefix_key[adapter_name].copy_(key)
            layer.prefix_value[adapter_name].copy_(value)
        _load_head(base, adapter_name, weights)
    return model


def convert_peft_prefix(model: nn.Module, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values (H_KV, P, DH) in float32 for each attention module of a bare model, by its name.

    `rows` (P, L·2·H_KV·DH) is what peft saves, or `PeftModel.get_prompt_embedding_to_save` returns.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("model: in peft the layers of an encoder-decoder model share prefixes; train a PrefixConfig")
    names = sorted(find_attention(model), key=lambda name: getattr(model.get_submodule(name), "layer_idx", 0) or 0)
    shapes = [sizes(name, model.get_submodule(name)) for name in names]
    width = sum(2 * shape.H_KV * shape.DH for shape in shapes)
    if rows.shape[1] != width:
        raise ValueError(
            f"{_ROWS}: expected {width} columns for the {len(names)} attention modules of {type(model).__name__}, got "
            f"{tuple(rows.shape)}"
        )
    angles = _angles(model, names, -len(rows))
    prefixes, start = {}, 0
    for name, (_, H_KV, DH) in zip(names, shapes, strict=True):
        layer = rows[:, start : start + 2 * H_KV * DH].float().to(next(model.parameters()).device)
        key, value = layer.view(-1, 2, H_KV, DH).permute(1, 2, 0, 3)
        prefixes[name] = (_rotate(model.get_submodule(name), key, *angles[name]) if angles else key, value)
        start += 2 * H_KV * DH
    return prefixes


@torch.no_grad()
def _angles(model: Any, names: list[str], position: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The cosines and sines that each attention module gets for a token at `position`; nothing where none is rotary.

    In float32, whatever the model computes in.
    """
    owners = list(rotary_owners(model))
    if not owners:
        return {}
    wide: dict[int, tuple[Any, Any]] = {}
    angles: dict[str, tuple[Tensor, Tensor]] = {}

    def widen(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        # The output is kept so that its id stays its own.
        wide[id(output[0])] = (output, module.forward(args[0].float(), *args[1:], **kwargs))

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if (got := kwargs.get("position_embeddings")) is not None and id(got[0]) in wide:
                angles[name] = wide[id(got[0])][1]

        return hook

    handles = [
        child.register_forward_hook(widen, with_kwargs=True)
        for owner in owners
        for child in owner.children()
        if any(name.endswith("inv_freq") for name, _ in child.named_buffers(recurse=False))
    ]
    handles += [
        model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True, prepend=True)
        for name in names
    ]
    training = model.training
    try:
        ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
        model.eval()(input_ids=ids, position_ids=ids * position)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if missing := set(names) - set(angles):
        raise ValueError(f"model: no rotary embedding reaches {sorted(missing)} as position_embeddings")
    return angles


def _rotate(module: nn.Module, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By the modeling file's own function, on the features that it turns, without the scaling that some models add."""
    scale = (cos.square() + sin.square()).sqrt()
    rotate = inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
    turned, rest = key.split([cos.shape[-1], key.shape[-1] - cos.shape[-1]], dim=-1)
    turned = rotate(turned[None], turned[None], cos / scale, sin / scale)[1][0]
    return torch.cat([turned, rest], dim=-1)


def _load_head(model: nn.Module, adapter_name: str, weights: dict[str, Tensor]) -> None:
    parameters = model.state_dict()
    for key, value in weights.items():
        name = key.removeprefix("base_model.")
        fits = [
            f"{owner}.modules_to_save.{adapter_name}{name.removeprefix(owner)}"
            for owner in (name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1))
        ]
        found = next((parameters[fit] for fit in fits if fit in parameters), None)
        if found is None or found.shape != value.shape:
            raise ValueError(f"{key}: no module beside the prefix has a place for {tuple(value.shape)}")
        found.copy_(value)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / _SAFE_FILE).exists():
        return load_file(folder / _SAFE_FILE)
    if (folder / _PICKLE_FILE).exists():
        return torch.load(folder / _PICKLE_FILE, map_location="cpu", weights_only=True)
    raise ValueError(f"{folder}: has neither {_SAFE_FILE} nor {_PICKLE_FILE}")

"""Adapters trained with the `adapters` library, read into a peft model.

The library's layer, with h the output of attention or feed-forward and r what the model adds to it:

    double_seq_bn   LN(h + s·t(h) + r)              houlsby
    seq_bn          LN(q + s·t(LN(h + r)) + r)      pfeiffer
    par_bn          LN(h + s·t(r) + r)              parallel

where Llama has no LN. There r has not been normalized, unlike what the feed-forward reads.

q is h where `residual_before_ln` is true, LN(h + r) where it is false, h + r where it is "post_add". True and false are
the same in double_seq_bn, all three in par_bn. Where no LN stands in front of the adapter, which is in double_seq_bn
and on Llama, the library itself does not run with "post_add".
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_fast.methods.bottleneck import BottleneckConfig, BottleneckLayer
from peft_fast.methods.bottleneck_targets import default_targets

_CONFIG_FILE = "adapter_config.json"
_SAFE_FILES = ("adapter.safetensors", "model.safetensors")
_PICKLE_FILE = "pytorch_adapter.bin"

# Where the library keeps the adapters of a layer: (behind attention, behind the feed-forward).
_PLACES = {
    "bert": ("attention.output", "output"),
    "llama": ("attention_adapters", "output_adapters"),
}
_PARALLEL_SOURCE = {"llama": "post_attention_layernorm"}

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "leakyrelu": "leaky_relu",
    "linear": "identity",
}
_PLACEMENT = ("mh_adapter", "output_adapter", "is_parallel", "original_ln_before")
_STYLES: dict[tuple[bool, ...], str] = {
    (True, True, False, False): "houlsby",
    (False, True, False, True): "pfeiffer",
    (False, True, True, False): "parallel",
}
# Our `residual_from` by the library's `residual_before_ln`, for seq_bn on models that have a LayerNorm there or not.
_RESIDUALS_AT_NORM: dict[Any, str] = {True: "branch", False: "norm", "post_add": "sum"}
_RESIDUALS: dict[Any, str] = {True: "branch", False: "sum"}
# The options that are read, with the library's defaults.
_READ: dict[str, Any] = {
    "mh_adapter": False,
    "output_adapter": True,
    "is_parallel": False,
    "original_ln_before": False,
    "non_linearity": "relu",
    "scaling": 1.0,
    "dropout": 0.0,
    "ln_before": False,
    "ln_after": False,
    "adapter_residual_before_ln": False,
    "residual_before_ln": True,
}
# What these must be, since nothing here computes the alternatives; with these, the rest changes nothing.
_REQUIRED: dict[str, Any] = {
    "architecture": None,
    "original_ln_after": True,
    "use_gating": False,
    "cross_adapter": False,
    "phm_layer": False,
    "inv_adapter": None,
    "stochastic_depth": 0.0,
}
_WITHOUT_EFFECT = re.compile(
    "init_weights|leave_out|reduction_factor|inv_adapter_reduction_factor|.*phm.*|hypercomplex_nonlinearity"
)


def load_adapters_checkpoint(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Put an adapter that the `adapters` library saved on a BERT or Llama model.

    Args:
        model: a transformers model, or a `PeftModel` with bottleneck adapters, to which the adapter is added.
        folder: what the library's `save_adapter` wrote: `adapter_config.json` beside `adapter.safetensors`,
            `model.safetensors` or `pytorch_adapter.bin`, which is read as weights only. Prediction heads are left.
        adapter_name: the name that the adapter gets.

    Returns the peft model, whose adapter can be trained on, saved and loaded as any other.

    Reads the configurations double_seq_bn (Houlsby), seq_bn (Pfeiffer) and par_bn (parallel), with their size,
    nonlinearity, scaling, dropout, LayerNorms of their own, place of the residual and left-out layers.

    Raises ValueError for another kind of model, for an option that is not supported, naming it, and for weights that
    do not fit.
    """
    folder = Path(folder)
    saved = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    if "version" not in saved or "config" not in saved:
        raise ValueError(f"{folder / _CONFIG_FILE}: not a configuration of the adapters library, found {sorted(saved)}")
    model_config: Any = getattr(model, "config", None)
    model_type = getattr(model_config, "model_type", type(model).__name__)
    if model_type not in _PLACES:
        raise ValueError(f"model: only {', '.join(_PLACES)} can be read, got {model_type!r}")
    if saved.get("model_type", model_type) != model_type:
        raise ValueError(f"model: the adapter is for {saved['model_type']!r}, got a model of type {model_type!r}")

    weights = _adapter_weights(_read_weights(folder), saved["name"], model_type)
    if not weights:
        raise ValueError(f"{folder}: no weights of a bottleneck adapter named {saved['name']!r}")
    config = _convert_config(saved["config"], model_type, weights)
    for (layer, place), parameters in weights.items():
        _check(f"{place} adapter of layer {layer}", parameters, config, model_config.hidden_size)
    if (last := max(layer for layer, _ in weights)) >= model_config.num_hidden_layers:
        raise ValueError(f"model: has {model_config.num_hidden_layers} layers, got an adapter of layer {last}")
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name)
    for key, module in model.named_modules():
        if isinstance(module, BottleneckLayer) and adapter_name in module.bottleneck_down:
            number, rest = re.search(r"layers?\.(\d+)\.(.+)", key).groups()
            _load(module, adapter_name, weights[int(number), "attention" if "att" in rest else "output"])
    return model


_Place = tuple[int, Literal["attention", "output"]]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in _SAFE_FILES:
        if (folder / name).is_file():
            return load_file(folder / name)
    if not (folder / _PICKLE_FILE).is_file():
        raise ValueError(f"{folder}: found none of {', '.join((*_SAFE_FILES, _PICKLE_FILE))}")
    return torch.load(folder / _PICKLE_FILE, map_location="cpu", weights_only=True)


def _adapter_weights(state: dict[str, Tensor], name: str, model_type: str) -> dict[_Place, dict[str, Tensor]]:
    """The weights of each adapter, by layer and place, under the library's own names."""
    attention, output = _PLACES[model_type]
    pattern = re.compile(rf".*?layers?\.(\d+)\.({attention}|{output})\.adapters\.{re.escape(name)}\.(.+)")
    weights: dict[_Place, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := pattern.fullmatch(key):
            layer, place, parameter = match.groups()
            # A LayerNorm in front is the first of `adapter_down` as well, and safetensors keeps one of the two names.
            parameter = parameter.replace("adapter_norm_before", "adapter_down.0")
            at: _Place = (int(layer), "attention" if place == attention else "output")
            weights.setdefault(at, {})[parameter] = value
    return weights


def _convert_config(
    saved: dict[str, Any], model_type: str, weights: dict[_Place, dict[str, Tensor]]
) -> BottleneckConfig:
    for option, required in _REQUIRED.items():
        if saved.get(option, required) != required:
            raise ValueError(f"{option}: only {required!r} is supported, got {saved[option]!r}")
    for option, value in saved.items():
        if option not in _REQUIRED and option not in _READ and not _WITHOUT_EFFECT.fullmatch(option):
            raise ValueError(f"{option}: an option that is not known, got {value!r}")
    options = _READ | saved
    placement = {option: bool(options[option]) for option in _PLACEMENT}
    style = _STYLES.get(tuple(placement.values()))
    if style is None:
        raise ValueError(f"{', '.join(placement)}: this combination is not supported, got {placement}")
    down_bias = f"adapter_down.{int(options['ln_before'])}.bias"
    activation = str(options["non_linearity"]).lower()
    if activation not in _ACTIVATIONS:
        raise ValueError(f"non_linearity: expected one of {', '.join(_ACTIVATIONS)}, got {options['non_linearity']!r}")
    sizes = {len(parameter) for adapter in weights.values() for name, parameter in adapter.items() if name == down_bias}
    if len(sizes) != 1:
        raise ValueError(f"reduction_factor: only one for all layers is supported, got bottlenecks of {sorted(sizes)}")
    layers = sorted({layer for layer, _ in weights})
    places = {"attention", "output"} if style == "houlsby" else {"output"}
    if set(weights) != {(layer, place) for layer in layers for place in places}:
        raise ValueError(f"weights: expected {sorted(places)} of each layer, got {sorted(weights)}")

    _, source = default_targets({"model_type": model_type}, style, layers)
    at_norm = style == "pfeiffer" and source is None
    residual_from = _residual_from(options["residual_before_ln"], style, at_norm, model_type)
    target_modules, source = default_targets({"model_type": model_type}, style, layers, residual_from)
    # A parallel adapter adds nothing before its LayerNorm, whatever the option says.
    residual_in_norm = options["ln_after"] and options["adapter_residual_before_ln"] and style != "parallel"
    if residual_in_norm and at_norm and residual_from == "branch":
        # The library's inner residual is h, that of an adapter around the model's LayerNorm h + r.
        raise ValueError(
            "adapter_residual_before_ln: with ln_after and original_ln_before not supported on "
            f"{model_type} where residual_before_ln is true"
        )
    if style == "parallel":
        source = _PARALLEL_SOURCE.get(model_type, source)
    return BottleneckConfig(
        style=style,
        bottleneck_size=sizes.pop(),
        activation=_ACTIVATIONS[activation],
        scaling=options["scaling"],
        dropout=options["dropout"],
        norm_before=options["ln_before"],
        norm_after=options["ln_after"],
        residual_after_norm=options["ln_after"] and not residual_in_norm,
        residual_from=residual_from,
        target_modules=target_modules,
        source_module=source,
    )


def _residual_from(option: Any, style: str, at_norm: bool, model_type: str) -> str:
    if option not in (True, False, "post_add"):
        raise ValueError(f"residual_before_ln: expected true, false or 'post_add', got {option!r}")
    if style == "parallel":
        return "branch"
    if option == "post_add" and not at_norm:
        raise ValueError(
            f"residual_before_ln: 'post_add' needs a LayerNorm in front of the adapter, which {style} adapters of "
            f"{model_type} do not have"
        )
    if style == "houlsby":
        return "branch"
    return (_RESIDUALS_AT_NORM if at_norm else _RESIDUALS)[option]


def _names(config: BottleneckConfig) -> dict[str, str]:
    """The library's name of each module of an adapter, by ours."""
    # With a LayerNorm in front, the library's sequence `adapter_down` starts with it.
    names = {"bottleneck_down": f"adapter_down.{int(config.norm_before)}", "bottleneck_up": "adapter_up"}
    if config.norm_before:
        names["bottleneck_norm_before"] = "adapter_down.0"
    if config.norm_after:
        names["bottleneck_norm_after"] = "adapter_norm_after"
    return names


def _check(where: str, weights: dict[str, Tensor], config: BottleneckConfig, K: int) -> None:
    R = config.bottleneck_size
    shapes: dict[str, tuple[int, ...]] = {"scaling": (1,)} if config.scaling == "learned" else {}
    for ours, name in _names(config).items():
        shapes[f"{name}.weight"] = {"bottleneck_down": (R, K), "bottleneck_up": (K, R)}.get(ours, (K,))
        shapes[f"{name}.bias"] = (R,) if ours == "bottleneck_down" else (K,)
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != shapes:
        raise ValueError(f"{where}: expected weights {shapes}, got {found}")


@torch.no_grad()
def _load(layer: BottleneckLayer, adapter_name: str, weights: dict[str, Tensor]) -> None:
    for ours, name in _names(layer.bottleneck_config[adapter_name]).items():
        module = getattr(layer, ours)[adapter_name]
        module.weight.copy_(weights[f"{name}.weight"])
        module.bias.copy_(weights[f"{name}.bias"])
    if "scaling" in weights:
        layer.bottleneck_scaling[adapter_name].copy_(weights["scaling"])

"""Adapters trained with the `adapters` library, read into a peft model.

The library's layer, with h the output of attention or feed-forward and r what the model adds to it:

    double_seq_bn   LN(h + s·t(h) + r)              houlsby
    seq_bn          LN(h + s·t(LN(h + r)) + r)      pfeiffer
    par_bn          LN(h + s·t(r) + r)              parallel

where Llama has no LN. There r has not been normalized, unlike what the feed-forward reads.
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
# The library's defaults of the options that decide where an adapter goes and what it computes.
_DEFAULTS = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "dropout": 0.0,
}
_PLACEMENT = ("mh_adapter", "output_adapter", "is_parallel", "original_ln_before")
_STYLES: dict[tuple[bool, ...], str] = {
    (True, True, False, False): "houlsby",
    (False, True, False, True): "pfeiffer",
    (False, True, True, False): "parallel",
}
# What these options must be: nothing here computes the alternatives.
_REQUIRED = {
    "original_ln_after": True,
    "residual_before_ln": True,
    "use_gating": False,
    "cross_adapter": False,
    "phm_layer": False,
    "inv_adapter": None,
    "stochastic_depth": 0.0,
    "architecture": None,
}


def load_adapters_checkpoint(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Put an adapter that the `adapters` library saved on a BERT or Llama model.

    Args:
        model: a transformers model, or a `PeftModel` with bottleneck adapters, to which the adapter is added.
        folder: what the library's `save_adapter` wrote: `adapter_config.json` beside `adapter.safetensors`,
            `model.safetensors` or `pytorch_adapter.bin`, which is read as weights only. Prediction heads are left.
        adapter_name: the name that the adapter gets.

    Returns the peft model, whose adapter can be trained on, saved and loaded as any other.

    Reads the configurations double_seq_bn (Houlsby), seq_bn (Pfeiffer) and par_bn (parallel), with their size,
    nonlinearity, scaling, dropout, LayerNorms of their own and left-out layers.

    Raises ValueError for another kind of model, for an option that is not supported, naming it, and for weights that
    do not fit.
    """
    folder = Path(folder)
    saved = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    if "version" not in saved or "config" not in saved:
        raise ValueError(f"{folder / _CONFIG_FILE}: not a configuration of the adapters library, found {sorted(saved)}")
    model_type = _model_type(model)
    if model_type not in _PLACES:
        raise ValueError(f"model: only {', '.join(_PLACES)} can be read, got {model_type!r}")
    if saved.get("model_type", model_type) != model_type:
        raise ValueError(f"model: the adapter is for {saved['model_type']!r}, got a model of type {model_type!r}")

    weights = _adapter_weights(_read_weights(folder), saved["name"], model_type)
    if not weights:
        raise ValueError(f"{folder}: no weights of a bottleneck adapter named {saved['name']!r}")
    config = _convert_config(saved["config"], model_type, weights)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name)
    _load(model, adapter_name, model_type, weights)
    return model


def _model_type(model: Any) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


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
            at: _Place = (int(layer), "attention" if place == attention else "output")
            weights.setdefault(at, {})[parameter] = value
    return weights


def _convert_config(
    saved: dict[str, Any], model_type: str, weights: dict[_Place, dict[str, Tensor]]
) -> BottleneckConfig:
    for option, required in _REQUIRED.items():
        if saved.get(option, required) != required:
            raise ValueError(f"{option}: only {required!r} is supported, got {saved[option]!r}")
    options = _DEFAULTS | saved
    placement = {option: bool(options.get(option)) for option in _PLACEMENT}
    style = _STYLES.get(tuple(placement.values()))
    if style is None:
        raise ValueError(f"{', '.join(placement)}: this combination is not supported, got {placement}")
    activation = str(options["non_linearity"]).lower()
    if activation not in _ACTIVATIONS:
        raise ValueError(f"non_linearity: expected one of {', '.join(_ACTIVATIONS)}, got {options['non_linearity']!r}")
    if isinstance(options["scaling"], str) and options["scaling"] != "learned":
        raise ValueError(f'scaling: expected a number or "learned", got {options["scaling"]!r}')
    sizes = {parameters["adapter_up.weight"].shape[1] for parameters in weights.values()}
    if len(sizes) > 1:
        raise ValueError(f"reduction_factor: only one for all layers is supported, got bottlenecks of {sorted(sizes)}")

    target_modules, source = default_targets({"model_type": model_type}, style, sorted({layer for layer, _ in weights}))
    return BottleneckConfig(
        style=style,
        bottleneck_size=sizes.pop(),
        activation=_ACTIVATIONS[activation],
        scaling=options["scaling"],
        dropout=options["dropout"],
        norm_before=options["ln_before"],
        norm_after=options["ln_after"],
        # A parallel adapter is added to its place after its LayerNorm, whatever the option says.
        residual_after_norm=options["ln_after"] and (style == "parallel" or not options["adapter_residual_before_ln"]),
        target_modules=target_modules,
        source_module=_PARALLEL_SOURCE.get(model_type, source) if style == "parallel" else source,
    )


def _load(model: PeftModel, adapter_name: str, model_type: str, weights: dict[_Place, dict[str, Tensor]]) -> None:
    loaded = set()
    for key, layer in model.named_modules():
        if not isinstance(layer, BottleneckLayer) or adapter_name not in layer.bottleneck_down:
            continue
        number = int(re.search(r"layers?\.(\d+)", key)[1])
        at: _Place = (number, "attention" if "attention" in key or "attn" in key else "output")
        if at not in weights:
            raise ValueError(f"weights: none for the adapter at {key}, found {sorted(weights)}")
        _load_layer(layer, adapter_name, weights[at])
        loaded.add(at)
    if missed := sorted(set(weights) - loaded):
        raise ValueError(f"model: no place for the adapters of {missed} in its {model_type} layers")


@torch.no_grad()
def _load_layer(layer: BottleneckLayer, adapter_name: str, weights: dict[str, Tensor]) -> None:
    # With a LayerNorm in front, the library's sequence `adapter_down` starts with it.
    linear = 1 if adapter_name in layer.bottleneck_norm_before else 0
    parameters: dict[str, Any] = {}
    for prefix, adapters in (
        (f"adapter_down.{linear}", layer.bottleneck_down),
        ("adapter_up", layer.bottleneck_up),
        ("adapter_norm_before", layer.bottleneck_norm_before),
        ("adapter_norm_after", layer.bottleneck_norm_after),
    ):
        if adapter_name in adapters:
            parameters[f"{prefix}.weight"] = adapters[adapter_name].weight
            parameters[f"{prefix}.bias"] = adapters[adapter_name].bias
    if adapter_name in layer.bottleneck_scaling:
        parameters["scaling"] = layer.bottleneck_scaling[adapter_name]

    # Safetensors keeps one of the two names of a LayerNorm in front.
    weights = {
        name.replace("adapter_down.0", "adapter_norm_before") if linear else name: w for name, w in weights.items()
    }
    if set(weights) != set(parameters):
        raise ValueError(f"weights: expected {sorted(parameters)}, got {sorted(weights)}")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(weights[name].shape)}")
        parameter.copy_(weights[name])

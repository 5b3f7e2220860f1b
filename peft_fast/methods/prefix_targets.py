"""The attention modules of a model: which there are, on which side of it, and of what size. No model is known by name.

encoder     self-attention that sees both sides
decoder     causal self-attention
cross       a decoder's attention over the encoder's output
"""

from typing import Any, NamedTuple

from torch import nn

from peft_fast.methods.prefix_interface import dispatches

SIDES = ("encoder", "decoder", "cross")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_SIZE = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_PROJECTIONS = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"), ("k_lin", "v_lin"))


class Sizes(NamedTuple):
    """Heads H, key-value heads H_KV and head size DH of an attention module."""

    H: int
    H_KV: int
    DH: int


def find_attention(model: nn.Module) -> dict[str, str]:
    """The names of the model's attention modules, each with its side. Raises ValueError where there is none."""
    found = {name: side(module) for name, module in model.named_modules() if dispatches(module)}
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} does not use transformers' attention interface, through which prefixes "
            "reach attention; peft's LoRA and peft_fast.BottleneckConfig do not need it"
        )
    return found


def side(module: Any) -> str:
    config = getattr(module, "config", None)
    causal = getattr(module, "is_causal", True)
    of_decoder = getattr(module, "is_decoder", False) or getattr(config, "is_decoder", False)
    if (
        getattr(module, "is_cross_attention", False)
        or "cross" in type(module).__name__.lower()
        or (of_decoder and not causal)
    ):
        return "cross"
    return "decoder" if causal else "encoder"


def sizes(name: str, module: Any) -> Sizes:
    """Read off the module's attributes and projections, else its config. Raises ValueError naming the module."""
    H, DH = _read(module, _HEADS), _read(module, _HEAD_SIZE)
    if H is None or DH is None:
        missing = "number of heads" if H is None else "head size"
        raise ValueError(f"target_modules: the {missing} of {name}, a {type(module).__name__}, is not known")
    H_KV = (
        H // module.num_key_value_groups if hasattr(module, "num_key_value_groups") else _read(module, _KV_HEADS) or H
    )
    key_width, value_width = H_KV * DH, H_KV * getattr(module, "v_head_dim", DH)
    for projections in _PROJECTIONS:
        widths = [getattr(getattr(module, part, None), "out_features", None) for part in projections]
        if None not in widths:
            (key_width, value_width), H_KV = widths, widths[0] // DH
    if key_width != H_KV * DH or key_width != value_width:
        raise ValueError(
            f"target_modules: {name}, a {type(module).__name__}, has keys of {key_width} features and values of "
            f"{value_width}; prefixes need the same number, a multiple of the head size {DH}"
        )
    return Sizes(H, H_KV, DH)


def _read(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for owner in module, getattr(module, "config", None):
        for name in names:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None

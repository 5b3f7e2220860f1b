"""A prefix at the input layer alone: P trained rows in front of the hidden states that enter the first layer.

They are put in behind the embedding stage, so that no learned position moves and no position table gets longer; rotary
positions of the rows are -P to -1. Everything behind the stack of layers sees the real tokens alone.

Where every token sees every other (encoders), the rows run through the layers in front of the sequence and are cut off
behind the last one. Where attention is causal, the rows see only each other. Their keys and values are then the same
for the whole batch: the frozen stack runs once on the rows alone, and every layer gets what it computed there as its
prefix, so that caches and positions stay those of the base model. Under gradient checkpointing, which runs layers again
and keeps no caches, and in training under FSDP, causal models also have the rows in front of the sequence.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fast.methods._checks import NeverMerges
from peft_fast.methods._per_thread import PerThread
from peft_fast.methods.prefix_config import PrefixConfig
from peft_fast.methods.prefix_interface import FRONT, cache_of
from peft_fast.methods.prefix_targets import find_attention

# What a module that needs the tokens before it takes.
_CACHES = {"cache", "cache_params", "layer_past", "past_key_values"}
# The name of the rows among the children of the module that they are put in front of.
ROWS = "input_prefix"
_Prefix = tuple[Tensor, Tensor, Tensor | None]


class InputLayer(NeverMerges, nn.Module, BaseTunerLayer):
    """The rows (P, D) of one model, by adapter name; those of several active adapters stand one behind the other."""

    kind = "a prefix"
    adapter_layer_names = ("prefix_input",)
    other_param_names = ("prefix_config",)
    # peft's own ask a base layer, which this one does not wrap.
    weight = bias = None  # type: ignore[assignment]

    def __init__(self, width: int, adapter_name: str) -> None:
        super().__init__()
        self.width = width
        self.prefix_input = nn.ParameterDict()
        self.prefix_config: dict[str, PrefixConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        # While a list: the model runs without rows, and the hidden states that they would stand in front of are kept.
        self.recorded: list[Tensor] | None = None

    def update_layer(self, adapter_name: str, config: PrefixConfig, like: Tensor) -> None:
        rows = nn.Parameter(torch.randn(config.num_virtual_tokens, self.width))
        # On the meta device the checkpoint that is about to be loaded brings the device.
        self.prefix_input[adapter_name] = rows if rows.is_meta else rows.to(like.device, like.dtype)
        self.prefix_config[adapter_name] = config

    def active_prefixes(self) -> list[str]:
        if self.disable_adapters or self.recorded is not None:
            return []
        return [name for name in self.active_adapters if name in self.prefix_config]

    def length(self) -> int:
        """The number P of active rows."""
        return sum(len(self.prefix_input[name]) for name in self.active_prefixes())

    def rows(self, like: Tensor) -> Tensor:
        """The active rows (P, D)."""
        rows = []
        for name in self.active_prefixes():
            row, p = self.prefix_input[name], self.prefix_config[name].prefix_dropout
            rows.append(nn.functional.dropout(row, p) if self.training and p else row)
        return torch.cat([row.to(like.device, like.dtype) for row in rows])

    def __repr__(self) -> str:
        return "prefix." + super().__repr__()


class Stack(NamedTuple):
    """The layers that the rows run through.

    `name` and `first` are the module in front of which they are put; one of `checkpointing` knows of checkpointing.
    """

    name: str
    width: int
    causal: bool
    owner: PreTrainedModel
    first: nn.Module
    last: nn.Module
    attention: list[nn.Module]
    checkpointing: tuple[nn.Module, ...]


def find_stack(model: nn.Module) -> Stack:
    """The one stack of layers of a model, of an encoder-decoder model the encoder's. Raises ValueError."""
    found = find_attention(model)
    sides = set(found.values())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = {name: side for name, side in found.items() if side == "encoder"}
    lists = {match[1] if (match := re.match(r"(.+?)\.\d+\.", name)) else name for name in found}
    if (
        len(set(found.values())) != 1
        or len(lists) != 1
        or not isinstance(blocks := model.get_submodule(next(iter(lists))), nn.ModuleList)
    ):
        raise ValueError(
            f"layers: 'input' needs a model with one stack of layers, and {type(model).__name__} has {sorted(sides)} "
            f"attention in {sorted(lists) or 'none'}; use layers='all'"
        )
    (name,) = lists
    path = name.split(".")
    above = [".".join(path[:i]) for i in reversed(range(len(path)))]
    parents = [model.get_submodule(name) for name in above]
    owner = next((module for module in parents if isinstance(module, PreTrainedModel)), None)
    if owner is None:
        raise ValueError(f"layers: 'input' needs a transformers model, got a {type(model).__name__}; use layers='all'")
    for option in "layerdrop", "encoder_layerdrop":
        if getattr(owner.config, option, 0.0):
            raise ValueError(f"layers: 'input' cannot drop layers, set {option}={getattr(owner.config, option)} to 0")
    width = getattr(owner.config.get_text_config(), "hidden_size", None)
    if width is None:
        raise ValueError(
            f"layers: 'input' needs one width, {type(owner).__name__} has no hidden_size; use layers='all'"
        )
    attention = [model.get_submodule(name) for name in found]
    causal = set(found.values()) == {"decoder"}
    others = {
        type(module).__name__
        for path, module in blocks.named_modules(prefix=name)
        if causal and not any(f"{place}.".startswith(f"{path}.") for place in found)
        if _CACHES & inspect.signature(module.forward).parameters.keys()
    }
    if others:
        raise ValueError(
            f"layers: 'input' needs a causal model in which nothing but attention mixes tokens, and "
            f"{type(model).__name__} has {', '.join(sorted(others))}; use layers='all'"
        )
    parent = parents[0]
    checkpointing = (owner, parent, blocks[0])
    if next(iter(inspect.signature(parent.forward).parameters)) == "hidden_states":
        # This one's own first step may widen the embeddings, and it may run one layer several times.
        wider = [child.in_features for child in parent.children() if isinstance(child, nn.Linear)]
        return Stack(above[0], [*wider, width][0], causal, owner, parent, parent, attention, checkpointing)
    return Stack(f"{name}.0", width, causal, owner, blocks[0], blocks[-1], attention, checkpointing)


class _Now(PerThread):
    """Of the forward of a causal model."""

    # Keys and values (1, H_KV, P, DH) of the rows by attention module, and the parameters that they were made from.
    keys: dict[nn.Module, tuple[Tensor, Tensor]] | None = None
    made_from: Any = None
    # While it is true, the stack runs on the rows alone, and fills `keys`.
    alone = False


class Front:
    """Puts the rows of an `InputLayer` in front of a model's sequences, until `off`."""

    def __init__(self, stack: Stack, layer: InputLayer) -> None:
        self.stack = stack
        self.layer = layer
        self.now = _Now()
        for module in stack.attention:
            setattr(module, FRONT, self)
        self.handles = [
            stack.first.register_forward_pre_hook(self._insert, with_kwargs=True),
            stack.last.register_forward_hook(self._cut),
            stack.owner.register_forward_hook(self._trim),
        ]
        for module in stack.owner.modules():
            accepted = inspect.signature(module.forward).parameters
            turns = any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
            if turns and "position_ids" in accepted:
                self.handles.append(module.register_forward_pre_hook(self._positions, with_kwargs=True))
            if "padding_mask" in accepted:
                self.handles.append(module.register_forward_pre_hook(self._padding, with_kwargs=True))
        if stack.causal:
            self.handles += [
                stack.owner.register_forward_pre_hook(self._run, with_kwargs=True),
                stack.owner.register_forward_hook(self._forget, with_kwargs=True, always_call=True),
            ]

    def off(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.stack.attention:
            delattr(module, FRONT)

    def apply(
        self, module: nn.Module, prefix: _Prefix | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[_Prefix | None, Tensor | None]:
        """What one attention module sees: its prefix with the rows' keys and values, and the mask with the rows."""
        P = self.layer.length()
        if not P:
            return prefix, mask
        if self.now.alone:
            if module in self.now.keys or (mask is not None and mask.shape[1] > 1):
                found = "calls it again" if module in self.now.keys else "has a mask for each head"
                raise ValueError(
                    f"layers: 'input' needs each module to call attention once, behind the mask of all heads, and a "
                    f"{type(module).__name__} {found}; use layers='all'"
                )
            self.now.keys[module] = key, value
            # Whatever the layer's window, and whatever packing the positions look like: the rows see each other in the
            # same way in front of a sequence.
            mask = None if mask is None else _widen(mask[..., :0, :0], P, 0, causal=True)
            return prefix, mask
        if self._in_sequence():
            return prefix, None if mask is None else _widen(mask, P, query.shape[2] - P, self.stack.causal)
        keys = self.now.keys or {}
        if module not in keys:
            raise ValueError(
                f"layers: 'input' needs the whole {type(self.stack.owner).__name__} to run, not a "
                f"{type(module).__name__} alone or again; for checkpointing use gradient_checkpointing_enable"
            )
        key, value = (rows[0] for rows in keys[module])
        key = key.to(value.dtype)  # autocast leaves rotary keys in float32
        if prefix is None:
            return (key, value, None), mask
        if prefix[2] is not None:
            raise ValueError("gate: a gated prefix cannot be active together with others, got one of layers='input'")
        return (
            torch.cat([key, prefix[0].to(value.dtype)], 1),
            torch.cat([value, prefix[1].to(value.dtype)], 1),
            None,
        ), mask

    def _in_sequence(self) -> bool:
        if not self.stack.causal or self._sharded():
            return True
        return any(m.training and getattr(m, "gradient_checkpointing", False) for m in self.stack.checkpointing)

    def _sharded(self) -> bool:
        """Whether FSDP frees a layer's weights after its own backward, which that of the rows' keys may follow."""
        # By a method of FSDPModule, which torch has only where it is built with distributed.
        return torch.is_grad_enabled() and hasattr(self.stack.checkpointing[-1], "unshard")

    def _inserted(self) -> int:
        """How many rows stand in front of the sequence in the layers."""
        return self.layer.length() if not self.now.alone and self._in_sequence() else 0

    def _insert(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is None:
            raise ValueError(
                f"layers: 'input' needs layers that take hidden_states, {type(module).__name__} got "
                f"{', '.join(kwargs)}; use layers='all'"
            )
        if self.layer.recorded is not None:
            self.layer.recorded.append(hidden.detach())
        if self.now.alone:
            # Not before: FSDP gathers the rows with the layer's own weights.
            hidden = self.layer.rows(hidden)[None]
        elif self._inserted():
            hidden = torch.cat([self.layer.rows(hidden).expand(len(hidden), -1, -1), hidden], 1)
        else:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def _cut(self, module: nn.Module, args: tuple, output: Any) -> Any:
        P = self._inserted()
        if not P:
            return None

        def cut(hidden: Tensor) -> Tensor:
            return hidden[:, P:].clone() if self._sharded() else hidden[:, P:]  # FSDP warns of views

        if isinstance(output, Tensor):
            return cut(output)
        if isinstance(output, tuple):
            return cut(output[0]), *output[1:]
        output.last_hidden_state = cut(output.last_hidden_state)
        return output

    def _trim(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Cut the rows off the hidden states and router logits of all layers too, if they are part of the output."""
        P = self._inserted()
        if not P:
            return None
        Z, wide = output[0].shape[0], output[0].shape[1] + P

        def cut(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(cut(item) for item in value)
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == wide:
                return value[:, P:]
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == Z * wide:  # a router's logits
                return value.unflatten(0, (Z, wide))[:, P:].flatten(0, 1)
            return value

        if isinstance(output, tuple):
            return cut(output)
        for name in "hidden_states", "router_logits":
            if output.get(name) is not None:
                setattr(output, name, cut(output[name]))
        return output

    def _positions(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        P = self._inserted()
        if not P:
            return None
        given = _by_name(module, args, kwargs)
        own: Any = given["position_ids"]
        rows = torch.arange(-P, 0, device=own.device, dtype=own.dtype).expand(*own.shape[:-1], -1)
        return (), given | {"position_ids": torch.cat([rows, own], -1)}

    def _padding(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Widen attention's mask where a layer hands it to its router too."""
        P = self._inserted()
        given = _by_name(module, args, kwargs)
        mask = given.get("padding_mask")
        if not P or mask is None or mask.dim() != 4:
            return None
        return (), given | {"padding_mask": _widen(mask, P, mask.shape[-2], self.stack.causal)}

    def _run(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Compute the rows' keys and values, once for all layers and the whole batch."""
        P = self.layer.length()
        past = cache_of(kwargs)
        if P and self._sharded() and past is not None and past.get_seq_length() > 0:
            raise ValueError("layers: 'input' goes on from a cache under FSDP only where gradients are off")
        accepted = inspect.signature(module.forward).parameters
        if P and self._sharded() and "use_cache" in accepted:  # which would have the rows in it
            return args, kwargs | {"use_cache": False}
        if not P or self.now.alone or self._in_sequence():
            return None
        made_from = self._made_from()
        if made_from is not None and made_from == self.now.made_from and past is not None and past.get_seq_length() > 0:
            return None
        inputs: dict[str, Any] = {"input_ids": torch.zeros(1, P, dtype=torch.long, device=module.device)}
        if "position_ids" in accepted:
            # Learned positions are not used, the rows come in behind them; any number that the table has will do.
            turned = any(name.endswith("inv_freq") for name, _ in module.named_buffers())
            inputs["position_ids"] = torch.arange(-P, 0, device=module.device)[None] * turned
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        # The rows have a dropout of their own, as in front of a sequence.
        was_training = [part for part in module.modules() if part.training and part is not self.layer]
        self.now.keys, self.now.made_from, self.now.alone = {}, None, True
        try:
            # One draw of dropout would be shared by the whole batch.
            for part in was_training:
                part.training = False
            module(**inputs)
        finally:
            self.now.alone = False
            for part in was_training:
                part.training = True
        self.now.made_from = made_from
        return None

    @torch.no_grad()
    def try_out(self) -> None:
        """Compute keys and values once, which raises ValueError where they are not all that the rows would do."""
        if self.stack.causal:
            self._run(self.stack.owner, (), {})
            self._forget(self.stack.owner, (), {}, None)

    def _made_from(self) -> Any:
        rows = [self.layer.prefix_input[name] for name in self.layer.active_prefixes()]
        if torch.is_grad_enabled() or any(row.is_inference() for row in rows):  # which count no versions
            return None
        return [(row.data_ptr(), row._version, row.dtype) for row in rows]

    def _forget(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Keep nothing but what the next step of generation needs, whose cache was computed behind the same rows."""
        cached = isinstance(output, Mapping) and cache_of(output) is not None
        if not self.now.alone and (self.now.made_from is None or not cached):
            self.now.keys, self.now.made_from = {}, None


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _widen(mask: Tensor, P: int, S: int, causal: bool) -> Tensor:
    """A mask (…, S, T) with P rows and columns in front: everything sees the rows, up to themselves where causal.

    Where it is not, they see every token that some token sees.
    """
    boolean = mask.dtype == torch.bool
    hidden: Any = False if boolean else torch.finfo(mask.dtype).min
    shape, T = mask.shape[:-2], mask.shape[-1]
    mask = mask.expand(*shape, S, T)
    among = mask.new_full((P, P), boolean)
    if causal:
        among.masked_fill_(mask.new_ones(P, P, dtype=torch.bool).triu(1), hidden)
        seen = mask.new_full((1, T), hidden)
    else:
        seen = mask.any(-2, keepdim=True) if boolean else mask.amax(-2, keepdim=True)
    rows = torch.cat([among.expand(*shape, P, P), seen.expand(*shape, P, T)], -1)
    return torch.cat([rows, torch.cat([mask.new_full((*shape, S, P), boolean), mask], -1)], -2)

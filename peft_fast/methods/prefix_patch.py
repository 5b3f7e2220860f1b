"""A faster forward for the models of peft's own prefix tuning, with peft's parameters, positions and outputs.

peft copies the prefix over the batch, puts it into a cache, and every layer concatenates the cache with its keys and
values behind a dense mask. Here peft's forward gets a cache that says how long the prefix is, which moves positions and
masks as peft has them, and otherwise hands back what it is given; the prefix itself, without a batch, travels to each
attention module among the keyword arguments of the base model, so that checkpointed layers see it again in backward.
`generate` does not call this forward and runs stock.
"""

import inspect
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import peft
import torch
from peft import PeftType
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from peft_fast.methods.prefix_interface import CHILD, CHOSEN, GIVEN, NAMES, configs, dispatches, hands_on, name_for
from peft_fast.methods.prefix_targets import side
from peft_fast.support import STOCK_CALL, wraps

_TO_CONFIG = "train a peft_fast.PrefixConfig instead, which is right there"
CHECKPOINTED = "right under gradient checkpointing, where stock loses the prefix or crashes"
_NOT_HANDED_ON = "last call: the base model did not hand the prefix on to its attention modules"
_CHANGED = "last call: the base model changes keys and values between its cache and attention"


class _ChangedError(Exception):
    """Attention got something else than the keys and values of the cache, which the prefix would not fit."""


class _HeldLayer(DynamicLayer):
    """A cache layer that holds a prefix without a batch beside the keys and values of the tokens.

    Attention gets those of the tokens alone. Whoever reads the layer later finds what peft's has: prefix and tokens,
    joined on the first use, after which it is an ordinary layer.
    """

    def __init__(self, key: Tensor, value: Tensor, batch_size: int) -> None:
        self.prefix = (key, value)
        self.batch_size = batch_size
        self.tokens: tuple[Tensor, Tensor] | None = None
        self.dtype, self.device = key.dtype, key.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.tokens is not None:
            self._join()
            return self.update(key_states, value_states, *args, **kwargs)
        self.tokens = (key_states, value_states)
        return self.tokens

    def get_seq_length(self) -> int:
        return self.prefix[0].shape[-2] + (0 if self.tokens is None else self.tokens[0].shape[-2])

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        if self.tokens is not None:
            return super().get_mask_sizes(query_length)
        # The first forward sees the tokens alone, behind the prefix's positions. In transformers 5.0 these are given.
        return (len(query_length) if isinstance(query_length, Tensor) else query_length), self.get_seq_length()

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("keys", "values") or "prefix" not in self.__dict__:
            raise AttributeError(name)
        self._join()
        return self.__dict__[name]

    def _join(self) -> None:
        joined = [rows.expand(self.batch_size, -1, -1, -1) for rows in self.prefix]
        if self.tokens is not None:
            joined = [torch.cat(pair, dim=-2) for pair in zip(joined, self.tokens, strict=True)]
        del self.prefix, self.tokens, self.batch_size
        self.__class__ = DynamicLayer  # type: ignore[assignment]
        self.keys, self.values = joined


@dataclass(eq=False)
class _Call:
    """The prefix of one forward; an attention module asks it for its own."""

    model: Any
    adapter: str
    records: bool
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    cache: DynamicCache | None = None
    served: set[int] = field(default_factory=set)
    repeats: bool = False

    def give(self, batch_size: int) -> DynamicCache | None:
        """The cache for the base model. None where peft's own is of another kind."""
        prompt: Any = _stock_prompt(self.model)
        if type(prompt) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in prompt.layers):
            return None
        stock: list[Any] = prompt.layers
        self.layers = [(layer.keys, layer.values) for layer in stock]
        prompt.layers = [_HeldLayer(*rows, batch_size) for rows in self.layers]
        self.cache = prompt
        return prompt

    def __call__(self, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values (H_KV, P, DH) for an attention module; None where peft's own cache is in use."""
        if not self.layers:
            return None
        tokens = self.tokens(module.layer_idx)
        if tokens is not None and not (key is tokens[0] and value is tokens[1]):
            raise _ChangedError
        grad = torch.is_grad_enabled()
        self.repeats |= self.records and not grad
        self.served.add(module.layer_idx)
        layers = self.layers
        if self.repeats and grad:
            # Reentrant checkpointing runs backward through every repeated layer on its own, which one common graph
            # from the parameters would not survive.
            if self.model.active_adapter != self.adapter:
                raise RuntimeError(
                    f"adapter {self.adapter!r} ran this forward, but {self.model.active_adapter!r} is active in its "
                    "backward, which repeats the forward: switch adapters after backward"
                )
            layers = [(layer.keys, layer.values) for layer in _stock_prompt(self.model).layers]
        prefix_key, prefix_value = layers[module.layer_idx]
        return prefix_key[0], prefix_value[0]

    def tokens(self, layer_idx: int) -> Any:
        """The keys and values that a module reached for the cache with, if it has."""
        return None if self.cache is None else getattr(self.cache.layers[layer_idx], "tokens", None)

    def handed_on(self) -> bool:
        """Whether the prefix reached all modules that reached for the cache."""
        if self.cache is None:
            return True
        touched = {i for i in range(len(self.cache.layers)) if self.tokens(i) is not None}
        return bool(self.served) and touched <= self.served


_current: ContextVar[_Call | None] = ContextVar("peft_fast_prefix_call", default=None)


def _stock_prompt(model: Any) -> Any:
    """peft's cache for a batch of one."""
    token = _current.set(None)
    try:
        return model.get_prompt(1)
    finally:
        _current.reset(token)


class _Fused:
    """Goes in front of a peft model class. Instances get it, and lose it, by a change of class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, _Fused):
            # `disable_adapter` leaves this method on the instance, where it outlives `unpatch`.
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        reason = why_stock(self) or _why_not_call(self, kwargs)
        if not reason:
            output, reason = self._forward_with_prefix(*args, **kwargs)
            if not reason:
                self.__dict__.pop(STOCK_CALL, None)
                return output
        self.__dict__[STOCK_CALL] = reason
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _forward_with_prefix(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, str]:
        call = _Call(self, self.active_adapter, torch.is_grad_enabled())
        token = _current.set(call)
        try:
            output = super().forward(*args, **kwargs, **{GIVEN: call})  # type: ignore[misc]
        except _ChangedError:
            return None, _CHANGED
        finally:
            _current.reset(token)
        return output, "" if call.handed_on() else _NOT_HANDED_ON

    def get_prompt(self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        call = None if torch.compiler.is_compiling() else _current.get()
        cache = call.give(batch_size) if call is not None and call.model is self else None
        return super().get_prompt(batch_size, *args, **kwargs) if cache is None else cache  # type: ignore[misc]


# Their names are peft's, so that a patched model prints as it did.
class PeftModelForSequenceClassification(_Fused, peft.PeftModelForSequenceClassification):
    pass


class PeftModelForCausalLM(_Fused, peft.PeftModelForCausalLM):
    pass


class PeftModelForTokenClassification(_Fused, peft.PeftModelForTokenClassification):
    pass


class PeftModelForQuestionAnswering(_Fused, peft.PeftModelForQuestionAnswering):
    pass


class PeftModelForFeatureExtraction(_Fused, peft.PeftModelForFeatureExtraction):
    pass


_ALL = (
    PeftModelForSequenceClassification,
    PeftModelForCausalLM,
    PeftModelForTokenClassification,
    PeftModelForQuestionAnswering,
    PeftModelForFeatureExtraction,
)
PATCHES = {getattr(peft, kind.__name__): kind for kind in _ALL}
PATCHED = {patched: stock for stock, patched in PATCHES.items()}


def is_prefix_model(module: nn.Module) -> bool:
    """Whether a module is a model of peft's prefix tuning."""
    if not isinstance(module, peft.PeftModel) or not isinstance(module.active_adapter, str):
        return False
    config = module.peft_config.get(module.active_adapter)  # its only adapter may have been deleted
    return config is not None and config.peft_type == PeftType.PREFIX_TUNING


def swap(model: Any) -> None:
    if type(model) in PATCHES:
        _drop_leftover(model)
        model.__class__ = PATCHES[type(model)]


def swap_back(model: Any) -> None:
    if type(model) in PATCHED:
        _drop_leftover(model)
        model.__class__ = PATCHED[type(model)]
        model.__dict__.pop(STOCK_CALL, None)
        for config in configs(model.base_model):
            if (name := config._attn_implementation) in CHOSEN:
                config._attn_implementation_internal = CHOSEN[name]


def _drop_leftover(model: Any) -> None:
    """Take the method off that `disable_adapter` leaves on the instance, where it says what the class says."""
    forward, kind = model.__dict__.get("forward"), type(model)
    if isinstance(forward, MethodType) and forward.__self__ is model and forward.__func__ is kind.forward:
        del model.__dict__["forward"]


@dataclass(frozen=True)
class _Facts:
    """What does not change from call to call."""

    base: nn.Module
    configs: tuple[Any, ...]
    reason: str


# By the id of a peft model, which is looked up faster than a weak key.
_facts: dict[int, tuple[weakref.ref, _Facts]] = {}


def _facts_of(model: Any) -> _Facts:
    key, base = id(model), model.base_model
    known, facts = _facts.get(key, (None, None))
    if facts is None or known is None or known() is not model or facts.base is not base:
        kinds = tuple(configs(base))
        facts = _Facts(base, kinds, _why_wrong(base, kinds) or _why_not_model(model, base))
        _facts[key] = weakref.ref(model, lambda gone: _forget(key, gone)), facts
    return facts


def _forget(key: int, gone: weakref.ref) -> None:
    if key in _facts and _facts[key][0] is gone:
        del _facts[key]


def why_stock(model: Any) -> str:
    """Why a model of peft's prefix tuning runs stock even when patched; empty where it runs fused."""
    config = model.active_peft_config
    if config.peft_type != PeftType.PREFIX_TUNING:
        return f"the active adapter is {config.peft_type.value}"
    facts = _facts_of(model)
    if facts.reason:
        return facts.reason
    if type(model) not in PATCHED and type(model) not in PATCHES:
        return f"no fused forward for {type(model).__name__}, which does not use the prefix in every forward"
    forward = model.__dict__.get("forward")
    if forward is not None and not (wraps(forward, type(model).forward) or wraps(forward, _Fused.forward)):
        return "forward is set on the instance (a disabled adapter?)"
    for other in facts.configs:
        if (name := other._attn_implementation) not in NAMES and name not in CHOSEN:
            return f"the attention implementation is {name!r}, not eager or sdpa"
    for module in model.prompt_encoder[model.active_adapter].modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "the prompt encoder has hooks"
    return ""


def _why_wrong(base: Any, kinds: tuple[Any, ...]) -> str:
    """Where peft's outputs are not those of prefix tuning. Stock is kept as it is."""
    if getattr(base.config, "is_encoder_decoder", False):
        return (
            "peft's prefix tuning is wrong in encoder-decoder models, where half of its parameters are dead and two "
            f"layers share a prefix: {_TO_CONFIG}"
        )
    for config in kinds:
        types = getattr(config, "layer_types", None)
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        if any(kind != "full_attention" for kind in types) if types else any(window is not None for window in windows):
            return (
                "peft's prefix tuning is wrong in models with sliding windows, which the prefix leaves: " + _TO_CONFIG
            )
    return ""


def _why_not_model(model: Any, base: Any) -> str:
    backbone = getattr(base, getattr(model, "transformer_backbone_name", ""), base)
    parts = {part: inspect.signature(part.forward).parameters for part in (base, backbone)}
    if not any("past_key_values" in parameters or "cache" in parameters for parameters in parts.values()):
        return f"peft's prefix tuning refuses {type(base).__name__}: {_TO_CONFIG}"
    for part, parameters in parts.items():
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return f"{type(part).__name__} takes no further keyword arguments"
    modules = [module for module in base.modules() if dispatches(module)]
    indices = [getattr(module, "layer_idx", None) for module in modules]
    if any(hasattr(module, CHILD) for module in modules):
        return "the base model has other prefixes"
    if any(side(module) == "cross" for module in modules) or len(set(indices)) != len(indices):
        return "not every attention module has a layer of the cache to itself"
    if set(indices) != set(range(model.active_peft_config.num_layers)):
        return "not every layer is attention through transformers' attention interface"
    for kind in {type(module) for module in modules}:
        if not hands_on(kind):
            return f"{kind.__name__} does more with the keys and values of the cache than attend to them"
    if any(getattr(module, "sinks", None) is not None for module in modules):
        return "attention sinks are not fused"
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        return "the base model is on several devices"
    return ""


def _why_not_call(model: Any, kwargs: dict[str, Any]) -> str:
    if torch._C._get_tracing_state() is not None:
        return "last call: torch.jit is tracing"
    loss = model.base_model.__dict__.get("_loss_function")
    if loss is not None and getattr(loss, "__module__", "").partition(".")[0] != "transformers":
        return "last call: a loss function of your own, which the prefix would reach as a keyword argument"
    if (last := model.__dict__.get(STOCK_CALL)) in (_NOT_HANDED_ON, _CHANGED):
        return last
    for config in _facts_of(model).configs:
        # Only here, since a checkpointed layer reads it again in backward; `swap_back` undoes it.
        if config._attn_implementation in NAMES:
            config._attn_implementation_internal = name_for(config._attn_implementation)
    asked = kwargs.get("output_attentions")
    if asked or (asked is None and getattr(model.base_model.config, "output_attentions", False)):
        return "last call: attention weights were asked for"
    return ""


def is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

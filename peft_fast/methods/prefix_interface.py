"""Prefixes in front of the attention of transformers' models, through transformers' attention interface.

An attention module looks its function up by the name in its config. Under "sdpa" a function of this file takes the
place of transformers' own: a module with an active prefix gets `prefix_attention`, every other call goes to the
function that stood there. The name stays, since models branch on it. "eager" stands for another function in each
model's file, and a user may have a function under "sdpa": those configs get a name of this package, with the same
masks. No module is replaced and no cache is touched, so that positions, masks and lengths stay those of the base model.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from peft_fast import support
from peft_fast.ops._shared import fit
from peft_fast.ops.prefix_attention import apply_prefix_attention

# The name of the prefix among an attention module's children.
CHILD = "attn_prefix"
# The name of what stands for a prefix at the input layer in each attention module behind it.
FRONT = "_input_prefix"
# The keyword under which a caller hands attention modules a prefix for one forward: a function of the module, its keys
# and its values.
GIVEN = "peft_fast_prefix"
NAMES = {"eager": "peft_fast_prefix_eager", "sdpa": "peft_fast_prefix_sdpa"}
CHOSEN = {name: implementation for implementation, name in NAMES.items()}
# The functions that this file's may stand in front of under "sdpa": they are known not to call it in turn.
FOLLOWERS: list[Callable] = [sdpa_attention_forward]
_logger = logging.get_logger(__name__)
_eager_functions: dict[type, Callable] = {}
_behind: Callable = sdpa_attention_forward


def dispatches(module: nn.Module) -> bool:
    """Whether a module looks its attention function up in transformers' interface."""
    forward = getattr(type(module), "forward", None)  # a scripted module's raises an AttributeError
    code = None if forward is None else getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def hands_on(kind: type) -> bool:
    """Whether a class of attention modules does nothing with what its cache returns but call attention on it.

    Read off the source of its forward, since a checkpointed layer has no cache in which this could be seen. True where
    there is none.
    """
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))))  # type: ignore
    except (OSError, TypeError, SyntaxError):
        return True
    for node in nodes:
        match node:
            case ast.Assign(
                targets=[ast.Tuple(elts=[ast.Name(id=key), ast.Name(id=value)])],
                value=ast.Call(func=ast.Attribute(attr="update")),
            ):
                after = [other for other in nodes if getattr(other, "lineno", 0) > (node.end_lineno or 0)]
                fair = {other.value for other in after if isinstance(other, ast.Attribute) and other.attr == "shape"}
                for call in (other for other in after if isinstance(other, ast.Call)):
                    arguments = {*call.args, *(word.value for word in call.keywords)}
                    if {key, value} <= {argument.id for argument in arguments if isinstance(argument, ast.Name)}:
                        fair |= arguments
                if any(isinstance(other, ast.Name) and other.id in (key, value) for other in set(after) - fair):
                    return False
    return True


class Switch:
    """Lets every attention module of a model ask for a function of this file, until `off`.

    What is neither "eager" nor "sdpa" becomes "sdpa". As the model's hook it does so again where
    `set_attn_implementation` has been called since.
    """

    def __init__(self, model: nn.Module) -> None:
        self.configs = list(configs(model))
        # A config that another model has too may have a name of this package already.
        self.chosen = [CHOSEN.get(name, name) for name in (config._attn_implementation for config in self.configs)]
        self.named = list(self.chosen)
        self.handle = model.register_forward_pre_hook(self)
        self()

    def __call__(self, *args: Any) -> None:
        for i, config in enumerate(self.configs):
            if config._attn_implementation != self.named[i]:
                self.chosen[i] = config._attn_implementation
            self.named[i] = name_for(self.chosen[i])
            # The public setter would also change the configs of the model's other parts.
            config._attn_implementation_internal = self.named[i]

    def off(self) -> None:
        self.handle.remove()
        for config, chosen, named in zip(self.configs, self.chosen, self.named, strict=True):
            if config._attn_implementation == named:
                config._attn_implementation_internal = chosen


def name_for(implementation: str) -> str:
    """The name under which a config that says `implementation` reaches this file's functions."""
    global _behind
    if CHOSEN.get(implementation, implementation) == "eager":
        return NAMES["eager"]
    found = AttentionInterface()["sdpa"]
    if found in FOLLOWERS:
        _behind = found
        AttentionInterface.register("sdpa", _in_front)
    return "sdpa" if found in (_in_front, *FOLLOWERS) else NAMES["sdpa"]


def behind() -> Callable:
    """What "sdpa" stands for where there is no prefix."""
    found = AttentionInterface()["sdpa"]
    return _behind if found is _in_front else found


def put_behind(function: Callable) -> None:
    """Let "sdpa" stand for one of `FOLLOWERS` where there is no prefix."""
    global _behind
    if AttentionInterface()["sdpa"] is _in_front:
        _behind = function
    else:
        AttentionInterface.register("sdpa", function)


def cache_of(given: Any) -> Any:
    """The cache among the arguments or the results of a model: `cache` from transformers 5.24 on."""
    found = (given.get(name) for name in ("cache", "past_key_values"))
    return next((cache for cache in found if cache is not None), None)


def configs(model: nn.Module) -> Iterator[Any]:
    """Those that attention modules read, and those from which their models make masks, each once."""
    seen = set()
    for module in model.modules():
        if (isinstance(module, PreTrainedModel) or dispatches(module)) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield module.config


def _attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query (Z, H, S, DH), key and value (Z, H_KV, T, DH) to y (Z, S, H, DH)."""
    layer: Any = getattr(module, CHILD, None)
    if layer is not None and layer.recorded is not None:
        layer.recorded.append((key, value))
    prefix = None if layer is None else layer.prefix()
    given = kwargs.pop(GIVEN, None)
    if given is not None and (rows := given(module, key, value)) is not None:
        prefix = (*rows, None)
        if attention_mask is not None and attention_mask.shape[-1] == rows[0].shape[1] + key.shape[2]:
            attention_mask = attention_mask[..., rows[0].shape[1] :]
    front: Any = getattr(module, FRONT, None)
    if front is not None:
        prefix, attention_mask = front.apply(module, prefix, query, key, value, attention_mask)
    if prefix is None:
        if implementation == "eager" and getattr(module, "reorder_and_upcast_attn", False):
            # GPT-2 asks for the name "eager" itself.
            return module._upcast_and_reordered_attn(query, key, value, attention_mask)  # type: ignore[operator]
        stock = _eager_function(type(module)) if implementation == "eager" else behind()
        y, weights = stock(module, query, key, value, attention_mask, *args, **kwargs)
        return y, weights if front is None or not front.layer.length() else None
    y = _with_prefix(implementation, module, prefix, query, key, value, attention_mask, *args, **kwargs)
    return y.transpose(1, 2).contiguous(), None


def _in_front(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attention("sdpa", *args, **kwargs)


def _with_prefix(
    implementation: str,
    module: nn.Module,
    prefix: tuple[Tensor, Tensor, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    for name, what in ("s_aux", "attention sinks"), ("cache", "a paged cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"prefixes do not support {what}, which {type(module).__name__} uses")
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"prefixes need keys and values of one size, {type(module).__name__} has {key.shape[-1]} and "
            f"{value.shape[-1]}"
        )
    if kwargs.get("output_attentions"):
        _logger.warning_once("Behind a prefix, no attention weights are returned, as under sdpa.")
    S, T = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Eager functions hide nothing that the mask does not hide. Without a mask, sdpa's query i sees keys 0 to i: the
    # keys from S on are the empty rest of a static cache.
    causal = implementation == "sdpa" and S > 1 and mask is None and causal
    if causal and T > S:
        key, value = key[:, :, :S], value[:, :, :S]
        position_bias = None if position_bias is None else position_bias[..., :S]
    elif causal and T < S:
        mask, causal = torch.ones(S, T, dtype=torch.bool, device=query.device).tril(), False
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = position_bias.masked_fill(~mask, -torch.inf)
        else:
            mask = position_bias + mask
    prefix_key, prefix_value, gate = prefix
    gate = None if gate is None else fit(gate, query.dtype)
    tensors = query, key, value, fit(prefix_key, query.dtype), fit(prefix_value, query.dtype), mask, gate
    backend = support.current_backend(module)  # the prefix may be made anew at each call
    return apply_prefix_attention(tensors, causal, scaling, None, softcap, dropout, None, backend)


def _eager_function(kind: type) -> Callable:
    """The one that the modeling file of a class of attention modules falls back on."""
    if kind not in _eager_functions:
        _eager_functions[kind] = inspect.unwrap(kind.forward).__globals__["eager_attention_forward"]  # type: ignore
    return _eager_functions[kind]


def register() -> None:
    """Add this file's functions to transformers' tables. Doing it again changes nothing."""
    masks = AttentionMaskInterface()
    for implementation, name in NAMES.items():
        AttentionInterface.register(name, partial(_attention, implementation))
        AttentionMaskInterface.register(name, masks[implementation])

"""Swap, report and exact undo, on a model that exists.

Patching changes the class of each layer that has a fused op, and of a model with peft's prefix tuning, to a subclass
whose forward asks, at every call, whether this call may be fused, and runs stock peft where not. The base model's own
`nn.Dropout` modules change with them, and its attention (`patch_attention`): on the CPU their dropout costs as much as
matmuls. Modules, parameters, hooks and state are not touched.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_fast import patch_attention, support
from peft_fast.eager import dropout_native
from peft_fast.methods import BottleneckLayer, PrefixLayer, prefix_patch
from peft_fast.methods.prefix_input import InputLayer
from peft_fast.ops.dropout import apply_dropout
from peft_fast.ops.lora_linear import apply_lora_linear


class Linear(lora.Linear):
    """peft's LoRA layer with a fused forward. Its name is peft's, so that a patched model prints as it did."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, Linear):  # a wrapper kept this method, and the layer was unpatched since
            return lora.Linear.forward(self, x, *args, **kwargs)
        call = "last call: it had more arguments" if args or kwargs else support.fusable_lora(self, x)
        if isinstance(call, str):
            if not torch.compiler.is_compiling():
                self.__dict__[support.STOCK_CALL] = call
            return super().forward(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.__dict__.pop(support.STOCK_CALL, None)
        return apply_lora_linear(x, *call)


class Dropout(nn.Dropout):
    """torch's dropout with a mask from fewer random words, on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        threshold = support.fusable_dropout(self, input) if isinstance(self, Dropout) else 0
        return apply_dropout(input, threshold) if threshold else nn.Dropout.forward(self, input)


@dataclass(frozen=True)
class _Patch:
    stock: type
    patched: type[nn.Module]
    op: str
    fusable: Callable[[Any], Any]  # the call's arguments, or the reason why a layer stays stock


_ALL = (_Patch(lora.Linear, Linear, "lora_linear", support.fusable_lora),)
_PATCHES = {patch.stock: patch for patch in _ALL}
_PATCHED = {patch.patched: patch for patch in _ALL}
# The layers of this package's own methods run fused from the start.
_OWN: dict[type, str] = {
    BottleneckLayer: "bottleneck_adapter",
    PrefixLayer: "prefix_attention",
    InputLayer: "prefix_attention",
}
_is_prefix = prefix_patch.is_prefix_model
_SWAPPED: dict[type, type] = {nn.Dropout: Dropout} | {patch.stock: patch.patched for patch in _ALL}
_STOCK = {patched: stock for stock, patched in _SWAPPED.items()}


@dataclass(frozen=True)
class PatchRow:
    """One adapter layer of a model, or a model with peft's prefix tuning as a whole.

    `state` is "fused" or "stock"; `reason` says why it is stock, or where a fused one is right and stock is not.
    """

    name: str
    op: str
    state: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What runs fused and what does not. `str(report)` is a table.

    `dropouts` is the number of patched dropouts of a base model on the CPU; they have no rows. `slow_dropout` says why
    a model on the CPU that drops has no compiled code for it; numpy draws the masks then.
    """

    rows: tuple[PatchRow, ...]
    dropouts: int = 0
    slow_dropout: str = ""

    def __str__(self) -> str:
        if not self.rows:
            return "peft_fast: no adapter layers"
        fused = sum(row.state == "fused" for row in self.rows)
        dropouts = f"; {self.dropouts} dropouts of the base model patched" if self.dropouts else ""
        slow = "no C compiler serves, so numpy draws dropout, more slowly: {}; CC names a compiler"
        notes = [slow.format(self.slow_dropout)] if self.slow_dropout else []
        table = [
            ("module", "op", "runs", "reason"),
            *((row.name, row.op, row.state, row.reason) for row in self.rows),
        ]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        return "\n".join([f"peft_fast: {fused} of {len(self.rows)} adapter layers fused{dropouts}", *notes, *lines])


def patch(model: nn.Module, *, strict: bool = False) -> PatchReport:
    """Let the adapter layers of `model` run fused, in place. Patching twice does no more than patching once.

    Only `forward` changes: modules, parameters, hooks, state_dict keys, isinstance checks, saving, merging and
    switching of adapters stay as they were. A call that cannot be fused runs stock peft. On the CPU the base model's
    `nn.Dropout` modules and the dropout of its attention draw their masks faster; those masks are other ones than
    stock's.

    The layers of `BottleneckConfig` and `PrefixConfig` run fused without it; of their models only the dropouts change.

    With peft's prefix tuning the forward of the whole model is fused where peft is right; where it is not, stock stays
    and the report says so. `generate` stays stock. While patched, the base model's config names an attention
    implementation of this package, which computes as before where there is no prefix.

    Args:
        model: any module that holds peft LoRA layers or layers of this package's methods, or is a model with peft's
            prefix tuning, such as what `get_peft_model` returns.
        strict: raise where a layer would stay stock, whatever the call.

    Raises ValueError where the model is none, has no layer that can be patched, or, with `strict`, where one stays
    stock; the model is then left as it was.
    """
    layers = list(_adapted(model))
    if not any(type(module) in (*_PATCHES, *_PATCHED, *_OWN) or _is_prefix(module) for _, module in layers):
        found = ", ".join(sorted({_class_path(module) for _, module in layers})) or "none, call get_peft_model first"
        raise ValueError(
            f"model: {type(model).__name__} has no LoRA layer, bottleneck adapter or prefix to patch; "
            f"adapter layers found: {found}"
        )
    stock = [PatchRow(name, _op(module), "stock", reason) for name, module in layers if (reason := _why_stock(module))]
    if strict and stock:
        raise ValueError(f"model: with strict=True every layer must run fused\n{PatchReport(tuple(stock))}")
    for module in (*(module for _, module in layers), *_dropouts(model)):
        swap(module)
    return report(model)


def swap(module: Any) -> None:
    """Patch this very module."""
    if _is_prefix(module):
        prefix_patch.swap(module)
    elif patch_attention.takes(module):
        patch_attention.swap(module)
    elif type(module) in _SWAPPED:
        module.__class__ = _SWAPPED[type(module)]


def unpatch(model: nn.Module) -> None:
    """Give every patched module of `model` its stock class back: the exact undo of `patch`."""
    check_model(model)
    for module in model.modules():
        if type(module) in prefix_patch.PATCHED or _is_prefix(module):
            prefix_patch.swap_back(module)
        elif patch_attention.is_swapped(module):
            patch_attention.swap_back(module)
        elif type(module) in _STOCK:
            module.__class__ = _STOCK[type(module)]
            module.__dict__.pop(support.STOCK_CALL, None)


def report(model: nn.Module) -> PatchReport:
    """One row for each adapter layer of `model`: what it runs now and, where that is stock peft, why.

    What only a call can tell (the input's size, dtype or device) is known after one: the row of a layer whose last
    call ran stock says why. Compiled calls leave no trace.
    """
    rows = []
    for name, module in _adapted(model):
        reason = _why_stock(module) or _since_patching(module)
        note = prefix_patch.CHECKPOINTED if _is_prefix(module) and prefix_patch.is_checkpointed(module) else ""
        rows.append(PatchRow(name, _op(module), "stock" if reason else "fused", reason or note))
    on_cpu = any(parameter.is_cpu for parameter in model.parameters())
    gains = on_cpu and support.draws_one_by_one()
    dropouts = sum(_drops_faster(module) for module in model.modules()) if gains else 0
    drops = on_cpu and any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return PatchReport(tuple(rows), dropouts, dropout_native.why_not() if drops else "")


def _drops_faster(module: nn.Module) -> bool:
    if patch_attention.is_used(module):  # its dropout may be a module, which counts itself
        return not any(type(child) is Dropout for child in module.children())
    return type(module) is Dropout and module.p > 0


def _dropouts(model: nn.Module) -> list[nn.Module]:
    """The modules of the base model that drop: those of an adapter layer are part of its op."""
    own: set[nn.Module] = set()
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        base = getattr(layer, "base_layer", None)
        own |= set(layer.modules()) - set(() if base is None else base.modules())
    return [
        module
        for module in model.modules()
        if (type(module) is nn.Dropout and module not in own) or patch_attention.takes(module)
    ]


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or _is_prefix(module):
            yield name or "(model)", module


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected what get_peft_model returned, got {type(model).__name__}")


def is_patched(module: nn.Module) -> bool:
    """Whether `patch` has changed this very module."""
    return type(module) in _STOCK or type(module) in prefix_patch.PATCHED or patch_attention.is_swapped(module)


def _since_patching(module: Any) -> str:
    if type(module) in _OWN:
        return ""
    if not is_patched(module):
        return "not patched: call peft_fast.patch"
    reason = module.__dict__.get(support.STOCK_CALL, "")
    return reason if reason.startswith("last call") else ""  # another reason holds no longer


def _op(module: nn.Module) -> str:
    if _is_prefix(module):
        return "prefix_attention"
    if type(module) in _OWN:
        return _OWN[type(module)]
    patch = _PATCHED.get(type(module)) or _PATCHES.get(type(module))
    return patch.op if patch else "-"


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _why_stock(module: Any) -> str:
    """Why an adapter layer runs stock even when patched; empty where it runs fused."""
    if _is_prefix(module):
        return prefix_patch.why_stock(module)
    if type(module) in _OWN:
        if module.disable_adapters:
            return "adapters are disabled"
        return "" if set(module.active_adapters) & module._get_available_adapters() else "0 adapters are active"
    patch = _PATCHED.get(type(module)) or _PATCHES.get(type(module))
    if patch is None:
        return f"no fused op for {_class_path(module)}"
    if "forward" in module.__dict__ and not support.wraps(module.__dict__["forward"], patch.patched.forward):
        return "forward is set on the instance (an offload hook?)"
    call = patch.fusable(module)
    return call if isinstance(call, str) else ""

"""Bottleneck adapters as a peft method: t = act(x Wdᵀ + bd) Wuᵀ + bu, added to what a module of the model returns.

    houlsby     y = h + s·t(h)           h what the module returns                  (Houlsby et al. 2019)
    pfeiffer    y = LN(u + s·t(LN(u)))   u what the module, a LayerNorm, receives   (Pfeiffer et al. 2021)
                y = h + s·t(h + r)       any other module; r what `source_module` receives, else nothing
    parallel    y = f(x) + s·t(x)        x what `source_module` receives, else f    (He et al. 2022)

The published Pfeiffer adapter computes LN(q + s·t(LN(h + r)) + r) with h the feed-forward's output, r what the model
adds to it, and q = h: the second line, with u = h + r, and where there is no LN the third, to which the model adds r.
`residual_from` chooses another q, which holds r already:

    "sum"       y = LN(u + s·t(LN(u)) + r)          around a LayerNorm; r what `source_module` receives
                y = h + r + s·t(h + r)              any other module
    "norm"      y = LN(LN(u) + s·t(LN(u)) + r)      around a LayerNorm
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_fast import support
from peft_fast.layers import ADAPTER_INITS, init_adapter
from peft_fast.methods._checks import NeverMerges, RefusesMixedBatches, cannot_merge, check_targets, is_number
from peft_fast.methods._per_thread import PerThread
from peft_fast.methods.bottleneck_targets import default_targets
from peft_fast.ops._shared import fit
from peft_fast.ops.bottleneck_adapter import apply_bottleneck_adapter
from peft_fast.reference import ACTIVATIONS

_STYLES = ("houlsby", "pfeiffer", "parallel")
_RESIDUALS = ("branch", "sum", "norm")


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters, for `peft.get_peft_model`.

    Args:
        style: "houlsby" puts one adapter behind the attention output and one behind the feed-forward output of each
            layer, behind their dropout and before the model's residual and LayerNorm; "pfeiffer", the default, one
            behind the feed-forward, around the LayerNorm, or on the layer's output where a model normalizes first;
            "parallel" one beside the feed-forward. Where a model has no dropout module there (OPT, BART) or shares it
            (ViT), and beside T5's feed-forward, the adapter stands before the dropout. Cross-attention has none by
            default.
        bottleneck_size: the bottleneck R. Give it or `reduction_factor`, not both.
        reduction_factor: R = K / reduction_factor, rounded down, at least 1; 16 if neither is given.
        activation: relu, gelu (erf), gelu_new (tanh), silu, tanh, leaky_relu (slope 0.01) or identity.
        scaling: the factor s, or "learned" for a trained scalar that starts at 1.
        dropout: the probability, in [0, 1), of dropping an element of the adapter's output t in training.
        init: "zero_up": Wd as `nn.Linear` has it and Wu zero, so that the model starts as the base model; with
            `dropout` 0 that also holds for training from the same seed (a dropout of its own draws from torch's
            generator), with `norm_after` only where `residual_after_norm` is set, and only with `residual_from`
            "branch". "houlsby": both normal with standard deviation 0.01, cut at two of them. All biases start at zero.
        norm_before: a LayerNorm of the adapter's own on x.
        norm_after: one on its result, LN(residual + s·t), or on s·t alone with `residual_after_norm`.
        residual_after_norm: see norm_after.
        residual_from: what a Pfeiffer adapter is added to, before the model adds r: "branch" the feed-forward's output
            h, the default; "sum" h + r; "norm" LN(h + r). The last two are for adapters that were trained so: r counts
            twice.
        target_modules: names of modules, or a regular expression of whole names, as in other peft methods. By default
            the places of `style` in the models that the package knows.
        exclude_modules: names, or a regular expression, of modules that get no adapter.
        layers_to_transform: numbers of the layers that get adapters. With default targets, they are written into
            `target_modules`.
        layers_pattern: the name of the list of layers, with `layers_to_transform` and targets of your own.
        modules_to_save: modules to train and save beside the adapters, such as a new head.
        source_module: the module, named from the target's nearest parent that has it, whose first input the adapter
            reads: a parallel adapter in place of what the target receives, a Pfeiffer adapter beside what the target
            returns, or, with another `residual_from` than "branch", what the model adds before the target, a LayerNorm.
            It must run before the target does.

    Raises ValueError, naming the field and its value.
    """

    style: str = field(default="pfeiffer", metadata={"help": "Placement."})
    bottleneck_size: int | None = field(default=None, metadata={"help": "The bottleneck R."})
    reduction_factor: float | None = field(default=None, metadata={"help": "R = K / reduction_factor."})
    activation: str = field(default="relu", metadata={"help": "The nonlinearity between the two projections."})
    scaling: float | str = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's output."})
    init: str = field(default="zero_up", metadata={"help": "Initial weights."})
    norm_before: bool = field(default=False, metadata={"help": "LayerNorm of the adapter's own on its input."})
    norm_after: bool = field(default=False, metadata={"help": "LayerNorm of the adapter's own on its result."})
    residual_after_norm: bool = field(default=False, metadata={"help": "Keep the residual out of norm_after."})
    residual_from: str = field(default="branch", metadata={"help": "What a Pfeiffer adapter is added to."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that get an adapter."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that get none."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers that get adapters."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save as well."})
    source_module: str | None = field(default=None, metadata={"help": "Whose input it reads."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("BOTTLENECK")
        if self.bottleneck_size is None and self.reduction_factor is None:
            self.reduction_factor = 16
        self._check()
        check_targets(self)

    def _check(self) -> None:
        known = {"style": _STYLES, "activation": ACTIVATIONS, "init": ADAPTER_INITS, "residual_from": _RESIDUALS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        size, factor = self.bottleneck_size, self.reduction_factor
        if size is not None and factor is not None:
            raise ValueError(
                f"bottleneck_size, reduction_factor: give one of them, got bottleneck_size={size!r} and "
                f"reduction_factor={factor!r}"
            )
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"bottleneck_size: expected a whole number of at least 1, got {size!r}")
        if factor is not None and not (is_number(factor) and factor > 0):
            raise ValueError(f"reduction_factor: expected a number above 0, got {factor!r}")
        if self.scaling != "learned" and not is_number(self.scaling):
            raise ValueError(f'scaling: expected a number or "learned", got {self.scaling!r}')
        if not is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: must lie in [0, 1), got {self.dropout!r}")
        if self.residual_after_norm and not self.norm_after:
            raise ValueError("residual_after_norm: needs norm_after, got residual_after_norm=True, norm_after=False")
        if self.residual_from != "branch" and self.style != "pfeiffer":
            raise ValueError(f'residual_from: needs style "pfeiffer", got {self.residual_from!r} and {self.style!r}')
        if self.source_module is not None and self.style == "houlsby":
            raise ValueError(f'source_module: style "houlsby" has none, got {self.source_module!r}')


class _Received(PerThread):
    x: Tensor | None = None


class _Source:
    """Keeps what a module of the model receives until the adapter beside it has read it."""

    def __init__(self, module: nn.Module) -> None:
        self.received = _Received()  # the replicas of `nn.DataParallel` share this object too
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.received.x = args[0] if args else next(iter(kwargs.values()))

    def take(self) -> Tensor | None:
        x, self.received.x = self.received.x, None
        return x


class BottleneckLayer(NeverMerges, nn.Module, BaseTunerLayer):
    """A module of the model and the adapters on it, by name; several active ones are applied one after the other."""

    kind = "a bottleneck adapter, which is nonlinear,"
    adapter_layer_names = (
        "bottleneck_down",
        "bottleneck_up",
        "bottleneck_scaling",
        "bottleneck_norm_before",
        "bottleneck_norm_after",
    )
    other_param_names = ("bottleneck_config", "bottleneck_source")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_scaling = nn.ParameterDict()
        self.bottleneck_norm_before = nn.ModuleDict()
        self.bottleneck_norm_after = nn.ModuleDict()
        self.bottleneck_config: dict[str, BottleneckConfig] = {}
        self.bottleneck_source: dict[str, _Source] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def update_layer(
        self,
        adapter_name: str,
        config: BottleneckConfig,
        like: Tensor,
        model_config: Any,
        source: nn.Module | None,
    ) -> None:
        """Add an adapter of `like`'s device and dtype. Sizes come from the modules, else from the model's config."""
        base = self.get_base_layer()
        if config.residual_from != "branch" and source is None:
            raise ValueError(
                f"residual_from: {config.residual_from!r} needs source_module, the name of a module that receives what "
                "the model adds to the feed-forward's output"
            )
        if config.residual_from == "norm" and not isinstance(base, nn.LayerNorm):
            raise ValueError(
                f"residual_from: 'norm' needs a LayerNorm as the target, got a {type(base).__name__}; without a "
                "LayerNorm there is 'sum'"
            )
        N = _width(base, 1, model_config)
        K = _width(base if source is None else source, 0, model_config) if config.style == "parallel" else N
        R = config.bottleneck_size or max(1, int(K // config.reduction_factor))
        down, up = nn.Linear(K, R), nn.Linear(R, N)
        init_adapter(down.weight, up.weight, config.init)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        if config.scaling == "learned":
            self.bottleneck_scaling[adapter_name] = nn.Parameter(torch.ones(1))
        if config.norm_before:
            self.bottleneck_norm_before[adapter_name] = nn.LayerNorm(K)
        if config.norm_after:
            self.bottleneck_norm_after[adapter_name] = nn.LayerNorm(N)
        for name in self.adapter_layer_names:
            adapters = getattr(self, name)
            # On the meta device the checkpoint that is about to be loaded brings the device.
            if adapter_name in adapters and down.weight.device.type != "meta":
                adapters[adapter_name] = adapters[adapter_name].to(like.device, like.dtype)
        self.bottleneck_config[adapter_name] = config
        self._drop_source(adapter_name)
        if source is not None:
            self.bottleneck_source[adapter_name] = _Source(source)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = [name for name in self.active_adapters if name in self.bottleneck_down and not self.disable_adapters]
        x = args[0] if args else next(iter(kwargs.values()))
        around = [name for name in active if self._is_around_norm(name)]
        for name in around:
            x = self._adapt_around_norm(name, x)
        # A LayerNorm has one argument.
        result = self.base_layer(x) if around else self.base_layer(*args, **kwargs)
        y = result[0] if isinstance(result, tuple) else result
        for name in active:
            if name in around:
                continue
            config, received = self.bottleneck_config[name], self._received(name)
            if config.style == "parallel":
                y = self._adapt(name, x if received is None else received, y)
            else:
                u = y if received is None else y + received
                y = self._adapt(name, u, y if config.residual_from == "branch" else u)
        for source in self.bottleneck_source.values():
            source.take()  # of adapters that are not active
        return (y, *result[1:]) if isinstance(result, tuple) else y

    def _is_around_norm(self, adapter_name: str) -> bool:
        config = self.bottleneck_config[adapter_name]
        # With a source and "branch" the LayerNorm is part of the branch, which the model adds behind it.
        alone = not config.source_module or config.residual_from != "branch"
        return config.style == "pfeiffer" and alone and isinstance(self.base_layer, nn.LayerNorm)

    def _adapt_around_norm(self, adapter_name: str, u: Tensor) -> Tensor:
        """What the LayerNorm receives in place of u: q + s·t(LN(u)) + r."""
        x, residual_from = self.base_layer(u), self.bottleneck_config[adapter_name].residual_from
        if residual_from == "branch":
            return self._adapt(adapter_name, x, u)  # u is h + r
        adapted = self._adapt(adapter_name, x, u if residual_from == "sum" else x)
        received: Any = self._received(adapter_name)
        return adapted + received.view_as(adapted)  # OPT adds in two dimensions

    def _received(self, adapter_name: str) -> Tensor | None:
        """What the source module received, None where the adapter has no source."""
        if adapter_name not in self.bottleneck_source:
            return None
        received = self.bottleneck_source[adapter_name].take()
        if received is None:
            raise ValueError(
                f"source_module: {self.bottleneck_config[adapter_name].source_module!r} did not run before"
            )
        return received

    def _adapt(self, adapter_name: str, x: Tensor, residual: Tensor) -> Tensor:
        """residual + s·t(x), in the residual's dtype."""
        config, dtype = self.bottleneck_config[adapter_name], residual.dtype
        scaling: Any = self.bottleneck_scaling[adapter_name] if config.scaling == "learned" else config.scaling
        parameters: list[Tensor | None] = []
        for modules in (
            self.bottleneck_down,
            self.bottleneck_up,
            self.bottleneck_norm_before,
            self.bottleneck_norm_after,
        ):
            if adapter_name in modules:
                module = modules[adapter_name]
                parameters += fit(module.weight, dtype), fit(module.bias, dtype)
            else:
                parameters += None, None
        return apply_bottleneck_adapter(
            x.to(dtype),
            residual,
            parameters,
            scaling,
            config.activation,
            config.dropout if self.training else 0.0,
            None,
            config.residual_after_norm,
            1e-5,
            support.current_backend(self),  # the parameters may be cast anew at each call
        )

    def delete_adapter(self, adapter_name: str) -> None:
        self._drop_source(adapter_name)
        super().delete_adapter(adapter_name)

    def release_sources(self) -> None:
        """Take every hook off the model's other modules."""
        for adapter_name in list(self.bottleneck_source):
            self._drop_source(adapter_name)

    def _drop_source(self, adapter_name: str) -> None:
        if adapter_name in self.bottleneck_source:
            self.bottleneck_source.pop(adapter_name).handle.remove()

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


class BottleneckModel(RefusesMixedBatches, BaseTuner):
    """The peft tuner of `BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            targets = default_targets(
                model_config, peft_config.style, peft_config.layers_to_transform, peft_config.residual_from
            )
            if targets is None:
                raise ValueError(
                    f"target_modules: no default for a model of type {model_config.get('model_type')!r}; pass the "
                    "names of modules whose output the adapters should change. "
                    f"Found: {', '.join(_module_kinds(self.model))}"
                )
            peft_config.target_modules, source = targets
            peft_config.source_module = peft_config.source_module or source
            peft_config.layers_to_transform = peft_config.layers_pattern = None
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target, adapter_name)
        layer.update_layer(
            adapter_name,
            peft_config,
            like=_floating_parameter(layer.get_base_layer(), parent, self.model),
            model_config=getattr(self.model, "config", None),
            source=_find_source(self.model, current_key, peft_config.source_module),
        )
        if layer is not target:
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft's own looks for a weight, which a dropout or a whole layer does not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise cannot_merge(BottleneckLayer.kind)

    def unload(self) -> nn.Module:
        for module in self.model.modules():
            if isinstance(module, BottleneckLayer):
                module.release_sources()
        return super().unload()


def _width(module: Any, side: Literal[0, 1], model_config: Any) -> int:
    """How many features a module receives (side 0) or returns (side 1)."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return (module.in_features, module.out_features)[side]
    if isinstance(module, Conv1D):
        return module.weight.shape[side]
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    if not hasattr(model_config, "hidden_size"):
        raise ValueError(
            f"target_modules: the width of a {type(module).__name__} is not known, and the model's config has no "
            "hidden_size; target linear layers or LayerNorms"
        )
    return model_config.hidden_size


def _floating_parameter(*modules: nn.Module) -> Tensor:
    """The first one found: the device and dtype that the adapter should have."""
    parameters: Iterator[Tensor] = chain.from_iterable(module.parameters() for module in modules)
    return next((p for p in parameters if p.is_floating_point()), torch.empty(0))


def _find_source(model: nn.Module, key: str, name: str | None) -> nn.Module | None:
    """The module called `name` in the nearest parent of the module `key` that has one."""
    if name is None:
        return None
    parent = key
    while parent:
        parent = parent.rpartition(".")[0]
        try:
            return model.get_submodule(f"{parent}.{name}" if parent else name)
        except AttributeError:
            continue
    raise ValueError(f"source_module: no parent of {key} has a module {name!r}")


def _module_kinds(model: nn.Module) -> list[str]:
    """The names of the model's modules, those of all layers once, with * for the number."""
    names = (re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1) for name, _ in model.named_modules())
    return list(dict.fromkeys(name for name in names if name))

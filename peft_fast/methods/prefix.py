"""Prefix tuning as a peft method: keys and values of P virtual tokens in front of what each attention module sees.

    y = softmax(scale · q [Kp; K]ᵀ + mask) [Vp; V]                                  (Li & Liang 2021, section 4.3)

Every query sees the prefix, whatever the mask, the window or the packing hides of the sequence. Kp stands behind key
norms and rotary embeddings, so it has no position, and the positions of the tokens are those of the base model.
"""

import copy
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from peft_fast.layers import PREFIX_STD
from peft_fast.methods._checks import NeverMerges, RefusesMixedBatches, cannot_merge
from peft_fast.methods.prefix_config import PrefixConfig
from peft_fast.methods.prefix_init import init_from_tokens, init_input, initial_tokens
from peft_fast.methods.prefix_input import ROWS, Front, InputLayer, find_stack
from peft_fast.methods.prefix_interface import CHILD, Switch
from peft_fast.methods.prefix_positions import hook_positions
from peft_fast.methods.prefix_targets import Sizes, find_attention, sizes


class PrefixLayer(NeverMerges, nn.Module, BaseTunerLayer):
    """The prefixes of one attention module, by adapter name; those of several active adapters stand side by side.

    It is a child of the attention module, which stays what it is.
    """

    kind = "a prefix"
    # Each holds parameters or single layers: peft puts the adapter's name in front of the last part of a saved key.
    adapter_layer_names = (
        "prefix_key",
        "prefix_value",
        "prefix_gate",
        "prefix_embedding",
        "prefix_mlp_in",
        "prefix_mlp_out",
    )
    other_param_names = ("prefix_config",)
    # peft's own ask a base layer, which this one does not wrap.
    weight = bias = None  # type: ignore[assignment]

    def __init__(self, sizes: Sizes, adapter_name: str) -> None:
        super().__init__()
        self.sizes = sizes
        self.prefix_key = nn.ParameterDict()
        self.prefix_value = nn.ParameterDict()
        self.prefix_gate = nn.ParameterDict()
        self.prefix_embedding = nn.ParameterDict()
        self.prefix_mlp_in = nn.ModuleDict()
        self.prefix_mlp_out = nn.ModuleDict()
        self.prefix_config: dict[str, PrefixConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        # While a list: the module runs without prefix, and its keys and values are kept here.
        self.recorded: list[tuple[Tensor, Tensor]] | None = None

    def update_layer(self, adapter_name: str, config: PrefixConfig, like: Tensor) -> None:
        """Add a prefix of `like`'s device and dtype."""
        H, H_KV, DH = self.sizes
        P, D = config.num_virtual_tokens, H * DH
        if config.reparametrization:
            hidden = config.reparametrization_size
            self.prefix_embedding[adapter_name] = nn.Parameter(torch.randn(P, D))
            self.prefix_mlp_in[adapter_name] = nn.Linear(D, hidden)
            self.prefix_mlp_out[adapter_name] = nn.Linear(hidden, 2 * H_KV * DH)
        else:
            self.prefix_key[adapter_name] = nn.Parameter(PREFIX_STD * torch.randn(H_KV, P, DH))
            value = torch.zeros(H_KV, P, DH) if config.init == "zero_value" else torch.randn(H_KV, P, DH)
            self.prefix_value[adapter_name] = nn.Parameter(PREFIX_STD * value)
        if config.gate:
            self.prefix_gate[adapter_name] = nn.Parameter(torch.zeros(H))
        for name in self.adapter_layer_names:
            adapters = getattr(self, name)
            if adapter_name not in adapters:
                continue
            values = adapters[adapter_name]
            # On the meta device the checkpoint that is about to be loaded brings the device.
            if not any(p.is_meta for p in ([values] if isinstance(values, Tensor) else values.parameters())):
                adapters[adapter_name] = values.to(like.device, like.dtype)
        self.prefix_config[adapter_name] = config

    def active_prefixes(self) -> list[str]:
        if self.disable_adapters or self.recorded is not None:
            return []
        return [name for name in self.active_adapters if name in self.prefix_config]

    def prefix(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values (H_KV, P, DH) of the active prefixes, and their gate (H,) if there is one."""
        names = self.active_prefixes()
        if not names:
            return None
        gates = [name for name in names if name in self.prefix_gate]
        if len(names) == 1:
            key, value = self.rows(names[0])
        elif gates:
            raise ValueError(f"gate: a gated prefix cannot be active together with others, got {names}")
        else:
            rows = [self.rows(name) for name in names]
            wide = torch.promote_types(*(key.dtype for key, _ in rows[:2]))
            key, value = (torch.cat([pair[i].to(wide) for pair in rows], dim=1) for i in (0, 1))
        return key, value, torch.tanh(self.prefix_gate[names[0]]) if gates else None

    def rows(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Keys and values (H_KV, P, DH) of one prefix."""
        config = self.prefix_config[adapter_name]
        if adapter_name in self.prefix_key:
            key, value = self.prefix_key[adapter_name], self.prefix_value[adapter_name]
        else:
            hidden = torch.tanh(self.prefix_mlp_in[adapter_name](self.prefix_embedding[adapter_name]))
            rows = self.prefix_mlp_out[adapter_name](hidden)
            _, H_KV, DH = self.sizes
            key, value = rows.view(-1, 2, H_KV, DH).permute(1, 2, 0, 3)
        if self.training and config.prefix_dropout:
            key, value = (nn.functional.dropout(rows, config.prefix_dropout) for rows in (key, value))
        return key, value

    @torch.no_grad()
    def make_plain(self, adapter_name: str) -> None:
        """Replace a reparametrised prefix by its keys and values."""
        if adapter_name not in self.prefix_embedding:
            return
        training, self.training = self.training, False
        trainable = self.prefix_embedding[adapter_name].requires_grad
        rows = self.rows(adapter_name)
        self.training = training
        for parameters, values in zip((self.prefix_key, self.prefix_value), rows, strict=True):
            parameters[adapter_name] = nn.Parameter(values.contiguous(), requires_grad=trainable)
        for adapters in (self.prefix_embedding, self.prefix_mlp_in, self.prefix_mlp_out):
            del adapters[adapter_name]

    def __repr__(self) -> str:
        return "prefix." + super().__repr__()


class PrefixModel(RefusesMixedBatches, BaseTuner):
    """The peft tuner of `PrefixConfig`."""

    prefix = "prefix_"
    tuner_layer_cls = (PrefixLayer, InputLayer)  # type: ignore[assignment]  # peft only asks isinstance
    _switch: Switch | None = None
    _front: Front | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            self._inject(model, adapter_name, *args, **kwargs)
        except BaseException:  # leave the model as it was
            for layer in self._layers():
                if adapter_name in layer.prefix_config:
                    layer.delete_adapter(adapter_name)
            self.peft_config.pop(adapter_name, None)
            self._take_off(only_empty=True)
            for parameter in trained:
                parameter.requires_grad = True
            raise

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._switch is None:
            self._switch = Switch(model)
        self._hook_positions()
        config: Any = self.peft_config[adapter_name]
        if config.layers == "input":
            init_input(self._front, adapter_name, config)
            return
        tokens = initial_tokens(model, config)
        if tokens is not None:
            init_from_tokens(model, adapter_name, tokens)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.layers == "input":
            self._stack = find_stack(model)
            self._places = {self._stack.name}
            return
        found = find_attention(model)
        wanted = {name for name, side in found.items() if side in (peft_config.targets or found.values())}
        if not wanted:
            raise ValueError(
                f"targets: none of {peft_config.targets} in the model, found {sorted(set(found.values()))}"
            )
        self._places = wanted
        if not any(self._check_target_module_exists(peft_config, name) for name in wanted):
            kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1) for name in wanted)
            raise ValueError(
                f"target_modules: no attention module of the model is left by target_modules="
                f"{peft_config.target_modules!r}, exclude_modules={peft_config.exclude_modules!r}, "
                f"layers_to_transform={peft_config.layers_to_transform!r}. Found: {', '.join(kinds)}"
            )

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key not in self._places:
            return False
        if peft_config.target_modules is None:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = {key.rpartition(".")[2]}
        return check_target_module_exists(peft_config, key)

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
        like = next(p for p in target.parameters())
        if peft_config.layers == "input":
            if self._front is None:
                rows = InputLayer(self._stack.width, adapter_name)
                setattr(target, ROWS, rows.train(target.training))
                self._front = Front(self._stack, rows)
            self._front.layer.update_layer(adapter_name, peft_config, like)
            return
        layer = getattr(target, CHILD, None)
        if layer is None:
            layer = PrefixLayer(sizes(current_key, target), adapter_name)
            layer.train(target.training)
            setattr(target, CHILD, layer)
        layer.update_layer(adapter_name, peft_config, like)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft's own looks for a weight, which a head that was trained beside the prefix may not have.
        setattr(parent, child_name, new_module)

    def make_plain(self, adapter_name: str | None = None) -> None:
        """Run each layer's reparametrisation once and keep what it gives: plain prefixes, with the same output.

        `save_pretrained` then saves those alone. Without a name, all active adapters.
        """
        for name in self.active_adapters if adapter_name is None else [adapter_name]:
            config: Any = self.peft_config[name]
            config.reparametrization = False
            for layer in self._layers():
                if isinstance(layer, PrefixLayer):
                    layer.make_plain(name)

    def _layers(self) -> list[PrefixLayer | InputLayer]:
        return [module for module in self.model.modules() if isinstance(module, (PrefixLayer, InputLayer))]

    def _hook_positions(self) -> None:
        for handle in getattr(self, "_handles", []):
            handle.remove()
        offsets = {name: config.position_offset for name, config in self.peft_config.items()}  # type: ignore
        self._handles = hook_positions(self.model, self._layers(), offsets) if offsets else []

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._take_off(only_empty=True)

    def unload(self) -> nn.Module:
        self.peft_config.clear()
        self._take_off(only_empty=False)
        return super().unload()

    def _take_off(self, only_empty: bool) -> None:
        for module in list(self.model.modules()):
            layer = getattr(module, CHILD, None)
            if isinstance(layer, PrefixLayer) and not (only_empty and layer.prefix_config):
                delattr(module, CHILD)
        if self._front is not None and not (only_empty and self._front.layer.prefix_config):
            self._front.off()
            delattr(self._front.stack.first, ROWS)
            self._front = None
        self._hook_positions()
        if not self.peft_config and self._switch is not None:
            self._switch.off()
            self._switch = None

    def _check_merge_allowed(self) -> None:
        raise cannot_merge(PrefixLayer.kind)

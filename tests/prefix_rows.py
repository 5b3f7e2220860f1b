"""What the tests of prefixes at the input layer share: models with rows, and the truth that they are held to.

The truth is the base model whose list of layers is replaced by one module. It concatenates rows and sequence by hand,
and runs the layers with a mask and with positions that are written down here, not taken from the model.
"""

import copy
import inspect

import torch
from families import TASKS, build
from peft import PeftModel, get_peft_model
from prefix_models import P
from torch import Tensor, nn

from peft_fast import PrefixConfig
from peft_fast.methods.prefix_input import InputLayer

CAUSAL = [family for family, task in TASKS.items() if task == "CAUSAL_LM"]
LAYERS = dict.fromkeys(CAUSAL, "model.layers") | {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "electra": "electra.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "albert": "albert.encoder.albert_layer_groups",
    "modernbert": "model.layers",
    "vit": "vit.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "opt_postnorm": "model.decoder.layers",
    "t5": "encoder.block",
    "bart": "model.encoder.layers",
}


def strong(family: str, scale: float = 5.0) -> nn.Module:
    """A base without dropout whose layers do more than those of a fresh model, so that the rows show in the output."""
    base = build(family)
    for name, parameter in base.named_parameters():
        if parameter.dim() == 2 and family not in ("t5", "modernbert") and "embed" not in name:
            parameter.data *= scale
    for module in base.modules():
        for name in ("p", "dropout", "activation_dropout", "attention_dropout", "dropout_prob", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return base


def with_rows(family: str = "bert", **config) -> PeftModel:
    """Rows that get a fair share of the attention, in eval mode."""
    base = config.pop("base", None) or strong(family)
    model = get_peft_model(base, PrefixConfig(**{"num_virtual_tokens": P, "layers": "input"} | config))
    fill(model)
    return model.eval()


def fill(model: nn.Module, adapter_name: str = "default", seed: int = 2) -> None:
    rows = parameter(model, adapter_name)
    rows.data += torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).to(rows.dtype)


def parameter(model: nn.Module, adapter_name: str = "default") -> nn.Parameter:
    (layer,) = (module for module in model.modules() if isinstance(module, InputLayer))
    return layer.prefix_input[adapter_name]


class Whole(nn.Module):
    """All layers of a model at once, behind rows."""

    attention_type = layer_type = "full_attention"

    def __init__(self, blocks: list[nn.Module], rows: Tensor, padding: Tensor | None, causal: bool, window: int | None):
        super().__init__()
        self.blocks, self.kinds = blocks, ["sliding_attention"] * len(blocks)
        self.rows, self.padding, self.causal, self.window = rows, padding, causal, window
        self.rotary: list[nn.Module] = []

    def forward(self, hidden: Tensor, *args, **kwargs):
        (Z, T), length = hidden.shape[:2], len(self.rows)
        hidden = torch.cat([self.rows.expand(Z, -1, -1), hidden], 1)
        padding = hidden.new_ones(Z, T) if self.padding is None else self.padding
        seen = torch.cat([padding.new_ones(Z, length), padding], 1).bool()[:, None, None].expand(Z, 1, length + T, -1)
        i, j = torch.arange(-length, T)[:, None], torch.arange(-length, T)[None]
        seen = seen & (j <= i) if self.causal else seen
        starts = (padding.long().argmax(1) if self.padding is not None else padding.new_zeros(Z)).long()
        positions = torch.arange(T) - starts[:, None]
        positions = torch.cat([torch.arange(-length, 0).expand(Z, -1), positions.clamp(min=0)], 1) + 9
        bias = None
        for block, layer_kind in zip(self.blocks, self.kinds, strict=True):
            visible, more = seen, {}
            if self.window and layer_kind == "sliding_attention":
                near = (i - j < self.window) if self.causal else ((i - j).abs() <= self.window)
                visible = seen & (near | (j < 0) | (i < 0))
            mask = hidden.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(hidden.dtype).min)
            for rotary in self.rotary:
                typed = "layer_type" in inspect.signature(rotary.forward).parameters
                kind = {"layer_type": layer_kind} if typed else {}
                more["position_embeddings"] = rotary(hidden, positions, **kind)
            if "position_bias" in inspect.signature(block.forward).parameters:
                hidden, bias, _ = block(hidden, mask, bias)
                continue
            hidden = block(hidden, attention_mask=mask, **more)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden = hidden[:, length:]
        return (hidden, None, None) if bias is not None else hidden


def truth(base: nn.Module, family: str, rows: Tensor, padding: Tensor | None, window: int | None = None) -> nn.Module:
    base = copy.deepcopy(base)
    base.set_attn_implementation("eager")
    name = LAYERS[family]
    blocks = list(base.get_submodule(name))
    if family == "albert":
        rows, blocks = base.albert.encoder.embedding_hidden_mapping_in(rows), blocks * 2
        base.config.num_hidden_layers = 1
    causal = TASKS[family] == "CAUSAL_LM"
    whole = Whole(blocks, rows, padding, causal, window)
    parent, _, last = name.rpartition(".")
    owner = base.get_submodule(parent)
    whole.rotary = [m for n, m in owner.named_modules() if n == "rotary_emb"]
    whole.kinds = list(getattr(base.config, "layer_types", None) or whole.kinds)
    setattr(owner, last, nn.ModuleList([whole]))
    return base.eval()

"""Whole models on the meta device: the frozen model, its method with stock calls, and ours."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import peft_fast
from benchmarks._variants import Variant, stock_ops, tensor

RANK, BOTTLENECK, PREFIX = 16, 64, 32
MODELS = {"BERT-large": (16, 512), "Llama-3-8B": (4, 2048)}  # sequences of a batch and their length
LAYERS = {"BERT-large": 24, "Llama-3-8B": 32}
METHODS = {
    "lora": LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.1, target_modules="all-linear"),
    "adapter": peft_fast.BottleneckConfig(style="houlsby", bottleneck_size=BOTTLENECK),
    "prefix": peft_fast.PrefixConfig(num_virtual_tokens=PREFIX),
}


def _base(name: str, layers: int) -> nn.Module:
    if name == "BERT-large":
        config = BertConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096)
        make = functools.partial(BertModel, config, add_pooling_layer=False)
    else:
        config = LlamaConfig(
            hidden_size=4096,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            use_cache=False,
        )
        make = functools.partial(LlamaModel, config)
    with torch.device("meta"):
        return make().to(torch.bfloat16).requires_grad_(False)


@contextlib.contextmanager
def _no_mask() -> Iterator[None]:
    """Llama's check whether sequences are packed reads values, which a meta tensor has not; none are."""
    with mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", return_value=None):
        yield


@contextlib.contextmanager
def _stock() -> Iterator[None]:
    with _no_mask(), stock_ops():
        yield


def model(name: str, method: str, layers: int, *, fp32_factors: bool = True) -> dict[str, Variant]:
    """The model in bf16 with `layers` layers, from its embeddings to its last hidden state, everything frozen but the
    method's parameters: in fp32 for LoRA, as peft has it, or all in bf16. `floor` is without any method.
    """
    Z, S = MODELS[name]
    base = _base(name, layers).train()
    x = tensor(Z, S, base.config.hidden_size, dtype=torch.bfloat16)
    dy = tensor(*x.shape, dtype=torch.bfloat16, grad=False)

    def variant(net: nn.Module, plan: str | None = None) -> Variant:
        own = [parameter for parameter in net.parameters() if parameter.requires_grad]

        def forward() -> torch.Tensor:
            return net(inputs_embeds=x).last_hidden_state

        return Variant(forward, [x, *own], dy, plan, list(net.parameters()), _no_mask if plan else _stock)

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property under its old name
        tuned = get_peft_model(copy.deepcopy(base), copy.deepcopy(METHODS[method])).train()
    dtype = torch.float32 if method == "lora" and fp32_factors else torch.bfloat16
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    variants = {"floor": variant(base), "stock": variant(tuned)}
    if method == "lora":
        patched = copy.deepcopy(tuned)
        peft_fast.patch(patched)
        return variants | {plan: variant(patched, plan) for plan in ("fused", "split")}
    return variants | {"ours": variant(tuned, "split")}

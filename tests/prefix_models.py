"""What the tests of prefix tuning share: models with prefixes, and the truth that they are held to.

The truth is the base model with an attention function of its own, which concatenates the prefix in front of keys and
values and softmaxes dense logits under transformers' explicit mask. It shares nothing with the package.
"""

import copy
import inspect
from pathlib import Path
from unittest import mock

import torch
from families import batch, build
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from peft_fast import PrefixConfig
from peft_fast.methods import PrefixLayer

P = 3
ROTARY = ("modernbert", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
# Inputs of the forward that is compared; labels would only be reduced to a loss.
INPUTS = ("input_ids", "attention_mask", "pixel_values", "decoder_input_ids", "position_ids", "token_type_ids")


def prefixed(family: str = "bert", **config) -> PeftModel:
    """Prefixes that get a fair share of the attention, in eval mode."""
    base = config.pop("base", None) or build(family)
    model = get_peft_model(base, PrefixConfig(**{"num_virtual_tokens": P} | config))
    fill(model)
    return model.eval()


def fill(model: nn.Module, adapter_name: str = "default", seed: int = 2) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in prefix_layers(model):
        for name, parameter in layer.named_parameters():
            if f".{adapter_name}" in name:
                parameter.data += torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def prefix_layers(model: nn.Module) -> list[PrefixLayer]:
    return [module for module in model.modules() if isinstance(module, PrefixLayer)]


def save(model: PeftModel, folder: Path) -> None:
    """Without a model card, which takes longer than everything else."""
    with mock.patch.object(PeftModel, "create_or_update_model_card"):
        model.save_pretrained(folder)


def data(family: str) -> dict[str, Tensor]:
    inputs = batch(family)
    if family in ("t5", "bart"):
        inputs["decoder_input_ids"] = inputs["labels"]
    return {name: value for name, value in inputs.items() if name in INPUTS}


@torch.no_grad()
def logits(model: nn.Module, family: str = "bert", **inputs) -> Tensor:
    return model.eval()(**(data(family) | inputs)).logits


def step(model: nn.Module, family: str = "bert", seed: int = 5) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits and gradients of one training step."""
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**batch(family))
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(gradients: dict, expected: dict) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Found by their signature: whatever looks its function up and holds projections."""
    return {
        name: module
        for name, module in model.named_modules()
        if "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names
    }


def truth(base: nn.Module, prefixes: dict[str, list[Tensor]]) -> nn.Module:
    """A copy of a bare model that sees `prefixes`: by module name, keys, values and, if there is one, the gate."""
    base = copy.deepcopy(base)
    for name, tensors in prefixes.items():
        base.get_submodule(name).truth = tensors
    for module in base.modules():
        if hasattr(module, "config"):  # of which T5's stacks have their own in transformers 5.17
            module.config._attn_implementation = "truth"
    return base.eval()


def _attention(module, query, key, value, mask, scaling, position_bias=None, softcap=None, **kwargs):
    prefix_key, prefix_value, *gate = getattr(module, "truth", (key[0, :, :0], value[0, :, :0]))
    length, groups = prefix_key.shape[1], query.shape[1] // key.shape[1]

    def joined(prefix, own):
        return torch.cat([prefix.expand(len(own), -1, -1, -1), own], 2).repeat_interleave(groups, 1)

    scores = query @ joined(prefix_key, key).mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own = scores[..., length:]
    own = own if position_bias is None else own + position_bias
    own = own if mask is None else own + mask
    if gate:
        prefix = gate[0].tanh()[:, None, None] * scores[..., :length].softmax(-1)
        weights = torch.cat([prefix, own.softmax(-1)], -1)
    else:
        weights = torch.cat([scores[..., :length], own], -1).softmax(-1)
    return (weights @ joined(prefix_value, value)).transpose(1, 2), None


AttentionInterface.register("truth", _attention)
AttentionMaskInterface.register("truth", eager_mask)

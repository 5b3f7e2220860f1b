"""What `PrefixConfig` chooses of a model, and what it refuses."""

import re

import pytest
import torch
from families import build
from peft import PeftModel, get_peft_model
from prefix_models import (
    data,
    logits,
    prefixed,
    save,
)
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

from peft_fast import PrefixConfig
from peft_fast.methods import PrefixLayer


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0], "layers_pattern": "layer"}, {0}),
        ({"target_modules": ["attention.self"], "layers_to_transform": [1]}, {1}),
        ({"target_modules": r".*layer\.0\..*"}, {0}),
        ({"exclude_modules": r".*layer\.0\..*"}, {1}),
        ({}, {0, 1}),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, dict) else "",
)
def test_choice_of_layers(config, layers, tmp_path):
    model = prefixed("bert", **config)
    names = [name for name, module in model.named_modules() if isinstance(module, PrefixLayer)]
    assert {int(re.search(r"layer\.(\d+)", name)[1]) for name in names} == layers
    save(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    ("targets", "pattern"),
    [
        ("encoder", r"encoder\.(block|layers)"),
        ("decoder", r"decoder.*(SelfAttention|self_attn)"),
        (["cross"], r"decoder.*(EncDecAttention|encoder_attn)"),
    ],
    ids=["encoder", "decoder", "cross"],
)
def test_choice_of_sides(family, targets, pattern):
    model = prefixed(family, targets=targets)
    names = {name for name, module in model.named_modules() if isinstance(module, PrefixLayer)}
    assert len(names) == 2
    assert all(re.search(pattern, name) for name in names)
    every = [name for name, module in prefixed(family).named_modules() if isinstance(module, PrefixLayer)]
    assert len(every) == 6


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("num_virtual_tokens", {"num_virtual_tokens": 0}),
        ("num_virtual_tokens", {"num_virtual_tokens": 2.5}),
        ("layers", {"layers": "output"}),
        ("targets", {"targets": "mlp"}),
        ("targets", {"targets": []}),
        ("init", {"init": "zero"}),
        ("init", {"init": "vocab", "reparametrization": True}),
        ("init_text", {"init": "text"}),
        ("init_text", {"init_text": [1], "init": "vocab"}),
        ("init_text", {"init_text": [], "init": "text"}),
        ("tokenizer_name_or_path", {"init_text": "some words", "init": "text"}),
        ("reparametrization_size", {"reparametrization_size": 0}),
        ("prefix_dropout", {"prefix_dropout": 1.0}),
        ("position_offset", {"position_offset": -1}),
        ("layers_to_transform", {"layers_to_transform": [0], "target_modules": "a|b"}),
        ("layers_pattern", {"layers_pattern": "layer"}),
    ],
)
def test_wrong_options_are_named(field, config):
    value = re.escape(str(next(iter(config.values()))))
    with pytest.raises(ValueError, match=rf"^{field}: .*{value}"):
        PrefixConfig(**config)


def test_models_that_cannot_have_a_prefix():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    deberta = DebertaV2Model(DebertaV2Config(vocab_size=50, **small))
    with pytest.raises(ValueError, match=r"^model: DebertaV2Model does not use transformers' attention interface"):
        get_peft_model(deberta, PrefixConfig())
    with pytest.raises(ValueError, match=r"^targets: none of \['cross'\] in the model, found \['encoder'\]"):
        get_peft_model(build("bert"), PrefixConfig(targets="cross"))
    with pytest.raises(ValueError, match=r"^target_modules: .*'intermediate'.* Found: bert.encoder.layer.\*.attent"):
        get_peft_model(build("bert"), PrefixConfig(target_modules=["intermediate"]))
    latent = DeepseekV3ForCausalLM(
        DeepseekV3Config(vocab_size=50, **small, num_key_value_heads=4, first_k_dense_replace=1, q_lora_rank=8)
    )
    with pytest.raises(ValueError, match=r"^target_modules: model.layers.0.self_attn, a DeepseekV3Attention, has keys"):
        get_peft_model(latent, PrefixConfig())
    sinks = GptOssForCausalLM(GptOssConfig(vocab_size=50, **small, num_key_value_heads=2, num_local_experts=2))
    with pytest.raises(ValueError, match="prefixes do not support attention sinks, which GptOssAttention uses"):
        get_peft_model(sinks, PrefixConfig())(**data("llama"))

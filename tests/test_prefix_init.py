"""How prefixes start: the keys and values of a text, or at random; and the reparametrisation."""

import pytest
import torch
import transformers as tf
from families import _DECODER, FAMILIES, TASKS, VOCABULARY, build
from peft import PeftConfig, PeftModel, get_peft_model
from prefix_models import ROTARY, assert_same, data, logits, prefix_layers, prefixed, save, step

from peft_fast import PrefixConfig
from peft_fast.methods import prefix, prefix_init

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = [7, 30, 12, 45, 9]
READERS = [family for family in FAMILIES if family != "vit"]


def with_text(base, **config):
    config = PrefixConfig(num_virtual_tokens=len(TEXT), init="text", init_text=TEXT, **config)
    return get_peft_model(base, config).eval()


def partly_rotary():
    torch.manual_seed(0)
    config = tf.PhiConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return tf.PhiForCausalLM(config).eval()


def stretched_rotary():
    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        rope_parameters=rope,
    )
    return tf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("family", [f for f in ROTARY if f != "modernbert"] + ["partly rotary", "stretched rotary"])
def test_a_text_is_as_good_as_the_text_itself(family):
    """On causal rotary models, logits behind the prefix are those behind the text, position by position."""
    base = {"partly rotary": partly_rotary, "stretched rotary": stretched_rotary}.get(family, lambda: build(family))()
    ids = data("llama")["input_ids"]
    both = torch.cat([torch.tensor(TEXT).expand(2, -1), ids], 1)
    expected = logits(base, "llama", input_ids=both, attention_mask=None)[:, len(TEXT) :]
    actual = logits(with_text(base), "llama", input_ids=ids, attention_mask=None)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("family", READERS)
def test_text_is_recorded_in_every_module(family):
    """As what each projection gives for the text, where nothing turns it: all but rotary models and key norms."""
    base = build(family).train()
    projections = {}

    def record(name):
        def hook(module, args, y):
            projections.setdefault(name, y.detach())

        return hook

    for name, module in base.named_modules():
        if name.endswith(("k_proj", "v_proj", ".k", ".v", ".key", ".value", "k_lin", "v_lin")):
            module.register_forward_hook(record(name))
    model = get_peft_model(base, PrefixConfig(num_virtual_tokens=len(TEXT), init="text", init_text=TEXT))
    assert all(module.training for module in base.modules())
    layers = {name: module for name, module in model.named_modules() if module in prefix_layers(model)}
    for name, layer in layers.items():
        key, value = layer.prefix_key["default"], layer.prefix_value["default"]
        assert key.abs().max() > 0
        assert key.requires_grad
        parent = name.rpartition(".")[0]
        for module_name, y in projections.items():
            if f"base_model.model.{module_name}".rpartition(".")[0] == parent:
                rows = y.view(len(TEXT), -1, key.shape[-1]).transpose(0, 1)
                if module_name.rpartition(".")[2].startswith("v"):
                    torch.testing.assert_close(value.detach(), rows)
                elif family not in ROTARY:
                    torch.testing.assert_close(key.detach(), rows)


@pytest.mark.parametrize("family", READERS)
def test_text_init_is_not_run_again_when_loaded(family, tmp_path, monkeypatch):
    model = with_text(build(family), task_type=TASKS[family])
    with torch.no_grad():
        for layer in prefix_layers(model):
            layer.prefix_value["default"] += 1
    expected, gradients = logits(model, family), step(model, family)[1]
    save(model, tmp_path)
    monkeypatch.setattr(prefix_init, "_inputs", None)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, family), expected)
    assert_same(step(loaded, family)[1], gradients)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.init, config.init_text) == ("text", TEXT)
    assert not model.peft_config["default"].trained


def test_texts_are_repeated_or_cut():
    def keys(text, P):
        config = PrefixConfig(num_virtual_tokens=P, init="text", init_text=text)
        return prefix_layers(get_peft_model(build("bert"), config))[0].prefix_key["default"]

    assert torch.equal(keys([5, 6, 7], 7), keys([5, 6, 7, 5, 6, 7, 5], 7))
    assert torch.equal(keys([5, 6, 7, 8], 2), keys([5, 6], 2))


def test_a_second_text_is_read_by_the_bare_model():
    model = with_text(build("llama"))
    with torch.no_grad():
        prefix_layers(model)[0].prefix_value["default"] += 1
    alone = with_text(build("llama"))
    config = PrefixConfig(num_virtual_tokens=len(TEXT), init="text", init_text=TEXT)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), logits(alone, "llama"))


def test_vocabulary(monkeypatch):
    drawn = []
    monkeypatch.setattr(prefix, "init_from_tokens", lambda model, name, tokens: drawn.append(tokens))
    for P in (40, 49, 60):
        get_peft_model(build("llama"), PrefixConfig(num_virtual_tokens=P, init="vocab"))
    special = {build("llama").config.pad_token_id, 1, 2}
    for P, ids in zip((40, 49, 60), drawn, strict=True):
        assert len(ids) == P
        assert not special & set(ids.tolist())
    assert len(set(drawn[0].tolist())) == 40


def test_vocabulary_fills_the_prefix():
    base, other = build("t5"), build("t5")
    model = get_peft_model(base, PrefixConfig(num_virtual_tokens=4, init="vocab"))
    other = get_peft_model(other, PrefixConfig(num_virtual_tokens=4, init="vocab"))
    assert not torch.allclose(logits(model, "t5"), logits(other, "t5"))


def test_a_string_needs_its_tokenizer(monkeypatch):
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in text.split()]}

    monkeypatch.setattr(prefix_init.AutoTokenizer, "from_pretrained", lambda name: {"words": Tokenizer()}[name])
    config = PrefixConfig(num_virtual_tokens=2, init="text", init_text="fifteen words", tokenizer_name_or_path="words")
    model = get_peft_model(build("bert"), config)
    ids = PrefixConfig(num_virtual_tokens=2, init="text", init_text=[7, 5])
    assert torch.equal(logits(model), logits(get_peft_model(build("bert"), ids)))
    config = PrefixConfig(init="text", init_text=" ", tokenizer_name_or_path="words")
    with pytest.raises(ValueError, match="init_text: has no tokens, got ' '"):
        get_peft_model(build("bert"), config)


def test_models_without_tokens_have_no_text():
    with pytest.raises(ValueError, match="init: 'vocab' needs a model that reads token ids, got a ViT"):
        get_peft_model(build("vit"), PrefixConfig(init="vocab"))


def test_a_module_that_attends_twice_has_no_text():
    base = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**_DECODER))
    with pytest.raises(ValueError, match=r"^init: model.layers.0.self_attn attends to its keys more than once; use 'r"):
        with_text(base)


def test_zero_values_are_no_base_model():
    """Trap: a prefix of zero values still takes its share of the softmax."""
    base = build("llama")
    expected = logits(base, "llama")
    model = get_peft_model(base, PrefixConfig(init="zero_value"))
    assert all(not layer.prefix_value["default"].any() for layer in prefix_layers(model))
    assert all(layer.prefix_key["default"].all() for layer in prefix_layers(model))
    assert not torch.allclose(logits(model, "llama"), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reparametrised_prefix_made_plain(family, tmp_path):
    """The same logits, alone and saved; a perceptron of its own in each module."""
    model = prefixed(family, reparametrization=True, reparametrization_size=8, prefix_dropout=0.5)
    (layer, *_) = prefix_layers(model)
    assert (layer.prefix_mlp_in["default"].out_features, layer.prefix_mlp_out["default"].in_features) == (8, 8)
    expected = logits(model, family)
    save(model, tmp_path / "whole")
    whole = PeftModel.from_pretrained(build(family), tmp_path / "whole", is_trainable=True)
    assert torch.equal(logits(whole, family), expected)
    assert_same(step(whole, family)[1], step(model, family)[1])
    model.train()
    model.base_model.make_plain()
    torch.testing.assert_close(logits(model, family), expected)
    assert all(layer.prefix_key["default"].requires_grad for layer in prefix_layers(model))
    save(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(build(family), tmp_path / "plain")
    assert torch.equal(logits(plain, family), logits(model, family))
    names = {name for layer in prefix_layers(plain) for name in layer.state_dict()}
    assert names == {"prefix_key.default", "prefix_value.default"}

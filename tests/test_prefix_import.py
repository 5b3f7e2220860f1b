"""Prefixes of peft's own prefix tuning: the same outputs on the models where peft is right."""

import json

import pytest
import torch
import transformers as tf
from families import TASKS, VOCABULARY, build
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from prefix_models import P, assert_same, logits, prefix_layers, prefixed, save, step
from safetensors.torch import load_file, save_file

from peft_fast.methods import load_peft_prefix
from peft_fast.methods.prefix_import import convert_peft_prefix

pytestmark = pytest.mark.usefixtures("one_thread")
RIGHT_IN_PEFT = (
    "bert",
    "roberta",
    "electra",
    "gpt2",
    "opt",
    "opt_postnorm",
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
)


def saved_by_peft(base, folder, task_type, **config) -> PeftModel:
    torch.manual_seed(3)
    config = PrefixTuningConfig(num_virtual_tokens=P, task_type=task_type, encoder_hidden_size=16, **config)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    save(model.eval(), folder)
    return model


def decoder(kind):
    torch.manual_seed(0)
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0}
    if kind == "partly rotary":
        return tf.PhiForCausalLM(tf.PhiConfig(**small))
    if kind == "interleaved rotary":
        return tf.CohereForCausalLM(tf.CohereConfig(**small, num_key_value_heads=2))
    if kind == "scaled rotary":
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
        return tf.LlamaForCausalLM(tf.LlamaConfig(**small, rope_parameters=rope))
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    }
    kinds = ["sliding_attention", "full_attention"]
    config = tf.Gemma3TextConfig(**small, head_dim=8, num_key_value_heads=2, layer_types=kinds, rope_parameters=rope)
    return tf.Gemma3ForCausalLM(config)


KINDS = ("partly rotary", "interleaved rotary", "scaled rotary", "rotary by layer")


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize("family", RIGHT_IN_PEFT + KINDS)
def test_outputs_are_those_of_peft(family, projection, tmp_path):
    """With the head that was trained beside the prefix, and under padding on the right."""
    base = (lambda: decoder(family)) if family in KINDS else (lambda: build(family))
    task = TASKS.get(family, "CAUSAL_LM")
    theirs = saved_by_peft(base(), tmp_path / "peft", task, prefix_projection=projection)
    ours = load_peft_prefix(base(), tmp_path / "peft")
    inputs = "bert" if task == "SEQ_CLS" else "llama"
    assert not torch.allclose(logits(theirs, inputs), logits(base(), inputs))
    real = slice(None) if task == "SEQ_CLS" else (slice(None), slice(5))
    torch.testing.assert_close(logits(ours, inputs)[real], logits(theirs, inputs)[real])
    unpadded = {"attention_mask": None}
    torch.testing.assert_close(logits(ours, inputs, **unpadded), logits(theirs, inputs, **unpadded))
    save(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True)
    assert torch.equal(logits(again, inputs), logits(ours, inputs))
    assert_same(step(again, inputs)[1], step(ours, inputs)[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_is_that_of_peft(family, tmp_path):
    theirs = saved_by_peft(build(family), tmp_path, "CAUSAL_LM")
    ours = load_peft_prefix(build(family), tmp_path).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    theirs, ours = (
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options) for model in (theirs, ours)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits))


def test_bf16_keys_are_rotated_in_float32(tmp_path):
    saved_by_peft(build("llama"), tmp_path, "CAUSAL_LM")
    base = build("llama")
    for parameter in base.parameters():  # as `from_pretrained` does, which leaves the frequencies alone
        parameter.data = parameter.data.bfloat16()
    narrow = load_peft_prefix(base, tmp_path)
    wide = load_peft_prefix(build("llama"), tmp_path)
    for a, b in zip(prefix_layers(narrow), prefix_layers(wide), strict=True):
        assert a.prefix_key["default"].dtype == torch.float32
        assert torch.equal(a.prefix_key["default"], b.prefix_key["default"])


def test_added_to_a_model_that_has_prefixes(tmp_path):
    """Each adapter has its own positions."""
    theirs = saved_by_peft(build("gpt2"), tmp_path, "CAUSAL_LM")
    model = prefixed("gpt2", task_type="CAUSAL_LM")
    before = logits(model, "gpt2")
    assert load_peft_prefix(model, tmp_path, "from_peft") is model
    assert torch.equal(logits(model, "gpt2"), before)
    model.set_adapter("from_peft")
    torch.testing.assert_close(logits(model, "gpt2"), logits(theirs, "gpt2"))
    with model.disable_adapter():
        assert torch.equal(logits(model, "gpt2"), logits(build("gpt2"), "gpt2"))


def test_what_cannot_be_read(tmp_path):
    saved_by_peft(build("llama"), tmp_path, "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"^prompt_embeddings: expected 128 columns for the 2 attention modules"):
        load_peft_prefix(build("bert"), tmp_path)
    with pytest.raises(ValueError, match=r"^model: in peft the layers of an encoder-decoder model share prefixes"):
        load_peft_prefix(build("t5"), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has no prompt_embeddings, found \['other'\]"):
        load_peft_prefix(build("llama"), tmp_path)
    save_file(weights | {"base_model.score.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"^base_model.score.weight: no module beside the prefix has a place"):
        load_peft_prefix(build("llama"), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither"):
        load_peft_prefix(build("llama"), tmp_path)
    torch.save(weights, tmp_path / "adapter_model.bin")
    assert prefix_layers(load_peft_prefix(build("llama"), tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="not a prefix of peft's, found 'LORA'"):
        load_peft_prefix(build("llama"), tmp_path)


def test_a_model_in_memory_is_converted_as_it_is(tmp_path):
    base = build("llama").train()
    theirs = saved_by_peft(build("llama"), tmp_path, "CAUSAL_LM")
    prefixes = convert_peft_prefix(base, theirs.get_prompt_embedding_to_save("default"))
    assert base.training
    assert not prefix_layers(base)
    layer, *_ = prefix_layers(load_peft_prefix(build("llama"), tmp_path))
    assert torch.equal(prefixes["model.layers.0.self_attn"][0], layer.prefix_key["default"])

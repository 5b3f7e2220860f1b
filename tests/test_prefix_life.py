"""What is left of a model and its config when prefixes come, fail to come, and go."""

import pytest
import torch
from peft import get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_fast import PrefixConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(5, 23).view(2, 9)


def llama(**config):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **config)).eval()


# As the folds of a cross-validation do.
@pytest.mark.parametrize(
    ("kind", "kind_of_config", "implementation"),
    [(Gemma2ForCausalLM, Gemma2Config, "eager"), (LlamaForCausalLM, LlamaConfig, "sdpa")],
    ids=["gemma2-eager", "llama-sdpa"],
)
def test_two_models_of_one_config(kind, kind_of_config, implementation):
    config = kind_of_config(**SIZES, head_dim=8, pad_token_id=0, attn_implementation=implementation)
    models = [get_peft_model(kind(config).eval(), PrefixConfig(num_virtual_tokens=3)) for _ in range(2)]
    name = config._attn_implementation
    assert name == {"eager": "peft_fast_prefix_eager", "sdpa": "sdpa"}[implementation]
    for model in models:
        model(IDS)
        if implementation == "eager":
            with model.disable_adapter():
                assert model(IDS, output_attentions=True).attentions is not None
        assert config._attn_implementation == name
    expected = models[1](IDS)[0]
    models[0].unload()
    assert torch.equal(models[1](IDS)[0], expected)
    models[1].unload()
    assert config._attn_implementation == implementation


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "second"])
def test_a_prefix_that_cannot_be_made_leaves_the_model_as_it_was(earlier):
    model = base = llama(attn_implementation="eager")
    if earlier:
        model = get_peft_model(base, PrefixConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    before, names = model(IDS).logits, set(model.state_dict())
    hooks = [len(module._forward_pre_hooks) for module in base.modules()]
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    assert bool(trained)
    implementation = base.config._attn_implementation
    config = PrefixConfig(
        task_type="CAUSAL_LM", init="text", init_text="hello", tokenizer_name_or_path="/there/is/none"
    )
    with pytest.raises(OSError, match="none"):
        model.add_adapter("other", config) if earlier else get_peft_model(base, config)
    assert torch.equal(model(IDS).logits, before)
    assert set(model.state_dict()) == names
    assert [name for name, parameter in base.named_parameters() if parameter.requires_grad] == trained
    assert [len(module._forward_pre_hooks) for module in base.modules()] == hooks
    assert base.config._attn_implementation == implementation
    if earlier:
        assert list(model.peft_config) == ["default"]


def test_masks_of_segments_give_the_positions_of_a_mask_of_ones():
    model = get_peft_model(llama(), PrefixConfig(num_virtual_tokens=3))
    ones = torch.ones_like(IDS)
    segments, padded = ones.clone(), ones.clone()
    segments[:, 5:], padded[0, :2] = 2, 0
    assert torch.equal(model(IDS, attention_mask=segments).logits, model(IDS, attention_mask=ones).logits)
    both = model(IDS, attention_mask=padded * segments).logits
    assert torch.equal(both[0, 2:], model(IDS, attention_mask=padded).logits[0, 2:])

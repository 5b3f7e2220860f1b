"""Rows at the input layer of models with experts, and of those whose layers do more than attend once."""

import pytest
import torch
import transformers as tf
from families import _BART, _DECODER, _T5, VOCABULARY, batch
from prefix_models import P
from prefix_rows import parameter, with_rows
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 4, "use_mamba_kernels": False}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "in which nothing but .* has Lfm2DecoderLayer, Lfm2Sh"),
        ("Jamba", _MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1}, "in which nothing but .* JambaMambaMixer"),
        ("Qwen3Next", _LAYERS, "in which nothing but .* Qwen3NextGatedDeltaNet"),
        ("FalconH1", _MAMBA, "in which nothing but .* FalconH1Mixer"),  # beside attention, in the same layer
        ("DiffLlama", {}, "each module to call attention once.* a DiffLlamaAttention calls it again"),
        ("Doge", {}, "each module to call attention once.* a DogeAttention has a mask for each head"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_causal_models_whose_layers_do_more_than_attend_once(kind, options, found):
    """Trap: what the rows' run alone does not compute, or what a second call overwrites, is missing in the loss."""
    base = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**_DECODER | options))
    with pytest.raises(ValueError, match=rf"(?s)^layers: 'input' needs .*{found}.*use layers='all'$"):
        with_rows(base=base)


def test_a_model_that_repeats_its_keys():
    """Rows that went through the embedding are the same in front of the sequence."""
    torch.manual_seed(0)
    config = tf.JetMoeConfig(**_DECODER, kv_channels=8, num_local_experts=4)
    model = with_rows(base=tf.JetMoeForCausalLM(config))
    ids = tokens(2, 7)
    with torch.no_grad(), model.disable_adapter():
        embedded = model.get_input_embeddings()(ids)
        expected = model(inputs_embeds=torch.cat([parameter(model).expand(2, -1, -1), embedded], 1)).logits[:, P:]
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def experts(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "decoder_start_token_id": 0, "expert_capacity": 64}
    if kind == "NllbMoe":
        config = tf.NllbMoeConfig(**_BART, **sizes, encoder_sparse_step=1, encoder_layerdrop=0.0, decoder_layerdrop=0.0)
        return tf.NllbMoeForConditionalGeneration(config)
    if kind == "SwitchTransformers":
        return tf.SwitchTransformersForConditionalGeneration(
            tf.SwitchTransformersConfig(**_T5, **sizes, num_sparse_encoder_layers=1)
        )
    number = {"num_local_experts" if kind == "Mixtral" else "num_experts": 4, "num_experts_per_tok": 2}
    return getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**_DECODER, **number))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_router_logits_are_those_of_the_real_tokens(kind):
    """Also where checkpointing puts the rows in front of the sequence; the loss that balances the experts with them."""
    model = with_rows(base=experts(kind))
    inputs = batch("llama") | {"output_router_logits": True}
    expected = model.train()(**inputs)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    actual = model(**inputs)
    assert [r.shape for r in actual.router_logits] == [(14, 4)] * 2
    torch.testing.assert_close(actual.router_logits, expected.router_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["NllbMoe", "SwitchTransformers"])
def test_routers_of_encoders(kind):
    """Padding takes nothing from the rows' experts, nor theirs from the tokens'."""
    model = with_rows(base=experts(kind))
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    more = {"decoder_input_ids": ids, "output_router_logits": True, "output_hidden_states": True}
    padded = model(input_ids=ids, attention_mask=mask, **more)
    alone = model(input_ids=ids[1:, :5], **(more | {"decoder_input_ids": ids[1:]}))
    torch.testing.assert_close(padded.logits[1:], alone.logits, rtol=1e-4, atol=1e-5)
    assert padded.encoder_router_logits
    for routed, expected in zip(padded.encoder_router_logits, alone.encoder_router_logits, strict=True):
        torch.testing.assert_close(routed.view(2, 7, 4)[1, :5], expected.view(5, 4), rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_served_say_so():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tf.Dinov2Model(tf.Dinov2Config(**sizes)).eval()
    x = torch.randn(2, 3, 16, 16)
    before = model(x).last_hidden_state
    with pytest.raises(ValueError, match="layers: 'input' needs layers that take hidden_states"):
        with_rows(base=model)
    assert torch.equal(model(x).last_hidden_state, before)

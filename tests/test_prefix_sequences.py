"""Prefix tuning and what surrounds the sequence: generation, caches, padding, packing, windows, positions."""

import copy
import sys

import pytest
import torch
import transformers
from families import FAMILIES, TASKS, VOCABULARY, build
from peft import get_peft_model
from prefix_models import ROTARY, P, data, logits, prefix_layers, prefixed
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    DynamicCache,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    StaticCache,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_fast import PrefixConfig
from peft_fast.methods.prefix_interface import cache_of, name_for

pytestmark = pytest.mark.usefixtures("one_thread")
CAUSAL = [family for family, task in TASKS.items() if task == "CAUSAL_LM"]
GENERATIVE = [family for family, task in TASKS.items() if task != "SEQ_CLS"]
# Their positions come from the mask, or can be given.
POSITIONED = [family for family in CAUSAL if family in ROTARY] + ["gpt2", "opt"]


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("how", ["dynamic", "static", "no cache", "beams"])
@pytest.mark.parametrize("family", GENERATIVE)
def test_generation_is_the_teacher_forced_forward(family, how):
    """Trap: `KeyError: 'cache_position'` with a static cache; left padding made generation differ from the forward."""
    model = prefixed(family, task_type=TASKS[family])
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
        "beams": {"num_beams": 3},
    }[how]
    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    if TASKS[family] == "CAUSAL_LM":
        whole = torch.cat([mask, mask.new_ones(2, 4)], 1)
        extra = {"position_ids": positions(whole)} if family == "gpt2" else {}
        full = model(input_ids=generated.sequences, attention_mask=whole, **extra).logits[:, -5:-1]
    else:
        full = model(input_ids=ids, attention_mask=mask, decoder_input_ids=generated.sequences).logits[:, -5:-1]
    steps = torch.stack(generated.logits, 1)
    if how == "beams":
        steps = steps.unflatten(0, (2, 3))
        rows = generated.beam_indices[:, :4] % 3
        steps = steps[torch.arange(2)[:, None], rows, torch.arange(4)]
    torch.testing.assert_close(steps, full, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", POSITIONED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_amount_change_nothing(family, side, implementation):
    """Trap: left padding without `position_ids`. Rotary models get none here; GPT-2's absolute positions must be given.

    Everything in front of a fully masked row is the prefix alone.
    """
    base = build(family)
    base.set_attn_implementation("eager" if family == "gemma2" else implementation)
    model = prefixed(family, base=base)
    ids = tokens(2, 5)
    expected = logits(model, family, input_ids=ids, attention_mask=None)
    for amount in (1, 6):
        pad, off = ids.new_zeros(2, amount), ids.new_zeros(2, amount)
        order = slice(None, None, -1 if side == "right" else 1)
        padded = torch.cat([pad, ids][order], 1)
        mask = torch.cat([off, torch.ones_like(ids)][order], 1)
        extra = {"position_ids": positions(mask)} if family == "gpt2" else {}
        actual = logits(model, family, input_ids=padded, attention_mask=mask, **extra)
        actual = actual[:, amount:] if side == "left" else actual[:, :5]
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert"])
def test_padding_of_encoders(family):
    model = prefixed(family)
    ids, mask = (data(family)[name] for name in ("input_ids", "attention_mask"))
    padded = logits(model, family)[0]
    alone = logits(model, family, input_ids=ids[:1, : mask[0].sum()], attention_mask=None)[0]
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padding_of_encoder_decoders(family):
    model = prefixed(family)
    inputs = data(family)
    alone = {name: value[:1] for name, value in inputs.items()}
    alone["input_ids"] = alone["input_ids"][:, : inputs["attention_mask"][0].sum()]
    torch.testing.assert_close(logits(model, family)[:1], logits(model, family, **alone | {"attention_mask": None}))


@pytest.mark.parametrize("family", [family for family in POSITIONED if family != "opt"])  # which looks for no packing
def test_packed_sequences_see_the_prefix_and_not_each_other(family):
    """Trap: packed by `position_ids`, sequences attended to each other."""
    model = prefixed(family)
    first, second = tokens(1, 4), tokens(1, 6, seed=2)
    packed = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": torch.cat([torch.arange(4), torch.arange(6)])[None],
        "attention_mask": None,
    }
    # With a cache, transformers looks for no packing.
    actual = logits(model, family, **packed, use_cache=False)
    expected = [logits(model, family, input_ids=ids, attention_mask=None) for ids in (first, second)]
    torch.testing.assert_close(actual, torch.cat(expected, 1))


@pytest.mark.parametrize(
    ("family", "cached"),
    [(family, cached) for family in ("mistral", "gemma2", "gemma3_text") for cached in (False, True)]
    + [("modernbert", False)],
)
def test_the_prefix_never_leaves_the_window(family, cached):
    """Trap: with a sliding window, later tokens no longer saw the prefix. Here the last token's gradient reaches it.

    The cached case feeds one token at a time, long after the window has moved on.
    """
    base = build(family)
    base.config.sliding_window = 3
    base.config.layer_types = ["sliding_attention"] * 2
    base = type(base)(base.config)
    model = prefixed(family, base=base)
    ids = tokens(1, 12)
    full = model(input_ids=ids).logits
    with torch.no_grad():
        changed = ids.clone()
        changed[:, 0] = 3
        moved = model(input_ids=changed).logits
    if family == "modernbert":
        last = full.sum()
    else:
        # Two layers of three tokens each: the last logits do not see the first token, so the window is in force.
        torch.testing.assert_close(moved[:, -1], full[:, -1])
        assert not torch.allclose(moved[:, 1], full[:, 1])
        last = full[:, -1].sum()
    if cached:
        cache = DynamicCache(config=base.config)
        for i in range(12):
            step = model(input_ids=ids[:, i : i + 1], past_key_values=cache, position_ids=torch.tensor([[i]])).logits
        torch.testing.assert_close(step[:, 0], full[:, -1])
        last = step.sum()
    last.backward()
    assert all(p.grad.abs().max() > 1e-6 for layer in prefix_layers(model) for p in layer.parameters())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_positions_are_those_of_the_base_model(family):
    """Trap: positions shifted by P, and failed once T + P exceeded the table. Here T is all that the table holds."""
    model = prefixed(family, num_virtual_tokens=40)
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "wpe", "embed_positions")):
            module.register_forward_hook(lambda module, args, y: seen.append(y))
    length = 30 if family in ("roberta", "opt", "opt_postnorm") else 32
    inputs = {"input_ids": tokens(1, length), "attention_mask": torch.ones(1, length, dtype=torch.long)}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if family in ("t5", "bart") else {}
    with_prefix = logits(model, family, **inputs)
    count = len(seen)
    with model.disable_adapter():
        logits(model, family, **inputs)
    assert with_prefix.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(seen[:count], seen[count:], strict=True))
    assert count or family in (*ROTARY, "t5")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_chunked_prefill_by_hand(family):
    """A prefill in two chunks, query length unlike key length, with and without padding on the left."""
    model = prefixed(family)
    ids = tokens(2, 9)
    expected = logits(model, family, input_ids=ids, attention_mask=None)
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert first.past_key_values.get_seq_length() == 9
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected)
    if family in ROTARY:
        mask = torch.ones_like(ids)
        mask[:, :2] = 0
        expected = logits(model, family, input_ids=ids[:, 2:], attention_mask=None)
        with torch.no_grad():
            first = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
            second = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits[:, 2:], second.logits], 1), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_empty_rest_of_a_static_cache_is_not_seen(family):
    """Without a mask, transformers leaves it to the attention function that more keys come than there are queries."""
    model = prefixed(family)
    ids = tokens(2, 5)
    expected = logits(model, family, input_ids=ids, attention_mask=None)
    cache = StaticCache(config=model.config, max_cache_len=12)
    torch.testing.assert_close(
        logits(model, family, input_ids=ids, attention_mask=None, past_key_values=cache), expected
    )


def test_pooling_and_spans_are_of_real_tokens():
    """Trap: prompt tuning pooled a virtual token. Here sequences keep their length, and the pad token its place."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = prefixed("llama", base=LlamaForSequenceClassification(config), task_type="SEQ_CLS")
    ids = tokens(1, 6)
    alone = logits(model, input_ids=ids, attention_mask=None)
    for padded in (torch.cat([ids, ids * 0], 1), torch.cat([ids * 0, ids], 1)):
        torch.testing.assert_close(logits(model, input_ids=padded, attention_mask=(padded != 0).long()), alone)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    masked = prefixed(base=BertForMaskedLM(config))
    assert logits(masked, input_ids=ids, attention_mask=None).shape == (1, 6, VOCABULARY)


@pytest.mark.parametrize("kind", ["bert decoder", "encoder-decoder", "whisper"])
def test_other_cross_attention(kind):
    """Each kind of attention module gets a prefix and a gradient; generation agrees with the forward."""
    torch.manual_seed(0)
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    decoder = BertConfig(**small, is_decoder=True, add_cross_attention=True)
    ids = tokens(2, 6)
    if kind == "bert decoder":
        base, inputs = BertLMHeadModel(decoder), {"input_ids": ids, "encoder_hidden_states": torch.randn(2, 5, 32)}
        sides = 2
    elif kind == "encoder-decoder":
        base = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**small), decoder))
        inputs, sides = {"input_ids": ids, "decoder_input_ids": tokens(2, 4, seed=2)}, 3
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = WhisperConfig(
            vocab_size=VOCABULARY, d_model=32, num_mel_bins=8, max_source_positions=10, **layers, **special
        )
        base = WhisperForConditionalGeneration(config)
        inputs, sides = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids}, 3
    model = prefixed(base=base)
    assert len(prefix_layers(model)) == sides
    with torch.no_grad():
        output = model(**inputs).logits
        with model.disable_adapter():
            assert not torch.allclose(model(**inputs).logits, output)
    model(**inputs).logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for layer in prefix_layers(model) for p in layer.parameters())


def test_changing_the_mask_by_hand():
    """A mask of four dimensions is the caller's own, and hides none of the prefix."""
    model = prefixed("llama")
    ids = tokens(1, 6)
    causal = torch.ones(6, 6).tril().bool()[None, None]
    expected = logits(model, "llama", input_ids=ids, attention_mask=None)
    torch.testing.assert_close(logits(model, "llama", input_ids=ids, attention_mask=causal), expected)
    nothing = torch.zeros_like(causal)
    alone = logits(model, "llama", input_ids=ids, attention_mask=nothing)
    assert alone.isfinite().all()
    other = copy.deepcopy(ids)
    other[:, 0] = 3
    # Each token sees the prefix and itself through the residual, no other token.
    moved = logits(model, "llama", input_ids=other, attention_mask=nothing)
    torch.testing.assert_close(moved[:, 1:], alone[:, 1:])
    assert prefix_layers(model)[0].prefix_key["default"].shape[1] == P


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["bidirectional", "no mask", "own mask", "float mask", "more queries than keys"])
def test_the_sequence_is_masked_as_in_the_base_model(case, implementation):
    """A new gate is zero, so what is left is the base model's own attention, called as the model calls it."""
    base = build("llama")
    base.set_attn_implementation(implementation)
    base.config.is_causal = case != "bidirectional"
    ids, mask = tokens(2, 6), None
    if case == "more queries than keys":
        attention = base.model.layers[0].self_attn
        q, kv = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 3, 8)
        call = AttentionInterface().get_interface(
            implementation, sys.modules[type(attention).__module__].eager_attention_forward
        )
        expected = call(attention, q, kv, kv, None, scaling=1.0)[0]
        get_peft_model(base, PrefixConfig(gate=True))
        actual = AttentionInterface()[name_for(implementation)](attention, q, kv, kv, None, scaling=1.0)[0]
    else:
        if case.endswith("mask") and case != "no mask":
            mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
            mask |= torch.eye(6, dtype=torch.bool)
            if case == "float mask" or implementation == "eager":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        expected = logits(base, "llama", input_ids=ids, attention_mask=mask)
        model = get_peft_model(base, PrefixConfig(gate=True))
        actual = logits(model, "llama", input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(actual, expected)


def gemma4():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "global_head_dim": 8}
    layers = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_shared_layers": 2}
    embeddings = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 50, "pad_token_id": 0}
    return transformers.Gemma4ForCausalLM(
        transformers.Gemma4TextConfig(**sizes, **layers, **embeddings, layer_types=["full_attention"] * 4)
    )


def minimax():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "rotary_dim": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 32}
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "shared_intermediate_size": 32}
    kinds = {"layer_types": ["minimax_m3_sparse"] * 2, "mlp_layer_types": ["dense"] * 2}
    model = transformers.MiniMaxM3VLForCausalLM(
        transformers.MiniMaxM3VLTextConfig(**sizes, **layers, **experts, **index, **tokens, **kinds)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as they are, the model looks at no token but the last
            torch.nn.init.normal_(parameter, std=0.2)
    return model


# Gemma 4 computes fewer queries where few logits are wanted, MiniMax M3 makes a mask of blocks: under "sdpa" alone.
@pytest.mark.parametrize(
    ("make", "options"), [(gemma4, {"logits_to_keep": 3}), (minimax, {})], ids=["gemma4", "minimax"]
)
def test_models_that_branch_on_the_name_of_their_attention(make, options):
    torch.manual_seed(0)
    base = make().eval().requires_grad_(False)
    ids = tokens(2, 48)
    with torch.no_grad():
        expected = base(ids, **options).logits
        if not options:
            base.config._attn_implementation = "peft_fast_prefix_sdpa"  # another name, and the blocks are gone
            assert not torch.allclose(base(ids).logits, expected, atol=0.1)
            base.config._attn_implementation = "sdpa"
        model = get_peft_model(base, PrefixConfig(gate=True)).eval()
        torch.testing.assert_close(model(ids, **options).logits, expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(ids, **options).logits, expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_two_names(name):
    """transformers 5.24 calls it `cache`."""
    assert cache_of({name: "there", "other": None}) == "there"
    assert cache_of({name: None}) is None
    assert cache_of({}) is None

"""The prefix at the input layer: rows in front of the sequence, which nothing behind the layers sees."""

import copy
import pickle
import re

import pytest
import torch
import transformers as tf
from families import _ENCODER, FAMILIES, TASKS, VOCABULARY, batch, build
from peft import PeftModel, get_peft_model
from prefix_models import ROTARY, P, assert_same, data, logits, save, step
from prefix_rows import fill, parameter, strong, truth, with_rows
from torch import Tensor, nn

from peft_fast import PrefixConfig
from peft_fast.methods.prefix_input import FRONT, ROWS, InputLayer

pytestmark = pytest.mark.usefixtures("one_thread")
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_outputs_and_the_gradient_are_the_truth(family, implementation):
    """Trap: prompt tuning pools a virtual token, and moves positions. Here T tokens come out; one parameter learns."""
    base = strong(family).double()
    base.set_attn_implementation(implementation if family != "gemma2" else "eager")
    model = with_rows(family, base=copy.deepcopy(base))
    assert [p is parameter(model) for p in model.parameters() if p.requires_grad] == [True]
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in data(family).items()}
    rows = parameter(model).detach().clone().requires_grad_()
    expected = truth(base, family, rows, inputs.get("attention_mask"))(**inputs).logits
    actual = model(**inputs).logits
    real = inputs["attention_mask"].bool() if TASKS[family] == "CAUSAL_LM" else slice(None)
    near = {"rtol": 1e-5, "atol": 1e-6}  # rotary angles and some of the truth's softmaxes are in fp32
    torch.testing.assert_close(actual[real], expected[real], **near)
    dy = torch.randn(expected[real].shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(3))
    expected[real].backward(dy)
    actual[real].backward(dy)
    assert rows.grad.abs().amax(1).min() > 1e-4
    torch.testing.assert_close(parameter(model).grad, rows.grad, **near)
    with model.disable_adapter():
        assert not torch.allclose(model(**inputs).logits, actual, rtol=1e-3)


def encoder_with(head: str, **config):
    torch.manual_seed(0)
    base = getattr(tf, f"BertFor{head}")(tf.BertConfig(**_ENCODER, hidden_dropout_prob=0.0, **config))
    for weight in base.parameters():
        weight.data *= 3 if weight.dim() == 2 else 1
    return base.eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", ["SequenceClassification", "QuestionAnswering", "TokenClassification", "MaskedLM"])
def test_heads_see_the_real_tokens(head, side):
    """Trap: [CLS] pooling of a virtual token, `start_positions` off by P, a crash of token classification."""
    base = encoder_with(head)
    inputs = data("bert")
    inputs["attention_mask"] = inputs["attention_mask"].flip(1) if side == "left" else inputs["attention_mask"]
    labels = {
        "SequenceClassification": {"labels": torch.tensor([1, 0])},
        "QuestionAnswering": {"start_positions": torch.tensor([2, 0]), "end_positions": torch.tensor([4, 6])},
        "TokenClassification": {"labels": torch.tensor([[0, 1, 0, 1, 1, -100, -100], [1] * 7])},
        "MaskedLM": {"labels": inputs["input_ids"]},
    }[head]
    model = with_rows(base=copy.deepcopy(base))
    rows = parameter(model).detach().clone().requires_grad_()
    expected = truth(base, "bert", rows, inputs["attention_mask"])(**inputs, **labels)
    actual = model(**inputs, **labels)
    torch.testing.assert_close(dict(actual), dict(expected), rtol=1e-4, atol=1e-5)
    expected.loss.backward()
    actual.loss.backward()
    torch.testing.assert_close(parameter(model).grad, rows.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "modernbert", "vit", "t5", "bart", "albert"])
def test_hidden_states_and_pooler_are_those_of_the_real_tokens(family):
    base = strong(family)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        expected = base(**data(family), output_hidden_states=True)
        actual = with_rows(family, base=base)(**data(family), output_hidden_states=True, output_attentions=True)
    name = "encoder_hidden_states" if family in ("t5", "bart") else "hidden_states"
    assert [h.shape for h in actual[name]] == [h.shape for h in expected[name]]
    torch.testing.assert_close(actual[name][0], expected[name][0])
    assert not torch.allclose(actual[name][1], expected[name][1])
    assert not actual.get("attentions")
    assert not actual.get("encoder_attentions")


def test_output_as_a_tuple():
    model = with_rows(base=tf.BertModel(tf.BertConfig(**_ENCODER)))
    with torch.no_grad():
        last, _, hidden = model(**data("bert"), output_hidden_states=True, return_dict=False)
    assert [h.shape[1] for h in hidden] == [7, 7, 7]
    assert torch.equal(hidden[-1], last)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vit", "t5", "bart")])
def test_padding_side_and_amount_change_nothing(family):
    """Hidden states of the real tokens; those of classifiers would pool the first place, which may be padding."""
    model = with_rows(family)
    backbone = model.base_model.model.base_model
    ids = tokens(2, 5)
    with torch.no_grad():
        expected = backbone(ids)[0]
        for left, right in (1, 0), (6, 0), (0, 1), (0, 6), (2, 3):
            pad = nn.functional.pad
            mask = pad(torch.ones_like(ids), (left, right))
            extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if left and family not in ROTARY else {}
            if left and family in ("distilbert", "roberta", "opt", "opt_postnorm"):
                if family == "distilbert":
                    continue  # which cannot be told positions
                extra = {}  # which find them themselves
            padded = pad(ids, (left, right), value=model.config.pad_token_id or 0)
            actual = backbone(padded, attention_mask=mask, **extra)[0][:, left : left + 5]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "modernbert"])
def test_rows_stay_in_the_window(family, checkpointing):
    """A window of two tokens hides no row, and more rows than it is wide see each other as without it."""
    base = strong(family).double()
    base.config.sliding_window = 2
    base.config.local_attention = 4
    model = with_rows(family, base=copy.deepcopy(base))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    ids = tokens(2, 9)
    rows = parameter(model).detach()
    window = 2
    expected = truth(base, family, rows, None, window)(input_ids=ids).logits
    actual = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])  # which has no checkpointing
def test_gradient_checkpointing(family, reentrant):
    """Also where two forwards come before their backwards, and where the rows have dropout on an encoder."""
    dropout = 0.0 if TASKS[family] == "CAUSAL_LM" else 0.3
    model = with_rows(family, prefix_dropout=dropout)
    expected = step(model, family)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = step(model, family)
    torch.testing.assert_close(recomputed, expected, rtol=1e-4, atol=1e-6)
    model.zero_grad()
    torch.manual_seed(5)
    first = model(**batch(family)).loss
    model(**batch(family))
    first.backward()
    torch.testing.assert_close(parameter(model).grad, next(iter(expected[1].values())), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_causal_encoder(reentrant):
    """BERT as a decoder, whose layers are run by another module than that which makes the masks."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = with_rows(base=tf.BertLMHeadModel(tf.BertConfig(**_ENCODER, **off, is_decoder=True)))
    inputs = {"input_ids": tokens(2, 7), "labels": tokens(2, 7)}
    model.train()(**inputs).loss.backward()
    expected = parameter(model).grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs).loss.backward()
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(parameter(model).grad, expected, rtol=1e-4, atol=1e-8)


def test_checkpointing_by_hand_of_a_causal_layer_is_refused():
    model = with_rows("llama").train()
    layer = model.base_model.model.model.layers[0]
    stock = layer.forward
    layer.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        stock, *args, **kwargs, use_reentrant=False
    )
    with pytest.raises(ValueError, match=r"^layers: 'input' needs the whole LlamaModel to run, not a LlamaAttention"):
        model(**batch("llama")).loss.backward()


@pytest.mark.parametrize("how", ["dynamic", "static", "no cache", "beams"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if TASKS[family] != "SEQ_CLS"])
def test_generation_is_the_teacher_forced_forward(family, how):
    model = with_rows(family, task_type=TASKS[family])
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
        extra = {"position_ids": (whole.cumsum(1) - 1).clamp(min=0)} if family == "gpt2" else {}
        full = model(input_ids=generated.sequences, attention_mask=whole, **extra).logits[:, -5:-1]
    else:
        full = model(input_ids=ids, attention_mask=mask, decoder_input_ids=generated.sequences).logits[:, -5:-1]
    steps = torch.stack(generated.logits, 1)
    if how == "beams":
        steps = steps.unflatten(0, (2, 3))
        steps = steps[torch.arange(2)[:, None], generated.beam_indices[:, :4] % 3, torch.arange(4)]
    torch.testing.assert_close(steps, full, rtol=1e-3, atol=1e-4)


def test_the_rows_run_once_for_a_generation_and_again_when_they_change():
    model = with_rows("llama")
    runs = []
    model.base_model.model.model.register_forward_pre_hook(lambda *_: runs.append(0))
    with torch.no_grad():
        output = model(tokens(2, 5), use_cache=True)
        again = copy.deepcopy(output.past_key_values)
        model(tokens(2, 1), past_key_values=output.past_key_values)
        assert len(runs) == 3
        before = model(tokens(2, 1), past_key_values=copy.deepcopy(again)).logits
        parameter(model).add_(torch.randn(P, 32))
        assert not torch.allclose(model(tokens(2, 1), past_key_values=again).logits, before)
    front = getattr(model.base_model.model.model.layers[0].self_attn, FRONT)
    assert front.now.keys
    assert not copy.deepcopy(front).now.keys
    past = model(tokens(2, 5), use_cache=True).past_key_values
    model(tokens(2, 1), past_key_values=past).logits.sum().backward()
    assert parameter(model).grad.abs().max() > 0
    assert not front.now.keys


def test_no_dropout_in_what_the_whole_batch_shares():
    model = with_rows("gpt2", base=build("gpt2"))
    attention = model.base_model.model.transformer.h[1].attn
    seen = []
    attention.register_forward_hook(lambda *_: seen.append(getattr(attention, FRONT).now.keys.get(attention)))
    for training in (True, False):
        model.train(training)(**data("gpt2"))
    assert model.train().base_model.model.transformer.h[0].training
    torch.testing.assert_close(seen[1], seen[3])


@each_family
def test_disabled_deleted_or_unloaded_is_the_base_model(family):
    base = build(family).requires_grad_(False)
    keys, expected = set(base.state_dict()), logits(base, family)
    model = with_rows(family, base=base, task_type=TASKS[family])
    with model.disable_adapter():
        assert torch.equal(logits(model, family), expected)
    assert model.unload() is base
    assert torch.equal(logits(base, family), expected)
    assert set(base.state_dict()) == keys
    assert not any(hasattr(module, FRONT) or hasattr(module, ROWS) for module in base.modules())
    assert not any(module._forward_pre_hooks for module in base.modules())


@each_family
def test_saved_loaded_and_resumed(family, tmp_path):
    model = with_rows(family, task_type=TASKS[family])
    expected, gradients = logits(model, family), step(model, family)[1]
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(strong(family), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, family), expected)
    assert_same(step(loaded, family)[1], gradients)
    loaded = PeftModel.from_pretrained(strong(family), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, family), expected)


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2", "t5"])
def test_copies_are_independent(family):
    model = with_rows(family)
    expected = step(model, family)[0]
    clone = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    fill(model, seed=3)
    for copied in clone, loaded:
        assert torch.equal(step(copied, family)[0], expected)
        assert parameter(copied).grad is not None
        copied.unload()
    assert not torch.equal(step(model, family)[0], expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Adapter every was active which is now deleted")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_several_adapters_and_both_kinds(family):
    """Rows of two adapters are those of one that has both; beside prefixes in every layer the output has both."""
    model = with_rows(family)
    first = logits(model, family)
    model.add_adapter("second", PrefixConfig(num_virtual_tokens=2, layers="input"))
    fill(model, "second", seed=3)
    assert torch.equal(logits(model, family), first)
    model.set_adapter("second")
    second = logits(model, family)
    model.base_model.set_adapter(["default", "second"])
    joined = with_rows(family, num_virtual_tokens=P + 2)
    parameter(joined).data.copy_(torch.cat([parameter(model, name) for name in ("default", "second")]))
    torch.testing.assert_close(logits(joined, family), logits(model, family))
    model.add_adapter("every", PrefixConfig(num_virtual_tokens=2, init="vocab"))
    model.base_model.set_adapter(["default", "every"])
    both = step(model, family)
    assert all(gradient.abs().max() > 0 for gradient in both[1].values())
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(step(model, family), both, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    model.set_adapter("every")
    outputs = [first, second, logits(model, family)]
    model.delete_adapter("default")
    model.delete_adapter("every")
    model.set_adapter("second")
    assert torch.equal(logits(model, family), second)
    assert not any(torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3_text", "mistral", "qwen3"])
def test_a_text_is_as_good_as_the_text_itself(family):
    """On causal rotary models, logits behind the rows of a text are those behind the text."""
    text, ids = [7, 30, 12, 45, 9], tokens(2, 6)
    base = strong(family)
    expected = logits(
        base, family, input_ids=torch.cat([torch.tensor(text).expand(2, -1), ids], 1), attention_mask=None
    )
    config = PrefixConfig(num_virtual_tokens=5, layers="input", init="text", init_text=text)
    model = get_peft_model(base, config)
    actual = logits(model, family, input_ids=ids, attention_mask=None)
    torch.testing.assert_close(actual, expected[:, 5:], rtol=1e-4, atol=1e-5)


@each_family
def test_first_rows(family):
    """Random ones have the scale of what stands beside them; those of tokens are rows of the embeddings."""
    model = get_peft_model(build(family), PrefixConfig(num_virtual_tokens=16, layers="input"))
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, InputLayer))
    host = next(m for m in model.modules() if getattr(m, ROWS, None) is layer)
    host.register_forward_pre_hook(lambda _, args, more: seen.append([*args, *more.values()][0]), with_kwargs=True)
    logits(model, family)
    ratio = parameter(model).std() / seen[-1][:, -7:].std()
    assert 0.6 < ratio < 1.6
    if family != "vit":
        config = PrefixConfig(num_virtual_tokens=3, layers="input", init="text", init_text=[7, 30])
        model.add_adapter("text", config)
        if family in ("llama", "qwen2", "t5"):
            embeddings = model.get_input_embeddings().weight[[7, 30, 7]]
            torch.testing.assert_close(parameter(model, "text"), embeddings)
        assert not torch.equal(parameter(model, "text")[0], parameter(model, "text")[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_base_and_autocast(family):
    model = with_rows(family, base=build(family).to(torch.bfloat16))
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(family).items()}
    output = model.train()(**inputs)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert parameter(model).dtype == torch.float32
    assert parameter(model).grad.isfinite().all()
    assert parameter(model).grad.any()
    model = with_rows(family)
    expected = logits(model, family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(**data(family)).logits
    assert (actual - expected).abs().max() < 0.15 * expected.abs().max()


@pytest.mark.parametrize("family", ["modernbert", "llama"])
def test_compiles_as_one_graph(family):
    model = with_rows(family)
    model.base_model.model.loss_type = "ForCausalLM"  # named, since guessing it logs, which no graph can hold
    expected = model(**data(family)).logits
    expected.sum().backward()
    gradient = parameter(model).grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**data(family)).logits, expected)
    compiled(**data(family)).logits.sum().backward()
    torch.testing.assert_close(parameter(model).grad, gradient)


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("targets", {"targets": ["encoder"]}),
        ("gate", {"gate": True}),
        ("reparametrization", {"reparametrization": True}),
        ("position_offset", {"position_offset": 3}),
        ("target_modules", {"target_modules": ["query"]}),
        ("exclude_modules", {"exclude_modules": "query"}),
        ("layers_to_transform", {"layers_to_transform": [1]}),
        ("init", {"init": "zero_value"}),
    ],
)
def test_options_that_do_not_go_with_it(field, config):
    with pytest.raises(
        ValueError, match=rf'^{field}: .*layers="input".*{re.escape(str(next(iter(config.values()))))[:5]}'
    ):
        PrefixConfig(layers="input", **config)


def test_models_that_cannot_have_rows():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    clip = tf.CLIPModel(
        tf.CLIPConfig(
            text_config={"vocab_size": 50, **small}, vision_config={"image_size": 8, "patch_size": 4, **small}
        )
    )
    with pytest.raises(ValueError, match=r"^layers: 'input' needs a model with one stack of layers, and CLIPModel has"):
        get_peft_model(clip, PrefixConfig(layers="input"))
    bart = tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_layerdrop=0.1)
    )
    with pytest.raises(ValueError, match=r"^layers: 'input' cannot drop layers, set encoder_layerdrop=0.1 to 0"):
        get_peft_model(bart, PrefixConfig(layers="input"))

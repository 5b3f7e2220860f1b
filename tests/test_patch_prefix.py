"""Patched models with peft's own prefix tuning: its outputs where it is right, its own forward elsewhere."""

import copy
import functools
import io
import pickle
import sys

import peft
import pytest
import torch
import transformers as tf
from families import _DECODER, TASKS, VOCABULARY, batch, build
from peft import PrefixTuningConfig, get_peft_model
from prefix_models import P, save
from torch import nn

import peft_fast
from peft_fast.methods.prefix_patch import _HeldLayer
from peft_fast.testing import saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
RIGHT = ("bert", "roberta", "electra", "gpt2", "opt", "opt_postnorm", "llama", "qwen2", "qwen3", "gemma")
_SPAN = {name: torch.tensor([1, 4]) for name in ("start_positions", "end_positions")}
FEW = ("bert", "gpt2", "llama")


def tuned(family: str = "bert", base: nn.Module | None = None, task: str | None = None, **config) -> peft.PeftModel:
    """A prefix that gets a fair share of the attention; nothing is dropped."""
    base = no_dropout(build(family) if base is None else base)
    config = {"num_virtual_tokens": P, "task_type": task or TASKS[family], "encoder_hidden_size": 16} | config
    model = get_peft_model(base, PrefixTuningConfig(**config))
    fill(model)
    return model


def fill(model: nn.Module, adapter_name: str = "default", seed: int = 3) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.prompt_encoder[adapter_name].parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=draw)


def no_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def patched_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    peft_fast.patch(copied)
    return copied


def row(model: nn.Module):
    (only,) = peft_fast.report(model).rows
    return only


def assert_fused(model: nn.Module) -> None:
    assert (row(model).state, row(model).op) == ("fused", "prefix_attention"), row(model).reason


def step(model: nn.Module, inputs: dict) -> tuple[dict, dict]:
    """Tensors of the output, and the gradients of what is trained."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    tensors = {name: value.detach() for name, value in output.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(stock: nn.Module, patched: nn.Module, inputs: dict, **tolerance) -> None:
    (outputs, gradients), (expected, expected_gradients) = (step(model, inputs) for model in (patched, stock))
    assert "loss" in outputs
    for actual, wanted in ((outputs, expected), (gradients, expected_gradients)):
        assert actual.keys() == wanted.keys()
        for name in actual:
            torch.testing.assert_close(actual[name], wanted[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)
    prefix = [gradient for name, gradient in gradients.items() if "prompt_encoder" in name]
    assert prefix
    assert all(gradient.abs().max() > 0 for gradient in prefix)


def left_padded(inputs: dict) -> dict:
    return inputs | {"attention_mask": inputs["attention_mask"].flip(1)}


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize("family", RIGHT)
def test_steps_are_those_of_peft(family, projection):
    stock = tuned(family, prefix_projection=projection).train()
    patched = patched_copy(stock)
    inputs = batch(family)
    whole = {name: value for name, value in inputs.items() if name != "attention_mask"}
    for data in (inputs, left_padded(inputs), whole, whole | {"attention_mask": torch.ones(2, 7)}):
        assert_same_step(stock, patched, data)
        assert_fused(patched)
    # The prefix does something.
    base = stock.get_base_model()(**whole).logits
    assert not torch.allclose(patched(**whole).logits, base, atol=1e-4)


def test_attention_gets_the_prefix_once_and_no_mask(monkeypatch):
    calls = []
    interface = sys.modules["peft_fast.methods.prefix_interface"]
    op = interface.apply_prefix_attention

    def watched(tensors, *args):
        _, key, _, prefix_key, prefix_value, mask, _ = tensors
        calls.append((key.shape[2], tuple(prefix_key.shape), tuple(prefix_value.shape), mask))
        return op(tensors, *args)

    monkeypatch.setattr(interface, "apply_prefix_attention", watched)
    for family, heads in (("llama", 2), ("bert", 4), ("opt", 4)):
        model = patched_copy(tuned(family))
        runs = []
        model.prompt_encoder.default.forward = functools.partial(
            lambda stock, rows, runs=runs: runs.append(tuple(rows.shape)) or stock(rows),
            model.prompt_encoder.default.forward,
        )
        calls.clear()
        model(input_ids=batch(family)["input_ids"], attention_mask=torch.ones(2, 7))
        assert calls == [(7, (heads, P, 8), (heads, P, 8), None)] * 2
        assert runs == [(1, P)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FEW)
def test_implementations_and_modes(family, implementation):
    stock = tuned(family)
    stock.get_base_model().set_attn_implementation(implementation)
    patched = patched_copy(stock)
    inputs = batch(family)
    assert_same_step(stock.train(), patched.train(), inputs)
    for model in (stock, patched):
        model.eval()
    with torch.no_grad():
        for data in (inputs, left_padded(inputs), inputs | {"attention_mask": None}):
            torch.testing.assert_close(patched(**data).logits, stock(**data).logits)
    with torch.inference_mode():
        torch.testing.assert_close(patched(**inputs).logits, stock(**inputs).logits)
    assert_fused(patched)
    peft_fast.unpatch(patched)
    assert patched.get_base_model().config._attn_implementation == implementation


@pytest.mark.parametrize("family", FEW)
def test_inputs_of_other_kinds(family):
    stock = tuned(family)
    patched = patched_copy(stock)
    inputs = batch(family)
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = stock.get_input_embeddings()(inputs["input_ids"]).detach()
    positions = torch.arange(7).expand(2, 7).clone()
    positions[1] += 2
    for data in (
        embedded,
        inputs | {"position_ids": positions},
        inputs | {"output_hidden_states": True},
        inputs | {"return_dict": True, "past_key_values": None},
        {name: value[:, :2] if value.dim() == 2 else value for name, value in inputs.items()},
    ):
        assert_same_step(stock, patched, data)
        assert_fused(patched)
    loss, logits, *_ = patched(**inputs, return_dict=False)
    assert torch.equal(logits, patched(**inputs).logits)
    assert torch.equal(loss, patched(**inputs).loss)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_cache_that_comes_back_is_that_of_peft(family):
    stock = tuned(family).eval()
    patched = patched_copy(stock)
    inputs = {"input_ids": batch(family)["input_ids"]}
    more = {"input_ids": torch.tensor([[5, 6], [7, 8]])}
    with torch.no_grad():
        expected, actual = stock(**inputs).past_key_values, patched(**inputs).past_key_values
        read = patched(**inputs).past_key_values
        assert type(actual) is type(expected)
        assert actual.get_seq_length() == P + 7
        for a, b in zip(read, expected, strict=True):
            torch.testing.assert_close(a[:2], b[:2])
        assert [vars(layer).keys() for layer in read.layers] == [vars(layer).keys() for layer in expected.layers]
        copy.deepcopy(actual).crop(-2)
        # It goes on in the base model, whose attention is stock.
        for _ in range(2):
            theirs, ours = (
                model.get_base_model()(**more, past_key_values=cache)
                for model, cache in ((stock, expected), (patched, actual))
            )
            torch.testing.assert_close(ours.logits, theirs.logits)
        # peft ignores the caches that it is given.
        torch.testing.assert_close(patched(**inputs, past_key_values=actual).logits, stock(**inputs).logits)


@pytest.mark.parametrize(
    ("task", "kind", "labels"),
    [
        ("TOKEN_CLS", "BertForTokenClassification", {"labels": torch.arange(14).view(2, 7) % 2}),
        ("QUESTION_ANS", "BertForQuestionAnswering", _SPAN),
        ("SEQ_CLS", "BertForSequenceClassification", {"labels": torch.tensor([0, 1])}),
    ],
)
def test_heads(task, kind, labels):
    """Whose weights train beside the prefix."""
    torch.manual_seed(0)
    base = getattr(tf, kind)(build("bert").config)
    stock = tuned(base=base, task=task).train()
    patched = patched_copy(stock)
    inputs = {name: batch("bert")[name] for name in ("input_ids", "attention_mask")}
    segments = {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)}
    assert_same_step(stock, patched, inputs | labels | segments)
    assert_fused(patched)


def test_heads_without_labels_and_of_decoders():
    base = build("bert").base_model
    stock = tuned(base=base, task="FEATURE_EXTRACTION").eval()
    patched = patched_copy(stock)
    inputs = {name: batch("bert")[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert_fused(patched)
    torch.manual_seed(0)
    base = tf.LlamaForSequenceClassification(build("llama").config)
    stock = tuned(base=base, task="SEQ_CLS").train()
    patched = patched_copy(stock)
    assert_same_step(stock, patched, batch("bert"))
    assert_fused(patched)


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("family", FEW)
def test_gradient_checkpointing(family, reentrant, projection):
    """Where stock loses the prefix or crashes: the steps are those of a model without checkpointing."""
    stock = tuned(family, prefix_projection=projection).train()
    patched = patched_copy(stock)
    patched.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    patched.get_base_model().enable_input_require_grads()
    stock.get_base_model().enable_input_require_grads()
    inputs = batch(family)
    for data in (inputs, left_padded(inputs), {**inputs, "attention_mask": None}):
        assert_same_step(stock, patched, data)
    assert_fused(patched)
    assert row(patched).reason == "right under gradient checkpointing, where stock loses the prefix or crashes"
    # Two forwards before a backward.
    first, second = (patched(**data).loss for data in (inputs, left_padded(inputs)))
    patched.zero_grad()
    (first + second).backward()
    stock.zero_grad()
    (stock(**inputs).loss + stock(**left_padded(inputs)).loss).backward()
    for a, b in zip(patched.prompt_encoder.parameters(), stock.prompt_encoder.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_that_change_before_a_checkpointed_backward(reentrant):
    stock = tuned("llama").train()
    stock.add_adapter("other", stock.peft_config["default"])
    fill(stock, "other", seed=4)
    stock.set_adapter("default")
    patched = patched_copy(stock)
    patched.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (stock, patched):
        model.get_base_model().enable_input_require_grads()
    loss = patched(**batch("llama")).loss
    patched.set_adapter("other")
    if reentrant:
        with pytest.raises(RuntimeError, match=r"^adapter 'default' ran this forward, but 'other' is active"):
            loss.backward()
        return
    for parameter in patched.prompt_encoder.parameters():
        parameter.requires_grad_(True)
    loss.backward()
    _, expected = step(stock, batch("llama"))
    torch.testing.assert_close(patched.prompt_encoder.default.embedding.weight.grad, next(iter(expected.values())))


@pytest.mark.parametrize("family", FEW)
def test_autocast_and_bf16(family):
    stock = tuned(family).train()
    patched = patched_copy(stock)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(stock, patched, batch(family), rtol=0.05, atol=2e-3)
    assert_fused(patched)
    stock = tuned(base=build(family).bfloat16(), family=family).train()
    patched = patched_copy(stock)
    assert_same_step(stock, patched, batch(family), rtol=0.05, atol=5e-3)
    assert_fused(patched)
    assert patched(**batch(family)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FEW)
def test_less_is_saved(family):
    base = build(family)
    stock = tuned(family, base=base, num_virtual_tokens=16).train()
    patched = patched_copy(stock)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (32, 16), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["labels"] = torch.arange(32) % 2 if family == "bert" else ids
    with peft_fast.backend("eager"):
        ours = saved_bytes(lambda: patched(**inputs).loss, patched.parameters())
    theirs = saved_bytes(lambda: stock(**inputs).loss, stock.parameters())
    # By what the copies of the prefix take: two layers, keys and values.
    heads = 2 if family == "llama" else 4
    assert theirs - ours >= 2 * 2 * 32 * heads * 16 * 8 * 4 * 0.9


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generate_is_stock(family):
    stock = tuned(family).eval()
    patched = patched_copy(stock)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    patched(input_ids=ids)
    theirs, ours = (
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options) for model in (stock, patched)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_compiled_calls_are_one_graph(family):
    """Of stock's, also behind a fused call."""
    stock = tuned(family).eval()
    patched = patched_copy(stock)
    patched(**batch(family))
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    inputs = batch(family)
    torch.testing.assert_close(compiled(**inputs).logits, stock(**inputs).logits)
    compiled(**inputs).loss.backward()
    _, expected = step(stock, inputs)
    for name, parameter in patched.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])
    torch._dynamo.reset()


def test_adapters_switch_and_are_disabled():
    stock = tuned("gpt2").eval()
    stock.add_adapter("other", PrefixTuningConfig(num_virtual_tokens=P + 2, task_type="CAUSAL_LM"))
    fill(stock, "other", seed=4)
    patched = patched_copy(stock)
    inputs = batch("gpt2")
    seen = []
    for name in ("other", "default"):
        for model in (stock, patched):
            model.set_adapter(name)
        seen.append(patched(**inputs).logits)
        torch.testing.assert_close(seen[-1], stock(**inputs).logits)
        assert_fused(patched)
    assert not torch.allclose(*seen)
    with patched.disable_adapter():
        assert torch.equal(patched(**inputs).logits, build("gpt2")(**inputs).logits)
        assert row(patched).reason == "forward is set on the instance (a disabled adapter?)"
    torch.testing.assert_close(patched(**inputs).logits, seen[-1])
    # peft leaves the method on the instance: it neither hides the patch nor outlives it.
    assert "forward" in vars(patched)
    assert_fused(patched)
    peft_fast.unpatch(patched)
    assert "forward" not in vars(patched)
    with patched.disable_adapter():
        peft_fast.patch(patched)
        peft_fast.unpatch(patched)
    peft_fast.patch(patched)
    assert_fused(patched)
    with patched.disable_adapter():
        peft_fast.unpatch(patched)
    assert torch.equal(patched(**inputs).logits, stock(**inputs).logits)


def test_everything_else_stays(tmp_path):
    stock = tuned("llama").eval()
    patched = copy.deepcopy(stock)
    before = patched(**batch("llama")).logits
    state, config = patched.state_dict(), patched.get_base_model().config.to_dict()
    report = peft_fast.patch(patched)
    assert str(report).splitlines()[0] == "peft_fast: 1 of 1 adapter layers fused"
    assert peft_fast.patch(patched) == report
    actual = patched(**batch("llama")).logits
    assert type(patched) is not type(stock)
    assert isinstance(patched, peft.PeftModelForCausalLM)
    assert str(patched) == str(stock)
    assert patched.state_dict().keys() == state.keys()
    assert patched.get_base_model().config.to_dict() == config
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in patched.modules())
    save(patched, tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(again(**batch("llama")).logits, before)
    memory = io.BytesIO()
    torch.save(patched, memory)
    memory.seek(0)
    for other in (
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        torch.load(memory, weights_only=False),
    ):
        assert_fused(other)
        assert torch.equal(other(**batch("llama")).logits, actual)
        peft_fast.unpatch(other)
        assert type(other) is type(stock)
        assert vars(other).keys() == vars(stock).keys()
        assert torch.equal(other(**batch("llama")).logits, before)
    peft_fast.unpatch(patched)
    assert row(patched).reason == "not patched: call peft_fast.patch"
    assert {module.config._attn_implementation for module in patched.modules() if hasattr(module, "config")} == {"sdpa"}


@pytest.mark.parametrize("family", ["t5", "bart", "mistral", "gemma2", "gemma3_text"])
def test_where_peft_is_wrong(family):
    stock = tuned(family).train()
    patched = copy.deepcopy(stock)
    report = peft_fast.patch(patched)
    assert "peft's prefix tuning is wrong in" in report.rows[0].reason
    assert "peft_fast.PrefixConfig" in report.rows[0].reason
    expected, gradients = step(stock, batch(family))
    actual, ours = step(patched, batch(family))
    assert torch.equal(actual["logits"], expected["logits"])
    assert all(torch.equal(ours[name], gradients[name]) for name in ours)
    with pytest.raises(ValueError, match=r"(?s)^model: with strict=True.*peft_fast.PrefixConfig"):
        peft_fast.patch(copy.deepcopy(stock), strict=True)
    peft_fast.unpatch(patched)
    assert type(patched) is type(stock)


@pytest.mark.parametrize("kind", ["DiffLlama", "JetMoe", "Doge"])
def test_modules_that_change_what_the_cache_returns(kind, monkeypatch):
    """Split and attended to twice, repeated, made a mask of. What the source does not say is found in the call."""
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**_DECODER, kv_channels=8, num_local_experts=4)
    stock = tuned(base=getattr(tf, f"{kind}ForCausalLM")(config), task="CAUSAL_LM").train()
    reasons = []
    for known in (True, False) if kind != "Doge" else (True,):
        if not known:
            monkeypatch.setattr(sys.modules["peft_fast.methods.prefix_patch"], "hands_on", lambda kind: True)
        patched = patched_copy(stock)
        for _ in range(2):
            expected, actual = step(stock, batch("llama")), step(patched, batch("llama"))
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            reasons.append(row(patched).reason)
    assert set(reasons[:2]) == {f"{kind}Attention does more with the keys and values of the cache than attend to them"}
    assert set(reasons[2:]) <= {"last call: the base model changes keys and values between its cache and attention"}


def test_what_runs_stock():
    model = tuned("gpt2").eval()
    peft_fast.patch(model)
    inputs = batch("gpt2")
    base, plain = model.get_base_model(), model(**inputs).logits
    base.set_attn_implementation("eager")
    assert model(**inputs, output_attentions=True).attentions[0].shape == (2, 4, 7, P + 7)
    assert row(model).reason == "last call: attention weights were asked for"
    torch.testing.assert_close(model(**inputs).logits, plain)
    assert_fused(model)
    handle = model.prompt_encoder.default.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(model(**inputs).logits, plain)
    assert row(model).reason == "the prompt encoder has hooks"
    handle.remove()
    base.config._attn_implementation_internal = "flash_attention_2"
    assert row(model).reason == "the attention implementation is 'flash_attention_2', not eager or sdpa"
    base.config._attn_implementation_internal = "sdpa"
    given = {}
    base.loss_function = lambda logits, labels, **kwargs: given.update(kwargs) or logits.sum()
    output = model(**inputs)
    assert torch.equal(output.loss, output.logits.sum())
    assert "vocab_size" in given
    assert "peft_fast_prefix" not in given
    assert row(model).reason.startswith("last call: a loss function of your own")
    del base._loss_function
    # A base model that keeps its keyword arguments to itself.
    attention = base.transformer.h[1].attn
    forward = attention.forward
    attention.forward = lambda *args, peft_fast_prefix=None, **kwargs: forward(*args, **kwargs)
    torch.testing.assert_close(model(**inputs).logits, plain)
    reason = "last call: the base model did not hand the prefix on to its attention modules"
    assert row(model).reason == reason
    torch.testing.assert_close(model(**inputs).logits, plain)
    assert row(model).reason == reason
    peft_fast.unpatch(model)
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    refused = peft_fast.patch(tuned("distilbert", **sizes)).rows[0].reason
    assert refused.startswith("peft's prefix tuning refuses DistilBertForSequenceClassification: train a ")


def test_mask_sizes_of_lengths_and_of_positions():
    """transformers 5.0 gives the positions of the queries, later ones their number."""
    layer = _HeldLayer(*torch.zeros(2, 1, 2, P, 8), batch_size=2)
    assert layer.get_mask_sizes(7) == layer.get_mask_sizes(P + torch.arange(7)) == (7, P)

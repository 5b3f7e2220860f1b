"""Patched models do what stock peft does, and everything else of theirs stays as it was."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

import peft_fast
from models import (
    Watching,
    assert_same_step,
    batch,
    bert,
    fill_lora_b,
    lora_layers,
    lora_model,
    loss_and_gradients,
    patched_copy,
    states,
)
from peft_fast import support
from peft_fast.testing import saved_bytes


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_same_loss_and_gradients(name):
    # gpt2 has Conv1D layers, bert biases, llama neither.
    stock = lora_model(name)
    patched = patched_copy(stock)
    assert states(patched) == {"fused"}
    assert_same_step(stock, patched, batch(name))


@pytest.mark.parametrize(
    "config",
    [{"use_rslora": True}, {"lora_alpha": 3, "r": 7}, {"rank_pattern": {"query": 1}, "alpha_pattern": {"key": 5}}],
    ids=["rslora", "odd-scaling", "patterns"],
)
def test_configurations_that_run_fused(config):
    stock = lora_model(**config)
    patched = patched_copy(stock)
    assert states(patched) == {"fused"}
    assert_same_step(stock, patched, batch())


def test_fused_layers_do_call_the_op(monkeypatch):
    calls = []
    apply = peft_fast.ops.lora_linear
    module = __import__("sys").modules["peft_fast.patch"]
    apply = module.apply_lora_linear
    monkeypatch.setattr(module, "apply_lora_linear", lambda *args: calls.append(1) or apply(*args))
    model = patched_copy(lora_model())
    model(**batch())
    assert len(calls) == len(lora_layers(model)) == 12


@pytest.fixture
def calls_may_be_small(small_lora_calls_are_fused, monkeypatch):
    monkeypatch.setattr(support, "MIN_CPU_ELEMENTS", 1 << 17)
    monkeypatch.setattr(support, "MIN_CPU_DROPOUT_ELEMENTS", 1 << 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16-fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.usefixtures("calls_may_be_small")
def test_small_calls_compute_what_stock_does_to_the_bit(name, dropout_p, dtype):
    """With stock's own random numbers."""
    stock = lora_model(name, base=None, dtype=dtype, lora_dropout=dropout_p)
    patched = patched_copy(stock)
    results = []
    for model in (stock, patched):
        torch.manual_seed(5)
        results.append(loss_and_gradients(model, batch(name)))
    expected, actual = results
    assert states(patched) == {"fused"}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize("how", ["plain", "saved", "reentrant", "watched", "watched reentrant", "autocast"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.usefixtures("calls_may_be_small")
def test_small_calls_under_checkpointing_watched_and_in_autocast(dropout_p, how):
    """A forward that somebody watches and its repetition in backward, which nobody does, are the same calls."""
    stock = lora_layers(lora_model(lora_dropout=dropout_p))[0]
    patched = patched_copy(stock)
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for layer in (stock, patched):
        torch.manual_seed(5)
        with contextlib.ExitStack() as stack:
            if how.startswith("watched"):
                stack.enter_context(Watching())
            if how == "autocast":
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            if how in ("plain", "autocast"):
                y = layer(x)
            else:
                y = checkpoint(layer, x, use_reentrant=how.endswith("reentrant"))
        y.square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([y.detach(), x.grad, *gradients])
        x.grad = None
    assert len(results[0]) == 4
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed sizes", "any sizes"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.usefixtures("calls_may_be_small")
def test_small_calls_compiled(dropout_p, dynamic):
    """Stock's calls, which a compiler fuses; ours without dropout, if else a size would guard the graph."""
    graphs = []

    def record(graph, inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    layer = patched_copy(lora_layers(lora_model(lora_dropout=dropout_p))[0])
    compiled = torch.compile(layer, fullgraph=True, backend=record, dynamic=dynamic)
    x = torch.randn(16, 32)
    torch.manual_seed(5)
    y = compiled(x)
    torch.manual_seed(5)
    ours = dynamic and not dropout_p
    assert torch.equal(y, layer(x)) or ours
    assert ("dropout" in graphs[0]) == bool(dropout_p)
    assert ("peft_fast" in graphs[0]) == ours
    if dynamic:
        compiled(torch.randn(4096 if not dropout_p else 17, 32))
        assert len(graphs) == 1
    else:
        compiled(torch.randn(8192, 32))
        assert len(graphs) == 2
        assert "peft_fast" in graphs[1]


@pytest.mark.parametrize(
    ("rows", "dropout_p", "compiler", "small"),
    [
        (511, 0.0, True, True),
        (512, 0.0, False, False),
        (127, 0.5, True, True),
        (128, 0.5, True, False),
        (255, 0.5, False, True),
        (256, 0.5, False, False),
    ],
)
def test_which_calls_are_small(rows, dropout_p, compiler, small, monkeypatch):
    """By the larger activation without dropout, which is y here; by x with it, and by whether numpy draws the mask."""
    monkeypatch.setattr(support, "MIN_CPU_ELEMENTS", 1 << 15)
    monkeypatch.setattr(support, "MIN_CPU_DROPOUT_ELEMENTS", 1 << 12)
    monkeypatch.setattr(support, "MIN_CPU_NUMPY_ELEMENTS", 1 << 13)
    if not compiler:
        monkeypatch.setattr(support.dropout_native, "library", lambda: None)
    model = lora_model(lora_dropout=dropout_p)
    layer = next(layer for layer in lora_layers(patched_copy(model)) if layer.out_features == 64)
    assert layer.in_features == 32
    called, own = [], peft_fast.eager.lora_fwd
    monkeypatch.setattr(peft_fast.eager, "lora_fwd", lambda *args, **names: called.append(1) or own(*args, **names))
    layer(torch.randn(rows, 32))
    assert bool(called) is not small
    with peft_fast.backend("eager"):
        called.clear()
        layer(torch.randn(rows, 32))
        assert called


def test_dropout_acts_in_training_alone_and_differs_between_layers():
    with peft_fast.backend("eager"):
        model = patched_copy(lora_model(lora_dropout=0.5))
        inputs = batch()
        torch.manual_seed(3)
        first, second = model(**inputs).logits, model(**inputs).logits
        torch.manual_seed(3)
        assert torch.equal(model(**inputs).logits, first)
        assert not torch.equal(first, second)
        model.eval()
        stock = lora_model(lora_dropout=0.5).eval()
        assert torch.allclose(model(**inputs).logits, stock(**inputs).logits, atol=1e-6)
        # Two layers with the same parameters and input draw different masks.
        layer = lora_layers(model.train())[0]
        x = torch.randn(64, 32)
        assert not torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_dropout_keeps_the_expectation():
    with peft_fast.backend("eager"):
        stock = lora_model(lora_dropout=0.3)
        layer = lora_layers(patched_copy(stock))[0]
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
        mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
        layer.eval()
        spread = (layer(x) - layer.base_layer(x)).abs().max()
        assert (mean - layer(x)).abs().max() < 0.1 * spread


@pytest.mark.parametrize(("dropout_p", "bar"), [(0.1, 0.72), (0.0, 0.62)], ids=["as shipped", "no dropout of its own"])
def test_bytes_saved_by_a_step_of_an_encoder(dropout_p, bar):
    """all-MiniLM-L6-v2 with half of its layers and no vocabulary, 32 texts of 48 tokens."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=12,
        hidden_dropout_prob=dropout_p,
        attention_probs_dropout_prob=dropout_p,
    )
    stock = lora_model(base=BertForSequenceClassification(config), r=8, lora_dropout=0.1)
    ids = torch.ones(32, 48, dtype=torch.int64)
    step = {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(32, dtype=torch.int64)}

    def saved(model):
        return saved_bytes(lambda: model(**step).loss, (*model.parameters(), *model.buffers()))

    assert saved(patched_copy(stock)) <= bar * saved(stock)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing(use_reentrant):
    with peft_fast.backend("eager"):
        model = patched_copy(lora_model(lora_dropout=0.5))
        torch.manual_seed(6)
        plain = loss_and_gradients(model, batch())
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(6)
        checkpointed = loss_and_gradients(model, batch())
    for name, value in plain.items():
        assert torch.equal(checkpointed[name], value), name


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_fp32_adapters_over_a_bf16_base(autocast):
    stock = lora_model("llama", dtype=torch.bfloat16)
    assert {p.dtype for p in stock.parameters() if p.requires_grad} == {torch.float32}
    patched = patched_copy(stock)
    inputs = batch("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if not autocast:
            assert_same_step(stock, patched, inputs)
        expected = loss_and_gradients(stock, inputs)
        with peft_fast.backend("eager"):
            actual = loss_and_gradients(patched, inputs)
    assert states(patched) == {"fused"}
    assert {name: value.dtype for name, value in actual.items()} == {n: v.dtype for n, v in expected.items()}
    assert torch.allclose(actual["loss"], expected["loss"], rtol=2e-2)


# Stock's skinny products run in bf16 too, and ours in fp32: without dropout, which is what stock is slow at, a step of
# a layer of 768 by 768 took a third longer. An explicit choice never falls back.
@pytest.mark.parametrize("factors", ["autocast", "bf16"])
@pytest.mark.parametrize(
    ("p", "backend", "state"), [(0.0, "auto", "stock"), (0.1, "auto", "fused"), (0.0, "eager", "fused")]
)
def test_bf16_factors_on_the_cpu(p, backend, state, factors):
    model = lora_model("llama", lora_dropout=p)
    if factors == "bf16":
        model.to(torch.bfloat16)
    peft_fast.patch(model)
    ids = {name: value.repeat(64, 1) for name, value in batch("llama").items()}  # enough to gain with dropout
    with peft_fast.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=factors == "autocast"):
        model(**ids)
    assert states(model) == {state}


def test_fp16_autocast_with_a_grad_scaler():
    losses = {}
    for name, model in (("stock", lora_model()), ("patched", patched_copy(lora_model()))):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        losses[name] = []
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(**batch()).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["patched"] == pytest.approx(losses["stock"], rel=5e-3)
    assert losses["patched"][-1] < losses["patched"][0]


def test_trainable_bias_and_saved_modules_get_the_gradients_of_stock():
    # Not the keys: the gradient of their bias is zero but for rounding.
    targets = r".*encoder.*(query|value|dense)"
    config = {"bias": "lora_only", "modules_to_save": ["classifier"], "target_modules": targets}
    stock = lora_model(**config)
    patched = patched_copy(stock)
    assert states(patched) == {"fused"}
    assert_same_step(stock, patched, batch())


def test_frozen_lora_a():
    stock = lora_model()
    for layer in lora_layers(stock):
        layer.lora_A["default"].weight.requires_grad_(False)
    assert_same_step(stock, patched_copy(stock), batch())


def test_create_graph():
    stock = lora_model()
    patched = patched_copy(stock)
    results = []
    for model in (stock, patched):
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the only one with second derivatives
            grads = torch.autograd.grad(model(**batch()).loss, parameters, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(penalty, parameters))
    for expected, actual in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(mode):
    stock = lora_model("llama").eval()
    patched = patched_copy(stock)
    with mode():
        assert torch.allclose(patched(**batch("llama")).logits, stock(**batch("llama")).logits, atol=1e-6)
        prompt = {name: value for name, value in batch("llama").items() if name != "labels"}
        tokens = [
            model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0) for model in (stock, patched)
        ]
    assert torch.equal(*tokens)


def test_fake_tensor_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = patched_copy(lora_model())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {name: mode.from_tensor(value) for name, value in batch().items()}
        assert model(**inputs).logits.shape == (4, 2)


class TestAdaptersAfterPatching:
    def test_set_adapter(self):
        stock, patched = lora_model(), patched_copy(lora_model())
        for model in (stock, patched):
            torch.manual_seed(8)
            model.add_adapter("second", LoraConfig(r=2, lora_alpha=1, target_modules=r".*encoder.*(query|dense)"))
            fill_lora_b(model)
            model.set_adapter("second")
        assert_same_step(stock, patched, batch())
        reasons = {row.name: row.reason for row in peft_fast.report(patched).rows}
        assert any(reason == "0 adapters are active" for name, reason in reasons.items() if name.endswith("key"))
        assert all(not reason for name, reason in reasons.items() if name.endswith("query"))

    def test_layers_of_an_added_adapter_say_that_they_are_not_patched(self):
        model = lora_model(target_modules=["query"])
        peft_fast.patch(model)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["value"]))
        model.set_adapter("second")
        reasons = {row.name: row.reason for row in peft_fast.report(model).rows}
        assert all("not patched" in reason for name, reason in reasons.items() if name.endswith("value"))
        peft_fast.patch(model)
        reasons = {row.name: row.reason for row in peft_fast.report(model).rows}
        assert not any("not patched" in reason for reason in reasons.values())

    def test_scale_layer(self):
        stock, patched = lora_model(), patched_copy(lora_model())
        for model in (stock, patched):
            for layer in lora_layers(model):
                layer.scale_layer(0.3)
        assert_same_step(stock, patched, batch())


class TestNothingElseChanges:
    def test_state_classes_and_print(self):
        stock = lora_model()
        patched = patched_copy(stock)
        assert list(patched.state_dict()) == list(stock.state_dict())
        assert [name for name, _ in patched.named_modules()] == [name for name, _ in stock.named_modules()]
        assert len(lora_layers(patched)) == len(lora_layers(stock))
        assert repr(patched) == repr(stock)

    def test_unpatch_is_exact(self):
        model = lora_model()
        classes = [type(module) for module in model.modules()]
        instances = [dict(module.__dict__) for module in lora_layers(model)]
        peft_fast.patch(model)
        with model.disable_adapter():
            model(**batch())
        peft_fast.unpatch(model)
        assert [type(module) for module in model.modules()] == classes
        assert all(
            module.__dict__.keys() == before.keys() and all(module.__dict__[k] is before[k] for k in before)
            for module, before in zip(lora_layers(model), instances, strict=True)
        )

    def test_save_and_load_into_a_stock_model(self, tmp_path):
        patched = patched_copy(lora_model(modules_to_save=["classifier"]))
        patched.save_pretrained(tmp_path)
        torch.manual_seed(0)
        stock = PeftModel.from_pretrained(bert(), tmp_path)
        assert {type(layer) for layer in lora_layers(stock)} == {lora.Linear}
        assert torch.allclose(stock.eval()(**batch()).logits, patched.eval()(**batch()).logits, atol=1e-6)

    def test_merge_and_unload(self):
        stock = lora_model()
        merged = patched_copy(stock).merge_and_unload()
        assert not lora_layers(merged)
        expected = stock.merge_and_unload()
        assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), expected.parameters(), strict=True))

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies_stay_patched(self, how):
        model = patched_copy(lora_model())
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        assert states(copied) == {"fused"}
        assert torch.equal(copied(**batch()).logits, model(**batch()).logits)


class TestReport:
    def test_patch_twice_is_patch_once(self):
        model = lora_model()
        assert peft_fast.patch(model) == peft_fast.patch(model)

    def test_before_patching(self):
        rows = peft_fast.report(lora_model()).rows
        assert {(row.op, row.state, row.reason) for row in rows} == {
            ("lora_linear", "stock", "not patched: call peft_fast.patch")
        }

    def test_table(self):
        lines = str(peft_fast.patch(lora_model(lora_bias=True))).splitlines()
        assert lines[0] == "peft_fast: 0 of 12 adapter layers fused"
        assert lines[1].split() == ["module", "op", "runs", "reason"]
        assert lines[2].endswith("lora_linear  stock  lora_bias is not fused")

    def test_layers_without_an_op_are_named(self):
        model = lora_model(target_modules=["query", "word_embeddings"])
        rows = peft_fast.patch(model).rows
        assert "no fused op for peft.tuners.lora.layer.Embedding" in {row.reason for row in rows}

    def test_no_model(self):
        with pytest.raises(ValueError, match="model: expected what get_peft_model returned, got str"):
            peft_fast.patch("bert")

    def test_nothing_to_patch(self):
        with pytest.raises(ValueError, match=r"BertForSequenceClassification has no LoRA layer.*get_peft_model first"):
            peft_fast.patch(bert())
        peft_fast.unpatch(bert())

    def test_a_model_without_adapters_says_so(self):
        assert str(peft_fast.report(torch.nn.Linear(2, 2))) == "peft_fast: no adapter layers"

    def test_a_call_that_ran_stock_is_reported_until_one_that_did_not(self):
        model = patched_copy(lora_model(lora_dropout=0.1))
        layer = lora_layers(model)[0]
        layer(torch.randn(4, 32), adapter_names=["default"] * 4)
        assert peft_fast.report(model).rows[0].reason == "last call: it had more arguments"
        layer(torch.randn(4, 32))
        assert peft_fast.report(model).rows[0].state == "fused"

    def test_strict_leaves_the_model_untouched(self):
        model = lora_model(use_dora=True)
        with pytest.raises(ValueError, match=r"strict=True.*[\s\S]*DoraLinearVariant"):
            peft_fast.patch(model, strict=True)
        assert {type(layer) for layer in lora_layers(model)} == {lora.Linear}
        peft_fast.patch(lora_model(), strict=True)

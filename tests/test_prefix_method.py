"""Prefix tuning as a peft method, on a small model of every family: against the truth, and as a peft method."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, TASKS, batch, build
from peft import PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from prefix_models import (
    P,
    assert_same,
    attention_modules,
    data,
    fill,
    logits,
    prefix_layers,
    prefixed,
    save,
    step,
    truth,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from peft_fast import PrefixConfig
from peft_fast.methods import PrefixLayer
from peft_fast.methods.prefix_interface import CHILD, NAMES

pytestmark = pytest.mark.usefixtures("one_thread")
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gated"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_outputs_and_gradients_are_the_truth(family, gate, implementation):
    """Trap: half of the parameters dead, layers that share a prefix, an encoder and cross-attention without one.

    Each parameter's gradient is that of its own leaf in the truth, so a dead or shared one would show.
    """
    base = build(family).double()
    base.set_attn_implementation(implementation if family != "gemma2" else "eager")
    model = prefixed(family, base=copy.deepcopy(base), gate=gate)
    names = list(attention_modules(base))
    prefixes = {}
    for name in names:
        layer = getattr(model.base_model.model.get_submodule(name), CHILD)
        parameters = [layer.prefix_key, layer.prefix_value] + [layer.prefix_gate] * gate
        prefixes[name] = [values["default"].detach().clone().requires_grad_() for values in parameters]
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in data(family).items()}
    expected = truth(base, prefixes)(**inputs).logits
    actual = model(**inputs).logits
    torch.testing.assert_close(actual, expected)
    dy = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(3))
    expected.backward(dy)
    actual.backward(dy)
    for name in names:
        layer = getattr(model.base_model.model.get_submodule(name), CHILD)
        assert prefixes[name][0].shape[1] == P
        for parameter, leaf in zip(layer.parameters(), prefixes[name], strict=True):
            assert leaf.grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, leaf.grad)


@each_family
def test_every_prefix_gets_a_gradient_and_none_is_shared(family):
    model = prefixed(family, prefix_dropout=0.1, reparametrization=True, reparametrization_size=8)
    _, gradients = step(model, family)
    assert gradients
    assert all(".prefix_" in name for name in gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    storages = [p.data_ptr() for layer in prefix_layers(model) for p in layer.parameters()]
    assert len(set(storages)) == len(storages)
    assert len(prefix_layers(model)) == len(attention_modules(model))


def test_batches_of_several_adapters_are_refused():
    model = prefixed("bert").eval()
    with pytest.raises(ValueError, match=r"adapter_names: PrefixModel has no batches of several.*set_adapter"):
        model(**batch("bert"), adapter_names=["default"] * 4)


@each_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_disabled_deleted_or_unloaded_is_the_base_model(family, implementation):
    """Trap: `disable_adapter()` on classification heads raised UnboundLocalError. Here: bit for bit the base model."""
    base = build(family).requires_grad_(False)
    base.set_attn_implementation(implementation if family != "gemma2" else "eager")
    implementations = {id(m.config): m.config._attn_implementation for m in base.modules() if hasattr(m, "config")}
    keys, expected = set(base.state_dict()), logits(base, family)
    model = prefixed(family, base=base, task_type=TASKS[family])
    assert not torch.allclose(logits(model, family), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), expected)
    assert {m.config._attn_implementation for m in attention_modules(model).values()} <= {"sdpa", NAMES["eager"]}
    assert model.unload() is base
    assert torch.equal(logits(base, family), expected)
    assert set(base.state_dict()) == keys
    assert not prefix_layers(base)
    assert not any(module._forward_pre_hooks for module in base.modules())
    for module in base.modules():
        if hasattr(module, "config"):
            assert module.config._attn_implementation == implementations[id(module.config)]


def test_the_attention_implementation_may_be_chosen_later():
    """What the model is told stays in force behind the prefix and after it."""
    model = prefixed("llama")
    expected = logits(model, "llama")
    base = model.base_model.model
    base.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, "llama"), expected)
    assert base.config._attn_implementation == NAMES["eager"]
    with model.disable_adapter(), torch.no_grad():
        eager = model(**data("llama"), output_attentions=True)
    assert len(eager.attentions) == 2
    base.set_attn_implementation("sdpa")
    model.generate(**data("llama"), max_new_tokens=1)
    assert base.config._attn_implementation == "sdpa"
    base.set_attn_implementation("eager")
    model.unload()
    assert base.config._attn_implementation == "eager"


def test_other_implementations_are_served_as_sdpa():
    base = build("llama")
    base.set_attn_implementation("flex_attention")
    model = prefixed("llama", base=base)
    assert torch.equal(logits(model, "llama"), logits(prefixed("llama"), "llama"))
    assert model.unload().config._attn_implementation == "flex_attention"


def test_no_attention_weights_behind_a_prefix():
    base = build("bert")
    base.set_attn_implementation("eager")
    with torch.no_grad():
        assert prefixed(base=base)(**data("bert"), output_attentions=True).attentions == ()


def test_gpt2_with_its_own_eager_attention():
    config = GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=1,
        n_head=4,
        reorder_and_upcast_attn=True,
        scale_attn_by_inverse_layer_idx=True,
    )
    base = GPT2LMHeadModel._from_config(config, attn_implementation="eager").bfloat16()
    expected = logits(base, "llama")
    with prefixed(base=base).disable_adapter():
        assert torch.equal(logits(base, "llama"), expected)


@each_family
def test_saved_loaded_and_resumed(family, tmp_path):
    """Trap: resuming training was refused. Here: the same logits, and the same gradients of the next step."""
    model = prefixed(family, gate=True, task_type=TASKS[family])
    expected, gradients = logits(model, family), step(model, family)[1]
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, family), expected)
    assert_same(step(loaded, family)[1], gradients)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, PrefixConfig)
    assert config.peft_type == PeftType("PREFIX") == "PREFIX"


@each_family
def test_several_adapters(family):
    """One at a time, or side by side: two prefixes are one of both lengths."""
    model = prefixed(family)
    with model.disable_adapter():
        base = logits(model, family)
    first = logits(model, family)
    model.add_adapter("second", PrefixConfig(num_virtual_tokens=2))
    fill(model, "second", seed=3)
    assert torch.equal(logits(model, family), first)
    model.set_adapter("second")
    second = logits(model, family)
    assert all(".second" in name for name in step(model, family)[1])
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, family)
    outputs = [base, first, second, both]
    assert not any(torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    joined = prefixed(family, num_virtual_tokens=P + 2)
    with torch.no_grad():
        for layer, pair in zip(prefix_layers(joined), prefix_layers(model), strict=True):
            for name in ("prefix_key", "prefix_value"):
                rows = [getattr(pair, name)[adapter] for adapter in ("default", "second")]
                getattr(layer, name)["default"].copy_(torch.cat(rows, 1))
    assert torch.equal(logits(joined, family), both)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model, family), second)
    model.delete_adapter("second")
    assert torch.equal(logits(model.base_model.model, family), base)
    assert not prefix_layers(model)
    assert not {m.config._attn_implementation for m in attention_modules(model).values()} & set(NAMES.values())


def test_an_adapter_on_other_modules_changes_those_alone():
    model = prefixed("bart", targets="encoder")
    first = logits(model, "bart")
    model.add_adapter("second", PrefixConfig(num_virtual_tokens=2, targets=["cross"]))
    fill(model, "second", seed=3)
    assert torch.equal(logits(model, "bart"), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert len(prefix_layers(model)) == 2
    assert all("encoder_attn" in name for name, m in model.named_modules() if isinstance(m, PrefixLayer))


def test_one_of_several_adapters_is_saved_alone(tmp_path):
    model = prefixed("llama")
    model.add_adapter("second", PrefixConfig(num_virtual_tokens=5))
    fill(model, "second", seed=3)
    model.set_adapter("second")
    expected = logits(model, "llama")
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "second")
    assert torch.equal(logits(loaded, "llama"), expected)


@pytest.mark.parametrize("config", [{}, {"gate": True}, {"reparametrization": True}, {"layers": "input"}])
def test_saved_under_one_name_and_loaded_under_another(config, tmp_path):
    """Trap: tensors whose saved names do not fit the new adapter's were left as they were drawn, without a word."""
    model = get_peft_model(build("llama"), PrefixConfig(num_virtual_tokens=P, **config), adapter_name="first")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    expected = logits(model, "llama")
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "first", adapter_name="second")
    assert torch.equal(logits(loaded, "llama"), expected)
    assert not loaded.load_adapter(tmp_path / "first", adapter_name="third").unexpected_keys
    loaded.set_adapter("third")
    assert torch.equal(logits(loaded, "llama"), expected)


def test_gated_prefixes_stand_alone():
    model = prefixed("bert", gate=True)
    model.add_adapter("second", PrefixConfig(num_virtual_tokens=2))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"gate: a gated prefix cannot be active together with others"):
        logits(model)


@each_family
def test_a_new_gate_is_the_base_model(family):
    base = build(family)
    expected = logits(base, family)
    model = get_peft_model(base, PrefixConfig(gate=True))
    torch.testing.assert_close(logits(model, family), expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dropout_in_training_only(family):
    model, without = (prefixed(family, prefix_dropout=p) for p in (0.5, 0.0))
    assert torch.equal(logits(model, family), logits(without, family))
    first, second = step(model, family, seed=5)[0], step(model, family, seed=6)[0]
    assert not torch.allclose(first, second)
    assert torch.equal(step(model, family, seed=5)[0], first)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])  # which has no checkpointing
def test_gradient_checkpointing(family, reentrant):
    """Trap: checkpointing dropped the prefix of encoders, or crashed. Here: the same logits and gradients."""
    model = prefixed(family, prefix_dropout=0.3)
    expected = step(model, family)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = step(model, family)
    assert all(gradient is not None for gradient in recomputed[1].values())
    torch.testing.assert_close(recomputed, expected)


@each_family
def test_bf16_base_with_fp32_prefixes(family):
    model = prefixed(family, base=build(family).to(torch.bfloat16))
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(family).items()}
    output = model.train()(**inputs)
    output.loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert output.logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trainable)


@each_family
def test_autocast(family):
    """Near what fp32 gives, and with gradients of the parameters' dtype."""
    model = prefixed(family)
    expected = logits(model, family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(**data(family)).logits
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()
    actual.sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_prefixes_in_the_base_dtype():
    model = get_peft_model(build("bert").to(torch.bfloat16), PrefixConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_compiles_as_one_graph(family):
    model = prefixed(family)
    model.base_model.model.loss_type = "ForCausalLM"  # named, since guessing it logs, which no graph can hold
    inputs = data(family)
    expected = model(**inputs).logits
    expected.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected)
    compiled(**inputs).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name])


@each_family
def test_deepcopy_and_pickle_are_independent(family):
    model = prefixed(family)
    expected = logits(model, family)
    clone = copy.deepcopy(model)
    fill(model, seed=3)
    assert torch.equal(logits(clone, family), expected)
    assert not torch.equal(logits(model, family), expected)
    loaded = pickle.loads(pickle.dumps(clone))
    clone.unload()
    assert torch.equal(logits(loaded, family), expected)
    loaded.unload()
    assert not {m.config._attn_implementation for m in attention_modules(loaded).values()} & set(NAMES.values())


def test_modules_to_save_and_task_head(tmp_path):
    model = prefixed("bert", task_type="SEQ_CLS", modules_to_save=["pooler"])
    _, gradients = step(model)
    assert any("classifier.modules_to_save" in name for name in gradients)
    assert any("pooler.modules_to_save" in name for name in gradients)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert_same(step(loaded)[1], step(model)[1])


def test_trainer(tmp_path):
    model = get_peft_model(build("bert"), PrefixConfig(num_virtual_tokens=P, task_type="SEQ_CLS"))
    before = logits(model)
    examples = [{name: value[i] for name, value in batch("bert").items()} for i in (0, 1)]
    args = TrainingArguments(tmp_path, num_train_epochs=3, learning_rate=0.05, report_to=[], use_cpu=True)
    Trainer(model, args, train_dataset=examples).train()
    assert not torch.allclose(logits(model), before)


def test_fresh_process_loads_a_saved_prefix_and_a_pickled_model(tmp_path):
    model = prefixed("bert")
    save(model, tmp_path)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import pickle, sys, torch
sys.path.insert(0, "tests")
unpickled = pickle.load(open({str(tmp_path / "model.pickle")!r}, "rb")).eval()
from families import batch, build
from peft import PeftModel
model = PeftModel.from_pretrained(build("bert"), {str(tmp_path)!r}).eval()
for model in model, unpickled:
    assert torch.equal(model(**batch("bert")).logits, torch.load({str(tmp_path / "logits.pt")!r}))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_loading_onto_the_meta_device_first(tmp_path):
    model = prefixed("bert", gate=True)
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("options", [{}, {"layers": "input"}], ids=str)
def test_merging_is_refused_and_casts_may_be_disabled(options):
    model = prefixed("bert", **options)
    (layer, *_) = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    model.unmerge_adapter()
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)


def test_print_trainable_parameters(capsys):
    prefixed("llama").print_trainable_parameters()
    assert f"trainable params: {2 * 2 * 2 * P * 8:,}" in capsys.readouterr().out

"""Bottleneck adapters as a peft method, on a small model of every family in the table of targets."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from adapted import adapted, assert_same, bottleneck_layers, fill, logits, step
from families import FAMILIES, TASKS, batch, build
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from peft_fast import BottleneckConfig, methods
from peft_fast.methods import bottleneck
from peft_fast.methods._register import register_method

pytestmark = pytest.mark.usefixtures("one_thread")

STYLES = ("houlsby", "pfeiffer", "parallel")
# One style for each family where all of them would take long: every style meets models that normalize first and last.
STYLE_OF = {family: STYLES[i % 3] for i, family in enumerate(FAMILIES)}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_style = pytest.mark.parametrize("style", STYLES)


@each_family
@each_style
def test_zero_up_starts_as_the_base_model(family, style):
    base = build(family)
    before = logits(base, family)
    torch.manual_seed(5)
    in_training = base.train()(**batch(family)).logits.detach()
    model = adapted(family, style, base=base, zero=True)
    assert torch.equal(logits(model, family), before)
    assert torch.equal(step(model, family)[0], in_training)


@each_family
@each_style
def test_every_trainable_parameter_gets_a_gradient(family, style):
    model = adapted(family, style, scaling="learned", norm_before=True, norm_after=True, dropout=0.1)
    _, gradients = step(model, family)
    assert gradients
    assert all("bottleneck_" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@each_family
@each_style
def test_places(family, style, monkeypatch):
    """What an adapter reads and adds to, against the base model's own tensors, which adapters of zero do not change.

    Inputs and outputs are those of the projections to and from the feed-forward's width. Pfeiffer's adapter reads what
    the layer returns, in models that normalize first or last.
    """
    calls = []
    op = bottleneck.apply_bottleneck_adapter

    def recorded(x, residual, *args):
        calls.append((x, residual))
        return op(x, residual, *args)

    monkeypatch.setattr(bottleneck, "apply_bottleneck_adapter", recorded)
    model = adapted(family, style, zero=True)
    wide, outputs, inputs, layers = (64, 48), [], [], []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and "bottleneck_" not in name:
            shape = module.weight.shape if isinstance(module, Conv1D) else module.weight.T.shape
            if shape[0] in wide and shape[1] == 32:
                module.register_forward_hook(lambda m, args, y: outputs.append(y))
            if shape[0] == 32 and shape[1] in (*wide, 128) and "up_proj" not in name:
                module.register_forward_hook(lambda m, args, y: inputs.append(args[0]))
        if re.search(r"(?<!block\.\d)\.(layers?|h|block|albert_layers)\.\d$", name):
            module.register_forward_hook(lambda m, args, y: layers.append(y[0] if isinstance(y, tuple) else y))
    logits(model, family)
    count = len(outputs)
    assert count == len(inputs)
    assert len(calls) == (2 * count if style == "houlsby" else count)
    feed_forward = calls[1::2] if style == "houlsby" else calls
    branch_is_normalized = family in ("gemma2", "gemma3_text")
    for i, (x, residual) in enumerate(feed_forward):
        if style == "pfeiffer":
            assert torch.equal(x.flatten(), layers[i].flatten())
        if style == "parallel":
            assert torch.equal(x, inputs[i])
        if style == "houlsby":
            assert x is residual
        if style == "parallel" or (style == "houlsby" and not branch_is_normalized):
            assert torch.equal(residual, outputs[i])


@each_family
@each_style
def test_saved_loaded_and_resumed(family, style, tmp_path):
    """The same logits, and the same gradients of the next step."""
    model = adapted(family, style, activation="gelu", scaling="learned", norm_before=True, task_type=TASKS[family])
    expected, gradients = logits(model, family), step(model, family)[1]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, family), expected)
    assert_same(step(loaded, family)[1], gradients)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, BottleneckConfig)
    assert config.peft_type == PeftType("BOTTLENECK") == "BOTTLENECK"


@each_style
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_changes_nothing(family, style):
    model = adapted(family, style).eval()
    ids, mask = (batch(family)[name] for name in ("input_ids", "attention_mask"))
    length = int(mask[0].sum())
    padded = model(input_ids=ids, attention_mask=mask).logits[0]
    alone = model(input_ids=ids[:1, :length]).logits[0]
    torch.testing.assert_close(padded if family == "bert" else padded[:length], alone)


def test_dropout_in_training_only():
    model, without = (adapted("bert", "houlsby", dropout=p) for p in (0.5, 0.0))
    assert torch.equal(logits(model), logits(without))
    first, second = step(model, seed=5)[0], step(model, seed=6)[0]
    assert not torch.allclose(first, second)
    assert torch.equal(step(model, seed=5)[0], first)


@each_family
def test_several_adapters(family):
    style, other = STYLE_OF[family], STYLES[(STYLES.index(STYLE_OF[family]) + 1) % 3]
    model = adapted(family, style)
    with model.disable_adapter():
        base = logits(model, family)
    first = logits(model, family)
    model.add_adapter("second", BottleneckConfig(style=other, reduction_factor=8))
    fill(model, "second", seed=3)
    assert torch.equal(logits(model, family), first)
    model.set_adapter("second")
    second = logits(model, family)
    assert all(".second." in name for name in step(model, family)[1])
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, family)
    outputs = [base, first, second, both]
    assert not any(torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    with model.disable_adapter():
        assert torch.equal(logits(model, family), base)
    model.set_adapter("default")
    assert torch.equal(logits(model, family), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model, family), second)
    assert torch.equal(logits(model.unload(), family), base)


def test_one_of_several_adapters_is_saved_alone(tmp_path):
    model = adapted("llama", "pfeiffer")
    model.add_adapter("second", BottleneckConfig(style="houlsby"))
    fill(model, "second", seed=3)
    model.set_adapter("second")
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "second")
    assert torch.equal(logits(loaded, "llama"), expected)


@each_style
def test_saved_under_one_name_and_loaded_under_another(style, tmp_path):
    config = BottleneckConfig(style=style, scaling="learned", norm_before=True, norm_after=True)
    model = get_peft_model(build("llama"), config, adapter_name="first")
    fill(model, "first")
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "first", adapter_name="second")
    assert torch.equal(logits(loaded, "llama"), expected)
    assert not loaded.load_adapter(tmp_path / "first", adapter_name="third").unexpected_keys
    loaded.set_adapter("third")
    assert torch.equal(logits(loaded, "llama"), expected)


def test_active_adapters_are_applied_in_order():
    draw = torch.Generator().manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), BottleneckConfig(style="houlsby", target_modules=["0"]))
    model.add_adapter("second", BottleneckConfig(style="parallel", target_modules=["0"], scaling=4.0))
    (layer,) = bottleneck_layers(model)
    fill(model)
    fill(model, "second", seed=3)
    x = torch.randn(5, 6, generator=draw)
    y = layer.base_layer(x)
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        expected = y
        for name in names:
            down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
            read, scaling = (x, 4.0) if name == "second" else (expected, 1.0)
            expected = expected + scaling * up(down(read).relu())
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])  # which has no checkpointing
def test_gradient_checkpointing(family, reentrant):
    """The same gradients, with the model's dropout and the adapter's own, up to the order of their sums."""
    model = adapted(family, STYLE_OF[family], dropout=0.3)
    expected = step(model, family)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = step(model, family)
    assert torch.equal(recomputed[0], expected[0])
    torch.testing.assert_close(recomputed[1], expected[1])
    assert not any(
        source.take() is not None for layer in bottleneck_layers(model) for source in layer.bottleneck_source.values()
    )


@each_family
def test_bf16_base_with_fp32_adapters(family):
    model = adapted(family, STYLE_OF[family], base=build(family).to(torch.bfloat16), norm_before=True)
    data = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(family).items()}
    output = model.train()(**data)
    output.loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert output.logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trainable)


@each_family
def test_autocast(family):
    """Near what fp32 gives, and with gradients of the parameters' dtype."""
    model = adapted(family, STYLE_OF[family], norm_before=True, scaling=0.1)
    expected = logits(model, family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch(family))
    assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()
    output.loss.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_adapters_in_the_base_dtype():
    base = build("bert").to(torch.bfloat16)
    model = get_peft_model(base, BottleneckConfig(style="houlsby"), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    # Where part of the model computes in float32, the adapter follows.
    (layer, *_) = bottleneck_layers(model)
    assert layer(torch.randn(3, 32)).dtype == torch.float32


@pytest.mark.parametrize(("family", "style"), [("bert", "parallel"), ("llama", "pfeiffer"), ("gpt2", "houlsby")])
def test_compiles_as_one_graph(family, style):
    model = adapted(family, style)
    model.base_model.model.loss_type = "ForCausalLM"  # named, since guessing it logs, which no graph can hold
    data = {name: value for name, value in batch(family).items() if name == "input_ids"}
    expected = model(**data).logits
    expected.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**data).logits, expected)
    compiled(**data).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name])


@each_family
def test_deepcopy_is_independent(family):
    model = adapted(family, STYLE_OF[family])
    expected = logits(model, family)
    clone = copy.deepcopy(model)
    fill(model, seed=3)
    assert torch.equal(logits(clone, family), expected)
    assert not torch.equal(logits(model, family), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(clone)), family), expected)


@pytest.mark.parametrize("family", [family for family, task in TASKS.items() if task != "SEQ_CLS"])
def test_generation_is_the_teacher_forced_forward(family):
    model = adapted(family, STYLE_OF[family], task_type=TASKS[family]).eval()
    ids = batch(family)["input_ids"]
    generated = model.generate(
        input_ids=ids,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if TASKS[family] == "CAUSAL_LM":
        full = model(input_ids=generated.sequences).logits[:, -5:-1]
    else:
        full = model(input_ids=ids, decoder_input_ids=generated.sequences).logits[:, -5:-1]
    torch.testing.assert_close(torch.stack(generated.logits, 1), full, rtol=1e-3, atol=1e-4)


def test_modules_to_save_and_task_head(tmp_path):
    model = adapted("bert", "houlsby", task_type="SEQ_CLS", modules_to_save=["pooler"])
    _, gradients = step(model)
    assert any("classifier.modules_to_save" in name for name in gradients)
    assert any("pooler.modules_to_save" in name for name in gradients)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert_same(step(loaded)[1], step(model)[1])


def test_trainer(tmp_path):
    model = adapted("bert", "houlsby", zero=True, task_type="SEQ_CLS")
    before = logits(model)
    examples = [{name: value[i] for name, value in batch("bert").items()} for i in (0, 1)]
    args = TrainingArguments(tmp_path, num_train_epochs=3, learning_rate=0.05, report_to=[], use_cpu=True)
    Trainer(model, args, train_dataset=examples).train()
    assert not torch.allclose(logits(model), before)


def test_fresh_process_loads_a_saved_adapter(tmp_path):
    model = adapted("bert", "parallel")
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import peft_fast, sys, torch
sys.path.insert(0, "tests")
from families import batch, build
from peft import PeftModel
model = PeftModel.from_pretrained(build("bert"), {str(tmp_path)!r}).eval()
assert torch.equal(model(**batch("bert")).logits, torch.load({str(tmp_path / "logits.pt")!r}))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_loading_onto_the_meta_device_first(tmp_path):
    model = adapted("bert", "pfeiffer", scaling="learned")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register_method("bottleneck", methods.BottleneckConfig, methods.BottleneckModel)
    assert list(PeftType) == before
    assert before.count("BOTTLENECK") == 1
    member = PeftType.BOTTLENECK
    assert member is PeftType("BOTTLENECK") is PeftType["BOTTLENECK"] is pickle.loads(pickle.dumps(member))
    with pytest.raises(KeyError, match="already"):
        register_method("lora", methods.BottleneckConfig, methods.BottleneckModel)


def test_merging_is_refused_and_unloading_works():
    base = build("bert")
    expected = logits(base)
    model = adapted("bert", "parallel", base=base)
    for merge in (model.merge_adapter, model.merge_and_unload, bottleneck_layers(model)[0].merge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    model.unmerge_adapter()
    assert model.unload() is base
    assert torch.equal(logits(base), expected)
    assert not bottleneck_layers(base)
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_layer_norm_may_be_called_by_keyword():
    model = adapted()
    norms = [layer for layer in bottleneck_layers(model) if isinstance(layer.base_layer, nn.LayerNorm)]
    x = torch.randn(3, norms[0].base_layer.normalized_shape[0])
    assert torch.equal(norms[0](input=x), norms[0](x))
    assert not torch.equal(norms[0](x), norms[0].base_layer(x))


def test_batches_of_several_adapters_are_refused():
    model = adapted().eval()
    with pytest.raises(ValueError, match=r"adapter_names: BottleneckModel has no batches of several.*set_adapter"):
        model(**batch("bert"), adapter_names=["default"] * 4)


def test_deleting_an_adapter_takes_its_hooks_off():
    model = adapted("bert", "parallel")
    model.add_adapter("second", BottleneckConfig(style="houlsby"))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_print_trainable_parameters(capsys):
    adapted("bert", "pfeiffer").print_trainable_parameters()
    count = 2 * (4 * 32 + 4 + 32 * 4 + 32)
    assert f"trainable params: {count:,}" in capsys.readouterr().out

"""What happens to a model around training: adapters go, wrappers come, replicas and threads share it."""

import copy
import sys
import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from families import build
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fast
from models import batch, fill_lora_b, lora_layers, lora_model
from peft_fast.layers import LoraLinear

CONFIGS = {
    "LoRA": lambda **options: LoraConfig(**options),
    "peft's prefix": lambda **options: PrefixTuningConfig(num_virtual_tokens=3, **options),
    "bottleneck": lambda **options: peft_fast.BottleneckConfig(bottleneck_size=4, init="houlsby", **options),
    "prefix": lambda **options: peft_fast.PrefixConfig(num_virtual_tokens=3, **options),
    "input prefix": lambda **options: peft_fast.PrefixConfig(num_virtual_tokens=3, layers="input", **options),
}
each_method = pytest.mark.parametrize("method", CONFIGS)


def tuned(method: str, family: str = "llama") -> nn.Module:
    return get_peft_model(build(family), CONFIGS[method](task_type="CAUSAL_LM"))


@each_method
def test_without_its_only_adapter(method):
    model = tuned(method)
    peft_fast.patch(model)
    model.delete_adapter("default")
    assert not any(row.state == "fused" for row in peft_fast.report(model).rows)
    peft_fast.unpatch(model)
    kinds = {type(module) for module in model.modules()}
    assert not {kind for kind in kinds if kind.__module__ in ("peft_fast.patch", "peft_fast.methods.prefix_patch")}


def test_disabled_adapters_are_reported():
    model = tuned("bottleneck")
    assert {row.state for row in peft_fast.report(model).rows} == {"fused"}
    with model.disable_adapter():
        assert {row.reason for row in peft_fast.report(model).rows} == {"adapters are disabled"}


# A wrapper keeps the forward that it finds: ours behind `patch`, stock's before it.
@pytest.mark.parametrize("wrapped_first", [False, True], ids=["patched first", "wrapped first"])
@pytest.mark.parametrize("wrapper", ["hook", "precision"])
def test_report_knows_what_a_wrapper_calls(wrapper, wrapped_first, fused_calls):
    model = fill_lora_b(lora_model())
    if not wrapped_first:
        peft_fast.patch(model)
    for layer in lora_layers(model):
        if wrapper == "hook":
            add_hook_to_module(layer, ModelHook())
        else:
            layer.forward = convert_outputs_to_fp32(torch.autocast("cpu", enabled=False)(layer.forward))
    peft_fast.patch(model)
    model(**batch())
    rows = peft_fast.report(model).rows
    assert len(fused_calls) == (0 if wrapped_first else len(rows))
    assert {row.state for row in rows} == {"stock" if wrapped_first else "fused"}


def test_accelerates_wrapper_of_a_prefix_model():
    model = tuned("peft's prefix")
    peft_fast.patch(model)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    model(torch.randint(1, 50, (2, 5)))
    assert {row.state for row in peft_fast.report(model).rows} == {"fused"}


@pytest.fixture
def fused_calls(monkeypatch):
    calls, module = [], sys.modules["peft_fast.patch"]
    apply = module.apply_lora_linear
    monkeypatch.setattr(module, "apply_lora_linear", lambda *args: calls.append(args) or apply(*args))
    return calls


def replica_of(model: nn.Module) -> nn.Module:
    """What `nn.DataParallel` makes for a device: parameters are tensors among the attributes."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                copied = parameter * 1 if parameter.requires_grad else parameter.detach().clone()
                setattr(replica, name, copied)
    return replicas[model]


def test_replicas_run_fused(fused_calls):
    model = fill_lora_b(lora_model(lora_dropout=0.0))
    expected = model(**batch()).logits
    peft_fast.patch(model)
    model(**batch()).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    fused_calls.clear()
    output = replica_of(model)(**batch())
    output.loss.backward()
    assert len(fused_calls) == len(lora_layers(model))
    torch.testing.assert_close(output.logits, expected)
    for name, parameter in model.named_parameters():
        if name in ours and "lora" in name:
            torch.testing.assert_close(parameter.grad, ours[name])


@each_method
def test_two_threads_share_a_model(method):
    model = tuned(method).eval()
    peft_fast.patch(model)
    inputs = [torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(length)) for length in (7, 12)]
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits for ids in inputs]
    results: list[list] = [[], []]

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(25):
                results[i].append(model(inputs[i], use_cache=False).logits)

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result, right in zip(results, expected, strict=True):
        assert len(result) == 25
        for logits in result:
            torch.testing.assert_close(logits, right)


@pytest.mark.parametrize("call", [peft_fast.patch, peft_fast.unpatch, peft_fast.report], ids=lambda call: call.__name__)
def test_no_model(call):
    with pytest.raises(ValueError, match=r"^model: .*NoneType"):
        call(None)


def test_a_layer_goes_through_safetensors(tmp_path):
    merged, fresh = (LoraLinear(nn.Linear(24, 40), 4, 8) for _ in range(2))
    nn.init.normal_(merged.lora_b)
    merged.merge()
    save_file(merged.state_dict(), tmp_path / "layer.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert fresh.merged
    x = torch.randn(3, 24)
    assert torch.equal(fresh(x), copy.deepcopy(merged)(x))

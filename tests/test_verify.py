"""Stock against patched on the user's own model: what it accepts, what it catches, and what it leaves behind."""

import sys

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from peft.tuners import lora
from torch import nn

import peft_fast
from models import batch, bert, lora_layers, lora_model
from peft_fast.ops.lora_linear import apply_lora_linear
from peft_fast.patch import is_patched

pytestmark = pytest.mark.usefixtures("one_thread")


def verify(model: nn.Module, name: str = "bert", **options) -> peft_fast.VerifyReport:
    with peft_fast.backend("eager"):  # which fuses small calls too
        return peft_fast.verify(model, batch(name), steps=1, **options)


def wrong(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Let patched layers compute `change(op, *arguments)`."""
    monkeypatch.setattr(
        sys.modules["peft_fast.patch"], "apply_lora_linear", lambda *arguments: change(apply_lora_linear, *arguments)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16-fp32"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_right_model_is_ok(name, dtype):
    """With peft's default of fp32 adapters over a bf16 base too."""
    report = verify(lora_model(name, base=None, dtype=dtype, lora_dropout=0.1), name)
    assert report.ok, str(report)
    names = [row.name for row in report.rows]
    assert names[:2] == ["loss", "logits"]
    assert sum("lora_A" in name for name in names) == sum("lora_B" in name for name in names) > 4
    assert report.saved_bytes[1] < report.saved_bytes[0]
    assert all(seconds > 0 for seconds in report.seconds)
    assert "ok" in str(report)
    assert "NOT OK" not in str(report)
    assert report.fused[0] == report.fused[1] > 2
    assert f"{report.fused[0]} of {report.fused[1]} adapter layers fused" in str(report)


def test_what_ran_stock_is_not_called_fused():
    model = lora_model()
    layer = lora_layers(model)[0]
    layer.lora_A["default"].register_forward_hook(lambda *arguments: None)
    report = verify(model)
    assert report.ok
    assert report.fused == (len(lora_layers(model)) - 1, len(lora_layers(model)))


def test_a_step_may_run_fused_what_is_compared_as_stock():
    """What is compared drops nothing; bf16 factors gain with dropout alone."""
    report = peft_fast.verify(lora_model(lora_dropout=0.1).bfloat16(), batch("bert"), steps=1)
    assert report.fused[0] == 0
    assert report.fused_in_steps == report.fused[1] > 2
    assert f"{report.fused[1]} of {report.fused[1]} layers fused in it" in str(report)


def test_a_prefix_model_of_peft():
    torch.manual_seed(0)
    model = get_peft_model(bert(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    report = verify(model)
    assert report.ok, str(report)
    assert any("prompt_encoder" in row.name for row in report.rows)


# A part in 10^4 of the low-rank path, which no loss would show.
def test_a_wrong_low_rank_path(monkeypatch):
    wrong(monkeypatch, lambda op, x, w, a, b, bias, scaling, p: op(x, w, a, b, bias, scaling * 1.0001, p))
    report = verify(lora_model())
    assert not report.ok
    assert "NOT OK" in str(report)
    assert "beyond" in str(report)


def test_not_a_number(monkeypatch):
    wrong(monkeypatch, lambda op, *arguments: op(*arguments) * float("nan"))
    assert not verify(lora_model()).ok


def test_a_missing_gradient(monkeypatch):
    wrong(monkeypatch, lambda op, x, w, a, *others: op(x, w, a.detach(), *others))
    report = verify(lora_model())
    assert not report.ok
    assert all("lora_A" in name for name in report.missing)
    assert len(report.missing) == sum("lora_A" in name for name, _ in lora_model().named_parameters())
    assert "missing" in str(report)


def test_a_parameter_that_nothing_trains():
    model = lora_model()
    model.unused = nn.Parameter(torch.ones(3))
    report = verify(model)
    assert report.ok
    assert report.untrained == ("unused",)
    assert "untrained  unused" in str(report)


@pytest.mark.parametrize("state", ["stock", "patched", "partly", "failed"])
def test_the_model_ends_as_it_was(state):
    model = lora_model("gpt2", lora_dropout=0.1)
    layers = [module for module in model.modules() if type(module) is lora.Linear]
    for layer in {"patched": layers, "partly": layers[:2]}.get(state, []):
        peft_fast.patch(layer)
    patched = [is_patched(module) for module in model.modules()]
    layers[0].eval()
    model.register_buffer("steps", torch.zeros(()))  # as a batch norm has them
    model.register_forward_pre_hook(lambda model, inputs: model.steps.add_(1) and None)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.full_like(parameter, 3.0)
    modes = [module.training for module in model.modules()]
    gradients = [p.grad for p in model.parameters()]
    values = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    if state == "failed":
        with pytest.raises(ValueError, match="no loss"):
            peft_fast.verify(model, {"input_ids": batch("gpt2")["input_ids"]})
    else:
        verify(model, "gpt2")
    assert [is_patched(module) for module in model.modules()] == patched
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is grad for p, grad in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0))
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == values[name][0]
        assert torch.equal(tensor, values[name][1])


def test_nothing_to_patch():
    with pytest.raises(ValueError, match="no LoRA layer, bottleneck adapter or prefix to patch"):
        verify(bert())


def test_what_the_report_knows_stays():
    model = lora_model().bfloat16()
    peft_fast.patch(model)
    model(**batch("bert"))
    before = peft_fast.report(model)
    assert any(row.reason.startswith("last call") for row in before.rows)
    with torch.no_grad():
        peft_fast.verify(model, batch("bert"), steps=1)
    assert peft_fast.report(model) == before


@pytest.mark.parametrize(("model", "steps", "named"), [(None, 1, "model"), ("bert", 0, "steps")])
def test_arguments(model, steps, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        peft_fast.verify(model and lora_model(), batch("bert"), steps=steps)


def test_a_batch_that_is_no_mapping():
    with pytest.raises(ValueError, match="batch: expected the keyword arguments of the model's forward, got list"):
        peft_fast.verify(lora_model(), [1, 2])


def test_a_model_without_a_wider_dtype():
    with pytest.raises(ValueError, match="no dtype that has a wider one"):
        verify(lora_model().double())

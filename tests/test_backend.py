"""The choice of a backend outlives its `with` where gradient checkpointing repeats a forward."""

import pytest
import torch
from families import batch, build
from peft import PrefixTuningConfig, get_peft_model

import peft_fast
from peft_fast import BottleneckConfig, PrefixConfig

pytestmark = pytest.mark.usefixtures("one_thread")


# Each makes the tensors of its op anew at each call, so that none of them tells which forward is repeated.
def reparametrised_prefix():
    return get_peft_model(build("llama"), PrefixConfig(num_virtual_tokens=3, reparametrization=True))


def patched_prefix():
    model = get_peft_model(build("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    peft_fast.patch(model)
    return model


def cast_prefix():
    return narrow(get_peft_model(build("llama"), PrefixConfig(num_virtual_tokens=3)))


def cast_adapter():
    return narrow(get_peft_model(build("llama"), BottleneckConfig(dropout=0.5)))


def narrow(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, dtype=torch.bfloat16)
    return model


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("make", [reparametrised_prefix, patched_prefix, cast_prefix, cast_adapter])
def test_a_repeated_forward_keeps_the_backend(make, use_reentrant):
    torch.manual_seed(0)
    model = make().train()
    model.base_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # the eager backend's masks are not torch's

    def gradients(backward_inside):
        model.zero_grad()
        torch.manual_seed(1)
        with peft_fast.backend("eager"):
            loss = model(**batch("llama")).loss
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    expected, outside = gradients(True), gradients(False)
    assert all(torch.equal(a, b) for a, b in zip(outside, expected, strict=True))
    assert any(gradient.any() for gradient in expected)

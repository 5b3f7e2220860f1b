import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_fast import reference
from peft_fast.testing import lora_linear_inputs


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_linear_is_what_peft_computes(dtype, factor_dtype):
    if dtype == torch.float32 and factor_dtype == torch.bfloat16:
        factor_dtype = torch.float32
    inputs = lora_linear_inputs(17, 24, 40, 4, dtype=dtype, factor_dtype=factor_dtype, scaling=3.0)
    base = nn.Sequential(nn.Linear(24, 40))
    base[0].weight.data, base[0].bias.data = inputs.weight, inputs.bias
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = inputs.lora_a, inputs.lora_b

    expected = layer(inputs.x)

    y = reference.lora_linear(
        inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, bias=inputs.bias, scaling=layer.scaling["default"]
    )
    assert torch.equal(y, expected)


def test_dropout_scales_what_it_keeps_by_the_quantised_probability():
    x, weight = torch.ones(4, 6, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
    lora_a, lora_b = torch.ones(1, 6, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    keep_mask = torch.zeros(4, 6, dtype=torch.bool)
    keep_mask[:, 0] = True
    y = reference.lora_linear(x, weight, lora_a, lora_b, dropout_p=0.1, keep_mask=keep_mask)
    assert y.allclose(torch.full((4, 3), 65536 / (65536 - 6554), dtype=torch.float64), rtol=1e-15)


def test_gradcheck():
    inputs = lora_linear_inputs(5, 6, 7, 2, dtype=torch.float64)
    keep_mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) > 0.5

    def op(x, lora_a, lora_b, bias):
        return reference.lora_linear(
            x, inputs.weight, lora_a, lora_b, bias=bias, scaling=1 / 3, dropout_p=0.5, keep_mask=keep_mask
        )

    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.bias)]
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize(("dropout_p", "threshold"), [(0.0, 0), (0.05, 3277), (0.5, 32768), (0.999999, 65535)])
def test_drop_threshold(dropout_p, threshold):
    assert reference.drop_threshold(dropout_p) == threshold

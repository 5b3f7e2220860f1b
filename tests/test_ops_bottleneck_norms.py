"""The eager form of the adapter where it has LayerNorms of its own: what is summed first, and kept in place of x."""

import gc
import weakref

import pytest
import torch

import peft_fast
from bottleneck_calls import DTYPES, assert_op_within_budget
from peft_fast import eager
from peft_fast.ops import bottleneck_adapter
from peft_fast.testing import BottleneckAdapterInputs, bottleneck_adapter_inputs, saved_bytes


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.3, 0.6, 30.0])
def test_rows_off_centre(mean, dtype, dropout_p, monkeypatch):
    """In deviations of a row. Where that is much, what the norm made is made again: summed first, x would cancel."""
    inputs = bottleneck_adapter_inputs(300, 160, 24, dtype=dtype, factor_dtype=torch.float32, norm_before=True)
    inputs.x.copy_(standardized(inputs.x) + mean)
    made, layer_norm = [], torch.native_layer_norm
    monkeypatch.setattr(torch, "native_layer_norm", lambda *args: made.append(0) or layer_norm(*args))
    assert_op_within_budget("eager", inputs, dropout_p=dropout_p, activation="gelu")
    assert len(made) == (1 if mean < 0.5 else 2)


@pytest.mark.parametrize("amplitude", [0.1, 0.01])
def test_columns_that_the_norm_magnifies(amplitude):
    inputs = bottleneck_adapter_inputs(1024, 160, 24, norm_before=True)
    weight, _ = inputs.parameters["norm_before"]
    weight[:80] = 1 / amplitude
    inputs.x[:, :80] *= amplitude
    inputs.x.copy_(standardized(inputs.x) + 0.4)
    assert_op_within_budget("eager", inputs, activation="gelu")


def test_a_frozen_norm_and_down_projection_cost_no_product_of_theirs(monkeypatch):
    products = []
    tall_mm = eager.bottleneck_adapter.tall_mm
    monkeypatch.setattr(eager.bottleneck_adapter, "tall_mm", lambda *args: products.append(0) or tall_mm(*args))
    inputs = bottleneck_adapter_inputs(64, 160, 8, norm_before=True)
    with peft_fast.backend("eager"):
        y = bottleneck_adapter(inputs.x.requires_grad_(), residual=inputs.x, **inputs.parameters)
    torch.autograd.grad(y, inputs.x, inputs.dy)
    assert not products


def standardized(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


def with_small_term(M: int, K: int, R: int, share: float = 0.4, **options) -> BottleneckAdapterInputs:
    """A call whose sum, with a norm after it, takes x's place in backward; the term is about `share` of x."""
    inputs = bottleneck_adapter_inputs(M, K, R, norm_after=True, **options)
    with peft_fast.backend("eager"):
        parameters = {name: value for name, value in inputs.parameters.items() if name != "norm_after"}
        term = bottleneck_adapter(inputs.x, **parameters, activation="gelu")
    for name in inputs.parameters.keys() & {"up_weight", "up_bias"}:
        inputs.parameters[name].mul_(share * inputs.x.double().norm() / term.double().norm())
    return inputs


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("learned", [False, True], ids=["number", "learned"])
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_sum_in_place_of_x(dtype, factor_dtype, learned, bias):
    options = {"dtype": dtype, "factor_dtype": factor_dtype, "learned_scaling": learned, "bias": bias}
    # Of one number, eager's own error in one call is chance.
    calls = [with_small_term(131, 160, 24, seed=seed, **options) for seed in range(8 if learned else 1)]
    assert_op_within_budget("eager", *calls, activation="gelu")


def test_sum_in_place_of_x_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(eager.dropout, "BLOCK_ELEMENTS", 4096)
    inputs = with_small_term(300, 160, 8, dtype=torch.bfloat16, factor_dtype=torch.float32)
    assert_op_within_budget("eager", inputs, activation="gelu_new")


@pytest.mark.parametrize(("share", "kept"), [(0.4, 1), (0.6, 2), (50.0, 2), (float("nan"), 2)])
def test_x_is_kept_beside_a_large_term(share, kept):
    """Beside one that is much larger than x, x would be what is left of two sums that cancel."""
    M, K, R = 512, 64, 4
    inputs = with_small_term(M, K, R, share)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    with peft_fast.backend("eager"):
        saved = saved_bytes(lambda: bottleneck_adapter(inputs.x, residual=inputs.x, **inputs.parameters), leaves[1:])
    assert 4 * M * K * kept <= saved < 4 * M * K * kept + 4 * M * (R + 2) + 64


@pytest.mark.parametrize("share", [0.6, 50.0])
def test_large_terms_within_budget(share):
    assert_op_within_budget("eager", with_small_term(300, 160, 24, share), activation="gelu")


def test_rows_of_large_terms_that_the_sample_does_not_show():
    inputs = with_small_term(512, 64, 8)
    inputs.x[5:9] *= 1e-3  # where the term is mostly the biases'
    assert_op_within_budget("eager", inputs, activation="gelu")


@pytest.mark.parametrize(("share", "freed"), [(0.4, True), (0.6, False)])
def test_x_is_freed_after_forward(share, freed):
    inputs = with_small_term(512, 64, 4, share)
    x = inputs.x.requires_grad_() * 1
    of_x = weakref.ref(x)
    with peft_fast.backend("eager"):
        y = bottleneck_adapter(x, residual=x, **inputs.parameters)
    del x
    gc.collect()
    assert (of_x() is None) == freed
    y.sum().backward()


def test_second_gradients_without_x():
    inputs = with_small_term(4, 6, 2, share=0.1, dtype=torch.float64, learned_scaling=True)
    names, leaves = zip(*inputs.leaves().items(), strict=True)

    def op(*leaves):
        named = dict(zip(names, leaves, strict=True))
        named["norm_after"] = named.pop("norm_after_weight"), named.pop("norm_after_bias")
        x = named.pop("x").sin()  # x is a function of the leaf: its place in the graph has a history
        return bottleneck_adapter(x, residual=x, **named, activation="tanh")

    leaves = [leaf.requires_grad_() for leaf in leaves]
    with peft_fast.backend("eager"):
        y = op(*leaves)
        assert y.grad_fn.name() == "NormOfSumBackward"
        assert y.grad_fn.without_x
        assert torch.autograd.gradcheck(op, leaves)
        assert torch.autograd.gradgradcheck(op, leaves)

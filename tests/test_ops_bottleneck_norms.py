"""The eager form of the adapter where it has LayerNorms of its own: what is summed first, and kept in place of x."""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.flop_counter import FlopCounterMode

import peft_fast
from bottleneck_calls import assert_op_within_budget
from op_dtypes import DTYPES
from peft_fast import eager, reference
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


def with_term(M: int, K: int, R: int, share: float = 0.3, *, activation: str = "gelu", **options) -> Any:
    """A call with a norm on the sum alone, whose term is about `share` of x."""
    inputs = bottleneck_adapter_inputs(M, K, R, norm_after=True, **options)
    parameters = {name: value for name, value in inputs.parameters.items() if name != "norm_after"}
    term = reference.bottleneck_adapter(inputs.x, **parameters, activation=activation).double()
    for name in inputs.parameters.keys() & {"up_weight", "up_bias"}:
        inputs.parameters[name].mul_(share * inputs.x.double().norm() / term.norm())
    return inputs


def keeps_x(inputs: BottleneckAdapterInputs, activation: str = "gelu") -> bool:
    for leaf in inputs.leaves().values():
        leaf.requires_grad_()
    with peft_fast.backend("eager"):
        y = bottleneck_adapter(inputs.x, residual=inputs.x, **inputs.parameters, activation=activation)
    assert y.grad_fn.name() == "_NormOfSumBackward"
    return y.grad_fn.saved_tensors[0] is not None


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("learned", [False, True], ids=["number", "learned"])
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_sum_in_place_of_x(dtype, factor_dtype, learned, bias):
    options = {"dtype": dtype, "factor_dtype": factor_dtype, "learned_scaling": learned, "bias": bias}
    # Of one number, eager's own error in one call is chance.
    calls = [with_term(131, 160, 24, seed=seed, **options) for seed in range(8 if learned else 1)]
    assert not any(map(keeps_x, calls))
    assert_op_within_budget("eager", *[call.to(call.dy.dtype) for call in calls], activation="gelu")


@pytest.mark.parametrize("missing", [{"down_bias"}, {"up_bias"}])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_each_activation_and_bias(activation, missing):
    inputs = with_term(64, 160, 8, dtype=torch.float64, activation=activation)
    for name in missing:
        del inputs.parameters[name]
    assert not keeps_x(inputs, activation)
    assert_op_within_budget("eager", inputs.to(torch.float64), activation=activation)


@pytest.mark.parametrize(("share", "kept"), [(0.3, 1), (1.0, 2), (50.0, 2), (float("nan"), 2)])
def test_saved_beside_small_and_large_terms(share, kept):
    M, K, R = 512, 64, 4
    inputs = with_term(M, K, R, share)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    with peft_fast.backend("eager"):
        saved = saved_bytes(lambda: bottleneck_adapter(inputs.x, residual=inputs.x, **inputs.parameters), leaves[1:])
    assert 4 * M * K * kept <= saved < 4 * M * K * kept + 4 * M * (R + 2) + 64


def looked_at_rows_without_term(inputs):
    """The units are off in the few rows that are looked at."""
    inputs.x[:: (len(inputs.x) // 8) | 1].abs_().neg_()
    inputs.parameters["down_weight"].abs_()
    for name in ("down_bias", "up_bias"):
        inputs.parameters[name].zero_()


def bias_undoes_a_unit(inputs):
    """A unit that is always on, and a bias that takes it away: the sum is small, its parts are not."""
    up_weight, scaling = inputs.parameters["up_weight"], inputs.parameters["scaling"]
    up_weight[:, 0] = 7 / scaling * torch.randn(len(up_weight), generator=torch.Generator().manual_seed(1))
    inputs.parameters["down_bias"][0] = 20
    inputs.parameters["up_bias"].copy_(-up_weight[:, 0])


def one_column(inputs):
    """All that the adapter adds goes to one feature."""
    inputs.parameters["up_weight"][1:] = 0
    inputs.parameters["up_weight"][0] *= 30
    inputs.parameters["up_bias"].zero_()


@pytest.mark.parametrize(
    ("change", "share", "activation"),
    [(looked_at_rows_without_term, 20.0, "relu"), (bias_undoes_a_unit, 0.2, "tanh"), (one_column, 1.0, "tanh")],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_terms_that_few_rows_do_not_show(change, share, activation):
    """Summed without x, the down projection's gradient would err by several times what eager's does."""
    inputs = with_term(4096, 128, 64, share, activation=activation)
    change(inputs)
    assert_op_within_budget("eager", inputs, activation=activation)


def test_large_numbers_in_fp16():
    inputs = with_term(300, 1024, 16, 20.0, dtype=torch.float16, factor_dtype=torch.float32)
    inputs.x *= 400  # its norm is beyond fp16's range
    inputs.parameters["up_weight"] *= 400
    assert_op_within_budget("eager", inputs, activation="gelu")


@pytest.mark.parametrize(("share", "freed"), [(0.3, True), (1.0, False)])
def test_x_is_freed_after_forward(share, freed):
    inputs = with_term(512, 64, 4, share)
    x = inputs.x.requires_grad_() * 1
    of_x = weakref.ref(x)
    with peft_fast.backend("eager"):
        y = bottleneck_adapter(x, residual=x, **inputs.parameters)
    del x
    gc.collect()
    assert (of_x() is None) == freed
    y.sum().backward()


def test_second_gradients_without_x():
    inputs = with_term(4, 6, 2, 0.1, dtype=torch.float64, learned_scaling=True)
    names, leaves = zip(*inputs.leaves().items(), strict=True)

    def op(*leaves):
        named = dict(zip(names, leaves, strict=True))
        named["norm_after"] = named.pop("norm_after_weight"), named.pop("norm_after_bias")
        x = named.pop("x").sin()  # x is a function of the leaf: its place in the graph has a history
        return bottleneck_adapter(x, residual=x, **named, activation="tanh")

    leaves = [leaf.requires_grad_() for leaf in leaves]
    with peft_fast.backend("eager"):
        assert op(*leaves).grad_fn.saved_tensors[0] is None
        assert torch.autograd.gradcheck(op, leaves)
        assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("share", [0.3, 5.0])
def test_watched_and_batched(share):
    """The general function takes over where torch's calls are watched or batched, and its results carry no graph."""
    inputs = with_term(64, 48, 4, share, learned_scaling=True)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    with peft_fast.backend("eager"):
        y = bottleneck_adapter(inputs.x, residual=inputs.x, **inputs.parameters)
    expected = torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)
    with FlopCounterMode(display=False):
        watched = torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)
    batched = torch.autograd.grad(y, leaves, torch.stack([inputs.dy] * 2), is_grads_batched=True)
    for results in (watched, [grad[1] for grad in batched]):
        assert not any(grad.requires_grad for grad in results)
        for grad, true_grad in zip(results, expected, strict=True):
            torch.testing.assert_close(grad, true_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("watched_first", [False, True])
@pytest.mark.parametrize("share", [0.3, 5.0])
def test_a_repetition_that_alone_is_watched_is_no_wrong_gradient(share, watched_first, learned):
    inputs = with_term(64, 48, 4, share, learned_scaling=learned)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]

    def call(x):
        return bottleneck_adapter(x, residual=x, **inputs.parameters)

    def watched(yes):
        return FlopCounterMode(display=False) if yes else contextlib.nullcontext()

    with peft_fast.backend("eager"):
        expected = torch.autograd.grad(call(inputs.x), leaves, inputs.dy)
        with watched(watched_first):
            y = checkpoint(call, inputs.x, use_reentrant=False)
        try:
            with watched(not watched_first):
                grads = torch.autograd.grad(y, leaves, inputs.dy)
        except CheckpointError:
            assert share == 0.3 or not learned  # a number is a tensor more where it is watched
            return
    assert learned
    for grad, true_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-4, atol=1e-4)

"""Compiled users count: no graph breaks, no compilation a layer or a scaling, the same results."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import peft_fast
from models import batch, bert, lora_model, loss_and_gradients
from peft_fast.ops import lora_linear
from peft_fast.testing import lora_linear_inputs

# Inductor imports modules that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_twelve_layers_are_one_graph_without_recompilation():
    # 72 LoRA layers share one forward: were each to recompile it, dynamo's limit of 8 would be passed unnoticed.
    with peft_fast.backend("eager"):
        model = lora_model(base=bert(layers=12), lora_dropout=0.1)
        peft_fast.patch(model)
        counter = CompileCounter()
        step = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(3):
            step(**batch())
    assert counter.frame_count == 1
    assert counter.op_count > 12 * 6


def test_scalings_share_two_graphs():
    # The first float is a constant of the graph, the second makes it an input: two compilations, as for stock.
    inputs = lora_linear_inputs(8, 16, 24, 4)
    counter = CompileCounterWithBackend("aot_eager")

    def step(scaling):
        return lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, scaling=scaling)

    compiled_step = torch.compile(step, backend=counter, fullgraph=True)
    for scaling in (0.5, 1 / 3, 2.0, 7.0, 0.1, 1.5):
        assert torch.allclose(compiled_step(scaling), step(scaling), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_inductor_gives_the_gradients_of_stock(name):
    stock = lora_model(name)
    patched = copy.deepcopy(stock)
    peft_fast.patch(patched)
    expected = loss_and_gradients(stock, batch(name))
    patched.forward = torch.compile(patched.forward, fullgraph=True)
    actual = loss_and_gradients(patched, batch(name))
    for key, value in expected.items():
        scale = value.abs().max().item()
        assert torch.allclose(actual[key], value, atol=1e-5 * scale + 1e-8), key


def test_compiled_dropout_masks_forward_and_backward_alike():
    """With A and B of ones and W zero, a kept column shows in y and in dx: they must be the same columns."""
    K = 4096
    x = torch.ones(1, K, requires_grad=True)
    weight, lora_a, lora_b = torch.zeros(1, K), torch.ones(1, K), torch.ones(1, 1)

    @torch.compile(fullgraph=True)
    def step(x):
        return lora_linear(x, weight, lora_a, lora_b, dropout_p=0.25)

    rates = []
    for _ in range(3):
        y = step(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        kept = (dx != 0).sum().item()
        assert y.item() == pytest.approx(kept / 0.75, rel=1e-5)
        rates.append(kept / K)
    assert len(set(rates)) > 1
    assert sum(rates) / 3 == pytest.approx(0.75, abs=0.03)


def test_dynamic_shapes():
    inputs = lora_linear_inputs(8, 16, 24, 4)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(x):
        return lora_linear(x, inputs.weight, inputs.lora_a, inputs.lora_b)

    for M in (8, 9, 17, 33):
        step(torch.randn(M, 16))
    assert counter.frame_count <= 2

"""LoRA linear under every transform of torch that it promises to serve."""

import functools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import peft_fast
from peft_fast import reference
from peft_fast.ops import lora_linear
from peft_fast.testing import lora_linear_inputs

BACKENDS = ["eager", "triton"]


def schema_arguments(plan: str) -> tuple:
    inputs = lora_linear_inputs(8, 16, 24, 4)
    leaves = (tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b))
    x, lora_a, lora_b = leaves
    return x, inputs.weight, lora_a, lora_b, inputs.bias, torch.tensor(2.0), 6554, torch.tensor([3]), plan


def test_opcheck():
    ops = torch.ops.peft_fast
    torch.library.opcheck(ops.lora_linear.default, (*schema_arguments("eager"), ""))
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in schema_arguments("eager"))
    torch.library.opcheck(ops.lora_linear_fwd.default, detached)
    x, weight, lora_a, lora_b, _, scaling, threshold, seed, plan = detached
    _, s = ops.lora_linear_fwd(*detached)
    dy = torch.randn(8, 24)
    needs = [True, False, True, True]
    torch.library.opcheck(
        ops.lora_linear_bwd.default,
        (dy, x, weight, lora_a, lora_b, s, scaling, threshold, seed, needs, plan),
    )
    torch.library.opcheck(ops.dropout_mask.default, (seed, (8, 16), threshold, "eager"))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(t) for t in schema_arguments("eager")[:4]]
        y = lora_linear(*inputs, dropout_p=0.1)
        dx, da = torch.autograd.grad(y.sum(), (inputs[0], inputs[2]))
    assert (y.shape, dx.shape, da.shape) == ((8, 24), (8, 16), (4, 16))


def test_make_fx_records_aten_calls_and_the_mask():
    x, weight, lora_a, lora_b, *_ = schema_arguments("eager")

    def step(x, lora_a, lora_b):
        y = lora_linear(x, weight, lora_a, lora_b, dropout_p=0.1, seed=torch.tensor([3]))
        return torch.autograd.grad(y.sum(), (x, lora_a, lora_b))

    graph = make_fx(step)(x, lora_a, lora_b)
    ops = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {"peft_fast.dropout_mask.default", "aten.mm.default"} <= ops
    assert not any("lora_linear" in op for op in ops)
    for traced, direct in zip(graph(x, lora_a, lora_b), step(x, lora_a, lora_b), strict=True):
        assert torch.allclose(traced, direct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch(backend):
    inputs = lora_linear_inputs(12, 8, 10, 2, dtype=torch.float64)
    seed = torch.tensor([3])

    def loss(lora_a, lora_b):
        y = lora_linear(inputs.x, inputs.weight, lora_a, lora_b, dropout_p=0.5, seed=seed)
        return (y * inputs.dy).sum()

    with peft_fast.backend(backend):
        da, db = torch.func.grad(loss, argnums=(0, 1))(inputs.lora_a, inputs.lora_b)
        a, b = (tensor.clone().requires_grad_() for tensor in (inputs.lora_a, inputs.lora_b))
        expected = torch.autograd.grad(loss(a, b), (a, b))
    assert torch.allclose(da, expected[0])
    assert torch.allclose(db, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_batched_backward(backend, dropout_p):
    inputs = lora_linear_inputs(12, 8, 10, 2, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b)]
    with peft_fast.backend(backend):
        y = lora_linear(inputs.x, inputs.weight, *leaves[1:], dropout_p=dropout_p, seed=torch.tensor([3]))
    dys = torch.randn(3, 12, 10, dtype=torch.float64)
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for value, expected in zip(batched, torch.autograd.grad(y, leaves, dy, retain_graph=True), strict=True):
            assert torch.allclose(value[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode(backend):
    inputs = lora_linear_inputs(12, 8, 10, 2, dtype=torch.float64)
    call, tangent = (inputs.weight, inputs.lora_a, inputs.lora_b), torch.randn(12, 8, dtype=torch.float64)
    with peft_fast.backend(backend), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs.x, tangent)
        actual = torch.autograd.forward_ad.unpack_dual(lora_linear(dual, *call, scaling=0.5)).tangent
    assert torch.allclose(actual, reference.lora_linear(tangent, *call, scaling=0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_watched_backward(backend):
    inputs = lora_linear_inputs(12, 8, 10, 2)
    x = inputs.x.requires_grad_()
    with peft_fast.backend(backend):
        y = lora_linear(x, inputs.weight, inputs.lora_a, inputs.lora_b)
        (expected,) = torch.autograd.grad(y, x, inputs.dy, retain_graph=True)
    with FlopCounterMode(display=False):
        (dx,) = torch.autograd.grad(y, x, inputs.dy)
    assert torch.allclose(dx, expected, atol=1e-5)


def test_selective_checkpointing_that_keeps_matmuls():
    inputs = lora_linear_inputs(64, 48, 48, 4)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b)]

    def block(x):
        return lora_linear(x, inputs.weight, *leaves[1:], bias=inputs.bias, dropout_p=0.5)

    torch.manual_seed(1)
    expected = torch.autograd.grad(block(inputs.x), leaves, inputs.dy)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    torch.manual_seed(1)
    y = checkpoint(block, inputs.x, use_reentrant=False, context_fn=contexts)
    for value, true_value in zip(torch.autograd.grad(y, leaves, inputs.dy), expected, strict=True):
        assert torch.allclose(value, true_value, rtol=1e-4, atol=1e-4)


def test_second_derivative_with_frozen_lora_a_is_refused():
    inputs = lora_linear_inputs(4, 6, 5, 2)
    y = lora_linear(inputs.x.requires_grad_(), inputs.weight, inputs.lora_a, inputs.lora_b.requires_grad_())
    with pytest.raises(RuntimeError, match="lora_a frozen"):
        torch.autograd.grad(y.sum(), (inputs.x, inputs.lora_b), create_graph=True)


def test_create_graph_through_a_layer_that_is_used_twice():
    inputs = lora_linear_inputs(4, 6, 6, 2, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b)]

    def gradients(op):
        def layer(x):
            return op(x, inputs.weight, *leaves[1:], scaling=0.5)

        return torch.autograd.grad(layer(layer(inputs.x)).square().sum(), leaves, create_graph=True)

    for actual, expected in zip(gradients(lora_linear), gradients(reference.lora_linear), strict=True):
        assert torch.allclose(actual, expected)

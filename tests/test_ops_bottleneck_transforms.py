"""The bottleneck adapter op under compilation and the transforms of torch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import peft_fast
from bottleneck_calls import BACKENDS, NORMS, SEED, forward_backward
from peft_fast import reference
from peft_fast.ops import bottleneck_adapter
from peft_fast.testing import bottleneck_adapter_inputs


def schema_arguments():
    inputs = bottleneck_adapter_inputs(8, 16, 4, norm_before=True, norm_after=True)
    named = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}
    order = ("down_weight", "down_bias", "up_weight", "up_bias")
    norms = [named[f"norm_{side}_{part}"] for side in ("before", "after") for part in ("weight", "bias")]
    tensors = [named["x"], None, *(named[name] for name in order), torch.tensor(0.7), *norms]
    return tensors, [True, 6554, torch.tensor([3]), "gelu", False, 1e-5]


def test_opcheck():
    ops = torch.ops.peft_fast
    tensors, options = schema_arguments()
    torch.library.opcheck(ops.bottleneck_adapter.default, (*tensors, *options, "eager", ""))
    tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    torch.library.opcheck(ops.bottleneck_adapter_fwd.default, (*tensors, *options))
    _, *saved = ops.bottleneck_adapter_fwd(*tensors, *options)
    needs = ["x", "down_weight", "up_bias", "norm_before_weight", "norm_after_bias"]
    torch.library.opcheck(ops.bottleneck_adapter_bwd.default, (torch.randn(8, 16), *tensors, *options, *saved, needs))


def test_traced_triton_returns_no_argument():
    inputs = bottleneck_adapter_inputs(8, 16, 4, residual="other")
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]

    def step(*leaves):
        y = bottleneck_adapter(inputs.x, residual=inputs.residual, **inputs.parameters)
        return torch.autograd.grad(y, leaves, inputs.dy)

    with peft_fast.backend("triton"):
        graph = make_fx(step)(*leaves)
    assert any("bottleneck_adapter_bwd" in str(node.target) for node in graph.graph.nodes)
    for traced, direct in zip(graph(*leaves), step(*leaves), strict=True):
        assert torch.allclose(traced, direct, rtol=1e-4, atol=1e-5)


def test_fake_tensors():
    with FakeTensorMode() as mode:
        inputs = bottleneck_adapter_inputs(8, 16, 4)
        x = mode.from_tensor(torch.randn(8, 16)).requires_grad_()
        parameters = {name: p if isinstance(p, float) else mode.from_tensor(p) for name, p in inputs.parameters.items()}
        y = bottleneck_adapter(x, residual=x, **parameters, dropout_p=0.1)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert (y.shape, dx.shape) == ((8, 16), (8, 16))


def test_make_fx_records_aten_calls_and_the_mask():
    inputs = bottleneck_adapter_inputs(8, 16, 4, norm_before=True)
    leaves = list(inputs.leaves().values())

    def step(*leaves):
        y = bottleneck_adapter(
            inputs.x, residual=inputs.x, **inputs.parameters, dropout_p=0.1, seed=torch.tensor([3]), activation="gelu"
        )
        return torch.autograd.grad(y.sum(), leaves)

    for leaf in leaves:
        leaf.requires_grad_()
    graph = make_fx(step)(*leaves)
    ops = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert "peft_fast.dropout_mask.default" in ops
    assert not any("bottleneck" in op for op in ops)
    for traced, direct in zip(graph(*leaves), step(*leaves), strict=True):
        assert torch.allclose(traced, direct, rtol=1e-5, atol=1e-6)


# Inductor imports modules that torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("norms", ["plain", "both"])
def test_compiled_is_one_graph_with_the_same_results(norms, dropout_p):
    inputs = bottleneck_adapter_inputs(32, 24, 4, **NORMS[norms])
    options = {"dropout_p": dropout_p, "seed": torch.tensor([3]), "activation": "silu"}
    plain = forward_backward(bottleneck_adapter, inputs, **options)
    torch._dynamo.reset()
    compiled = forward_backward(torch.compile(bottleneck_adapter, fullgraph=True), inputs, **options)
    for name, value in plain.items():
        assert torch.allclose(compiled[name], value, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    inputs = bottleneck_adapter_inputs(6, 8, 3, dtype=torch.float64)
    options = {"residual": inputs.x, "activation": "tanh", "dropout_p": 0.5, "seed": torch.tensor([SEED])}
    parameters = dict(inputs.parameters)
    down = parameters.pop("down_weight")

    def loss(down):
        return (bottleneck_adapter(inputs.x, down, **parameters, **options) * inputs.dy).sum()

    with peft_fast.backend(backend):
        functional = torch.func.grad(loss)(down)
        leaf = down.clone().requires_grad_()
        y = bottleneck_adapter(inputs.x, leaf, **parameters, **options)
        dys = torch.randn(3, *y.shape, dtype=torch.float64)
        (batched,) = torch.autograd.grad(y, leaf, dys, is_grads_batched=True, retain_graph=True)
        (plain,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(functional, plain)
    for dy, value in zip(dys, batched, strict=True):
        assert torch.allclose(value, torch.autograd.grad(y, leaf, dy, retain_graph=True)[0])


def test_the_residuals_gradient_accumulates_beside_dy():
    """Where it is dy itself, adding to it must not change the caller's dy."""
    x, down, up = torch.randn(8, 16), torch.randn(4, 16), torch.randn(16, 4)
    residual, dy = torch.zeros(8, 16, requires_grad=True), torch.ones(8, 16)
    with peft_fast.backend("eager"):
        for _ in range(3):
            bottleneck_adapter(x, down, up, residual=residual).backward(dy)
    assert torch.equal(dy, torch.ones(8, 16))
    assert torch.equal(residual.grad, torch.full((8, 16), 3.0))


def test_create_graph_through_a_residual_that_depends_on_x():
    inputs = bottleneck_adapter_inputs(4, 6, 3, dtype=torch.float64)
    x = inputs.x.detach().requires_grad_()
    down, up = inputs.parameters["down_weight"], inputs.parameters["up_weight"]

    def gradients(op):
        y = op(x, down, up, residual=x * 2, activation="tanh")
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

    assert torch.allclose(gradients(bottleneck_adapter), gradients(reference.bottleneck_adapter))


@pytest.mark.parametrize("backend", BACKENDS)
def test_create_graph_beside_a_wider_scaling(backend):
    """A learned float32 scaling does not widen what meets a LayerNorm's 16-bit parameters."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((64, 8), (3, 8), (8, 3), (8,), (8,), (64, 8))
    x, down, up, weight, bias, dy = (torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
    leaves = [tensor.requires_grad_() for tensor in (x, down, up, weight, bias, torch.tensor([1.5]))]
    with peft_fast.backend(backend):
        y = bottleneck_adapter(x, down, up, scaling=leaves[-1], residual=x, norm_after=(weight, bias))
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        second = torch.autograd.grad(grads[-1].square().sum(), [x, down, up, weight, leaves[-1]])
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
    assert all(grad.isfinite().all() and grad.any() for grad in second)
    for grad, plain in zip(grads, first, strict=True):
        torch.testing.assert_close(grad, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())

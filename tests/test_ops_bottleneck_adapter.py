"""The bottleneck adapter op against its reference, under every transform of torch that it promises to serve."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import peft_fast
from bottleneck_calls import BACKENDS, NORMS, SEED, assert_op_within_budget, forward_backward, mask_of
from op_dtypes import DTYPES
from peft_fast import eager, reference, support
from peft_fast.ops import bottleneck_adapter
from peft_fast.ops._bottleneck_call import fits, is_usual_call
from peft_fast.testing import assert_within_budget, bottleneck_adapter_inputs, saved_bytes

ACTIVATIONS = list(reference.ACTIVATIONS)


# The kernels' own tests have the whole grid.
BUDGETS = [("eager", norms, p) for norms in NORMS for p in (0.0, 0.1, 0.5)]
BUDGETS += [("triton", "plain", 0.1), ("triton", "both", 0.1)]


# A smooth activation here: relu's derivative jumps where rounding moves z across zero, in eager too.
@pytest.mark.parametrize(("backend", "norms", "dropout_p"), BUDGETS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_error_budget(backend, dtype, factor_dtype, norms, dropout_p):
    inputs = bottleneck_adapter_inputs(131, 160, 24, dtype=dtype, factor_dtype=factor_dtype, **NORMS[norms])
    assert_op_within_budget(backend, inputs, dropout_p=dropout_p, activation="gelu")


@pytest.mark.parametrize("residual", ["x", "other", None])
@pytest.mark.parametrize("residual_after_norm", [False, True])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("learned", [False, True], ids=["number", "learned"])
def test_every_arrangement(residual, norms, residual_after_norm, learned):
    for activation, bias, dropout_p in itertools.product(ACTIVATIONS, [False, True], [0.0, 0.3]):
        inputs = bottleneck_adapter_inputs(
            12, 24, 5, dtype=torch.float64, residual=residual, bias=bias, learned_scaling=learned, **NORMS[norms]
        )
        options = {"activation": activation, "residual_after_norm": residual_after_norm}
        assert_op_within_budget("eager", inputs, dropout_p=dropout_p, **options)


@pytest.mark.parametrize("R", [1, 8, 48, 64, 200, 300])
@pytest.mark.parametrize("K", [64, 384, 768, 1000])
@pytest.mark.parametrize("M", [0, 1, 17, 300])
def test_sizes(M, K, R):
    norms = list(NORMS.values())[(M + K + R) % 4]
    # Of one number in the middle, eager's own error in one call is chance, and of one row all the more.
    seeds = 1 if R > 1 else 32 if M == 1 else 8
    calls = [bottleneck_adapter_inputs(M, K, R, seed=seed, **norms) for seed in range(seeds)]
    assert_op_within_budget("eager", *calls, dropout_p=0.1, activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_width_out(backend):
    for residual in ("other", None):
        inputs = bottleneck_adapter_inputs(40, 24, 6, 56, residual=residual, norm_after=True)
        assert_op_within_budget(backend, inputs, dropout_p=0.1, activation="tanh")


# Of no numbers LayerNorm's statistics are 0/0; the usual modules give no NaN then.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual_after_norm", [False, True], ids=["norm of the sum", "norm of the term"])
@pytest.mark.parametrize(("K", "N"), [(0, 5), (5, 0), (0, 0)], ids=["K0", "N0", "both"])
def test_no_features_as_the_usual_modules(backend, residual_after_norm, K, N):
    torch.manual_seed(0)
    before, down, up, after = nn.LayerNorm(K), nn.Linear(K, 3), nn.Linear(3, N), nn.LayerNorm(N)
    down.bias = nn.Parameter(torch.randn(3))
    for shape in ((K,), (0, K), (4, K), (2, 40, K)):
        x = torch.randn(shape, requires_grad=True)
        residual = x if K == N else torch.randn(*shape[:-1], N, requires_grad=True)
        t = up(down(before(x)).relu())
        expected = residual + after(t) if residual_after_norm else after(residual + t)
        norms = {"norm_before": (before.weight, before.bias), "norm_after": (after.weight, after.bias)}
        options = {"residual": residual, "residual_after_norm": residual_after_norm, **norms}
        with peft_fast.backend(backend):
            y = bottleneck_adapter(x, down.weight, up.weight, down_bias=down.bias, up_bias=up.bias, **options)
        leaves = [*{x, residual}, *(p for module in (before, down, up, after) for p in module.parameters())]
        dy = torch.randn(expected.shape)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("norms", NORMS)
def test_several_blocks(norms, dropout_p, dtype, monkeypatch):
    monkeypatch.setattr(eager.dropout, "BLOCK_ELEMENTS", 4096)
    inputs = bottleneck_adapter_inputs(300, 160, 8, dtype=dtype, factor_dtype=torch.float32, **NORMS[norms])
    assert_op_within_budget("eager", inputs, dropout_p=dropout_p, activation="gelu_new")


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("norms", NORMS)
def test_gradcheck(norms, dropout_p):
    inputs = bottleneck_adapter_inputs(3, 5, 2, dtype=torch.float64, learned_scaling=True, **NORMS[norms])
    names, leaves = zip(*inputs.leaves().items(), strict=True)

    def op(*leaves):
        named = dict(zip(names, leaves, strict=True))
        for norm in NORMS[norms]:
            named[norm] = named.pop(f"{norm}_weight"), named.pop(f"{norm}_bias")
        options = {"dropout_p": dropout_p, "seed": torch.tensor([5]), "activation": "tanh"}
        return bottleneck_adapter(residual=named["x"], **named, **options)

    leaves = [leaf.requires_grad_() for leaf in leaves]
    with peft_fast.backend("eager"):
        assert torch.autograd.gradcheck(op, leaves)
        assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12)], ids=lambda shape: f"{len(shape)}d")
def test_leading_dimensions(backend, shape):
    inputs = bottleneck_adapter_inputs(1, 12, 4, dtype=torch.float64, norm_before=True)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with peft_fast.backend(backend):
        y = bottleneck_adapter(x, residual=x, **inputs.parameters)
    expected = reference.bottleneck_adapter(x, residual=x, **inputs.parameters)
    (dx,), (true_dx,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    assert y.shape == shape
    assert torch.allclose(y, expected, rtol=1e-12)
    assert torch.allclose(dx, true_dx, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    # A transposed x and weights, and an expanded dy, which `sum` gives.
    inputs = bottleneck_adapter_inputs(40, 24, 6, dtype=torch.float64)
    truth = forward_backward(reference.bottleneck_adapter, inputs)
    strided = inputs.to(torch.float64)
    strided.x = strided.residual = inputs.x.detach().t().contiguous().t()
    for name in ("down_weight", "up_weight"):
        strided.parameters[name] = strided.parameters[name].t().contiguous().t()
    with peft_fast.backend(backend):
        actual = forward_backward(bottleneck_adapter, strided)
        strided.dy = torch.ones(1, 1, dtype=torch.float64).expand(40, 24)
        of_ones = forward_backward(bottleneck_adapter, strided)
    for name, value in truth.items():
        assert_within_budget(actual[name], value, value, length=40, name=name)
    inputs.dy = torch.ones(40, 24, dtype=torch.float64)
    for name, value in forward_backward(reference.bottleneck_adapter, inputs).items():
        assert_within_budget(of_ones[name], value, value, length=40, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", ["x", "other"])
@pytest.mark.parametrize("K", [12, 160], ids=["off centre", "centred"])
def test_each_gradient_alone(backend, residual, K):
    options = {"norm_before": True, "norm_after": True, "learned_scaling": True, "residual": residual}
    inputs = bottleneck_adapter_inputs(20, K, 3, dtype=torch.float64, **options)
    call = {"dropout_p": 0.25, "seed": torch.tensor([SEED])}
    keep_mask = mask_of(backend, inputs, 0.25)
    for name, leaf in inputs.leaves().items():
        for other in inputs.leaves().values():
            other.requires_grad_(other is leaf)
        with peft_fast.backend(backend):
            y = bottleneck_adapter(inputs.x, residual=inputs.residual, **inputs.parameters, **call)
        expected = reference.bottleneck_adapter(
            inputs.x, residual=inputs.residual, **inputs.parameters, dropout_p=0.25, keep_mask=keep_mask
        )
        (actual,), (truth,) = torch.autograd.grad(y, leaf, inputs.dy), torch.autograd.grad(expected, leaf, inputs.dy)
        assert_within_budget(actual, truth, truth, length=400, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), [DTYPES[1], DTYPES[4]])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_for_backward(backend, dtype, factor_dtype, norms, p):
    """x itself, z, mean and rstd of a row before each norm, the parameters and the seed: no mask, and never y.

    Without dropout the eager form also keeps what enters the second norm, where making it again would cost a matmul.
    """
    M, K, R = 512, 64, 8
    inputs = bottleneck_adapter_inputs(M, K, R, dtype=dtype, factor_dtype=factor_dtype, **NORMS[norms])
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    known, saved = {leaf.data_ptr() for leaf in leaves}, []
    with (
        peft_fast.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
    ):
        bottleneck_adapter(inputs.x, residual=inputs.x, **inputs.parameters, dropout_p=p, seed=torch.tensor([SEED]))
    others = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in known)
    second = 4 * M * K if backend == "eager" and "norm_after" in NORMS[norms] and not p else 0
    assert others == 8 + 4 * M * R + 4 * 2 * M * len(NORMS[norms]) + second


def test_residual_is_kept_only_for_a_norm_over_it():
    for norms, after, kept in (("plain", False, False), ("after", True, False), ("after", False, True)):
        inputs = bottleneck_adapter_inputs(4096, 32, 4, residual="other", **NORMS[norms])
        inputs.parameters["down_weight"].requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            options = {"dropout_p": 0.1, "residual_after_norm": after}
            bottleneck_adapter(inputs.x, residual=inputs.residual, **inputs.parameters, **options)
        assert (inputs.residual.data_ptr() in {tensor.data_ptr() for tensor in saved}) == kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_same_bits(backend):
    inputs = bottleneck_adapter_inputs(150, 64, 8, norm_before=True, norm_after=True)
    options = {"dropout_p": 0.1, "seed": torch.tensor([3])}
    with peft_fast.backend(backend):
        first, second = (forward_backward(bottleneck_adapter, inputs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_call_draws_its_own_mask():
    for M in (32, 4096):  # below and above the size from which the op has its own function
        inputs = bottleneck_adapter_inputs(M, 64, 4)
        call = {"residual": inputs.x, **inputs.parameters, "dropout_p": 0.5}
        torch.manual_seed(0)
        first, second = (bottleneck_adapter(inputs.x, **call) for _ in range(2))
        torch.manual_seed(0)
        assert torch.equal(bottleneck_adapter(inputs.x, **call), first)
        assert not torch.equal(first, second)
        dropped = ((first - inputs.x).abs() < 1e-7).double().mean()
        assert abs(dropped - 0.5) < 5 * 0.5 / (M * 64) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_recomputes_the_same_mask(backend, use_reentrant):
    inputs = bottleneck_adapter_inputs(64, 48, 4)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]

    def block(x):
        for _ in range(2):
            x = bottleneck_adapter(x, residual=x, **inputs.parameters, dropout_p=0.5)
        return x

    with peft_fast.backend(backend):
        torch.manual_seed(4)
        plain = torch.autograd.grad(block(inputs.x), leaves, inputs.dy)
        torch.manual_seed(4)
        checkpoint(block, inputs.x, use_reentrant=use_reentrant).backward(inputs.dy)
    for leaf, grad in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_zero_up_is_the_residual():
    inputs = bottleneck_adapter_inputs(64, 48, 4, norm_before=True)
    inputs.parameters["up_weight"].zero_()
    inputs.parameters["up_bias"].zero_()
    for dropout_p in (0.0, 0.1):
        y = bottleneck_adapter(inputs.x, residual=inputs.x, **inputs.parameters, dropout_p=dropout_p)
        assert torch.equal(y, inputs.x)


def test_output_may_be_changed_in_place_and_graph_kept():
    inputs = bottleneck_adapter_inputs(6, 8, 2)
    x = inputs.x.view(2, 3, 8).requires_grad_()
    y = bottleneck_adapter(x, residual=x, **inputs.parameters)
    y += 1
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y.sum(), x)[0])


def test_input_changed_in_place_is_a_clear_error():
    inputs = bottleneck_adapter_inputs(4096, 40, 2)
    inputs.parameters["down_weight"].requires_grad_()
    x = inputs.x.requires_grad_() * 1
    y = bottleneck_adapter(x, residual=x, **inputs.parameters, dropout_p=0.1)
    x += 1
    with pytest.raises(RuntimeError, match=r"bottleneck_adapter: .* changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("norms", NORMS)
def test_a_small_call_is_the_usual_calls(norms, dropout_p):
    inputs = bottleneck_adapter_inputs(64, 32, 4, learned_scaling=True, **NORMS[norms])
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    call = {"residual": inputs.x, **inputs.parameters}
    torch.manual_seed(3)
    y = bottleneck_adapter(inputs.x, **call, dropout_p=dropout_p)
    torch.manual_seed(3)
    keep_mask = torch.empty(64, 32).bernoulli_(1 - dropout_p) if dropout_p else None
    expected = reference.bottleneck_adapter(inputs.x, **call, dropout_p=dropout_p, keep_mask=keep_mask)
    grads = torch.autograd.grad(y, leaves, inputs.dy)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected, leaves, inputs.dy)))
    assert y.grad_fn.name() != "_BottleneckAdapterBackward"


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("norms", NORMS)
def test_large_calls_are_ours_where_that_saves_something(norms, activation):
    """Time or bytes: with dropout, a LayerNorm, a scaling, or an activation whose gradient needs what it read."""
    inputs = bottleneck_adapter_inputs(1024, 128, 4, **NORMS[norms])
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    assert inputs.x.numel() >= support.MIN_CPU_ADAPTER_ELEMENTS

    def call(**options):
        options = inputs.parameters | {"activation": activation} | options
        return bottleneck_adapter(inputs.x, residual=inputs.x, **options)

    def is_ours(**options) -> bool:
        return call(**options).grad_fn.name() in ("_BottleneckAdapterBackward", "_NormOfSumBackward")

    for options in ({"dropout_p": 0.1}, {"scaling": 2.0}, {"scaling": torch.ones(1, requires_grad=True)}):
        assert is_ours(**options)
    needs_what_it_read = activation not in ("relu", "tanh", "identity")
    assert is_ours(scaling=1.0) == (needs_what_it_read or bool(NORMS[norms]))
    kept = saved_bytes(lambda: call(scaling=1.0), leaves[1:])
    with peft_fast.backend("eager"):
        assert kept <= saved_bytes(lambda: call(scaling=1.0), leaves[1:])
    other = inputs.x.clone()
    y = bottleneck_adapter(inputs.x, residual=other, **inputs.parameters | {"activation": activation, "scaling": 1.0})
    ours = needs_what_it_read or bool(NORMS[norms].get("norm_before"))  # v cannot take x's place
    assert (y.grad_fn.name() == "_BottleneckAdapterBackward") == ours


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32, torch.float16])
def test_small_calls_on_a_gpu_are_the_usual_calls(factors):
    with FakeTensorMode():
        small, large = (torch.empty(rows, 1024, device="cuda", dtype=torch.bfloat16) for rows in (8192, 16384))
        down, up = (torch.empty(*shape, device="cuda", dtype=factors) for shape in ((8, 1024), (1024, 8)))
        parameters = [down, None, up, *[None] * 5]
        served = [is_usual_call(x, x, parameters, 1.0, "relu", 0.1, False) for x in (small, large)]
        fitting = fits(small, small, parameters, 1.0, "relu", 0.1, 1e-5)
        elsewhere = [down.cpu(), *parameters[1:]]
        assert not fits(small, small, elsewhere, 1.0, "relu", 0.1, 1e-5)
    assert served == [True, False]
    assert fitting == (factors is torch.bfloat16)


def usual_modules(x, parameters):
    z = F.linear(x, parameters["down_weight"], parameters["down_bias"])
    return F.linear(F.gelu(z), parameters["up_weight"], parameters["up_bias"]) * parameters["scaling"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    # x comes from a linear layer in autocast's dtype, the residual from a LayerNorm in fp32, parameters are fp32.
    inputs = bottleneck_adapter_inputs(64, 48, 8, residual="other")
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    with torch.autocast("cpu", dtype=dtype):
        x = inputs.x.to(dtype)
        y = bottleneck_adapter(x, residual=inputs.residual, **inputs.parameters, activation="gelu")
        usual = inputs.residual + usual_modules(x, inputs.parameters)
    assert y.dtype == torch.float32
    truth = reference.bottleneck_adapter(x.float(), residual=inputs.residual, **inputs.parameters, activation="gelu")
    grads = torch.autograd.grad(y, leaves, inputs.dy)
    for value, true_value in zip(grads, torch.autograd.grad(truth, leaves, inputs.dy), strict=True):
        assert torch.allclose(value, true_value, rtol=1e-2, atol=1e-2 * true_value.abs().max().item())
    assert (y - truth).abs().max() <= (usual - truth).abs().max()


BAD = {
    "x": ({"x": torch.randn(4, 9)}, "x does not fit: expected x (..., K)"),
    "transposed": ({"down_weight": torch.randn(8, 2)}, "down_weight does not fit"),
    "residual": ({"residual": torch.randn(4, 9)}, "residual does not fit"),
    "up_weight": ({"up_weight": torch.randn(8, 3)}, "up_weight does not fit"),
    "transposed up": ({"up_weight": torch.randn(2, 8), "residual": torch.randn(4, 8)}, "up_weight does not fit"),
    "down_bias": ({"down_bias": torch.randn(3)}, "down_bias does not fit"),
    "norm": ({"norm_after": (torch.ones(9), torch.ones(9))}, "norm_after_weight does not fit"),
    "no pair": ({"norm_before": torch.ones(8)}, "norm_before must be a pair of tensors, weight and bias, got Tensor"),
    "no bias": ({"norm_after": (torch.ones(8), None)}, "norm_after must be a pair of tensors, weight and bias"),
    "column": ({"down_bias": torch.randn(2, 1)}, "down_bias does not fit"),
    "dimensions": ({"down_weight": torch.randn(1, 2, 8)}, "the number of dimensions does not fit"),
    "eps": ({"norm_before": (torch.ones(8), torch.ones(8)), "eps": -1.0}, "eps must not be negative, got -1.0"),
    "activation": ({"activation": "mish"}, "activation must be one of relu, gelu"),
    "dropout": ({"dropout_p": 1.5}, "dropout_p must lie in [0, 1), got 1.5"),
    "integer": ({"x": torch.ones(4, 8, dtype=torch.int64)}, "x has dtype torch.int64"),
    "dtypes": ({"up_weight": torch.randn(8, 2).double()}, "all parameters must have one dtype"),
    "half": ({"x": torch.randn(4, 8).double()}, "x's dtype, or float32"),
    "device": ({"up_bias": torch.empty(8, device="meta")}, "x is on cpu and up_bias on meta"),
    "scaling": ({"scaling": "big"}, "scaling must be a number"),
    "scalings": ({"scaling": torch.ones(2)}, "scaling must be a number or a tensor of one element"),
    "seed": ({"seed": torch.tensor([1.0])}, "seed must be one int64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments = {"x": torch.randn(4, 8), "down_weight": torch.randn(2, 8), "up_weight": torch.randn(8, 2)}
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=f"bottleneck_adapter: .*{re.escape(message)}"):
        bottleneck_adapter(**(arguments | changes))

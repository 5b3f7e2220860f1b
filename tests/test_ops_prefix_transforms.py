"""The prefix attention op under checkpointing, autocast, compilation and the transforms of torch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import peft_fast
from peft_fast import reference
from peft_fast.eager.prefix_attention import Options
from peft_fast.ops import prefix_attention
from peft_fast.ops.prefix_attention import _choose_plan
from peft_fast.testing import prefix_attention_inputs

BACKENDS = ["eager", "triton"]
SEED = 29


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("numel", ["small", "large"])
def test_checkpointing_draws_the_same_mask(use_reentrant, numel):
    size = 8 if numel == "small" else 200
    inputs = prefix_attention_inputs(2, 4, 2, size, size, 3, 16)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}

    def call(*tensors):
        return prefix_attention(*tensors, dropout_p=0.3)

    results = []
    for run in (call, lambda *tensors: checkpoint(call, *tensors, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        y = run(*leaves.values())
        y.backward(inputs.dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
        for leaf in leaves.values():
            leaf.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    """As torch's attention: in autocast's dtype, the prefix kept in float32."""
    inputs = prefix_attention_inputs(2, 4, 2, 16, 16, 3, 16)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}
    for backend in ("auto", "eager"):
        with peft_fast.backend(backend), torch.autocast("cpu", torch.bfloat16):
            y = prefix_attention(**leaves)
        assert y.dtype == torch.bfloat16
        y.backward(inputs.dy.bfloat16())
        assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())


OPTIONS = [{}, {"is_causal": True, "dropout_p": 0.2}, {"softcap": 2.0, "sliding_window": 5}]


# Keys and values lie (Z, T, H_KV, DH), as a projection leaves them, or (Z, H_KV, T, DH), as a cache does.
@pytest.mark.parametrize("layout", ["projected", "cached"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_opcheck(backend, options, layout):
    inputs = prefix_attention_inputs(2, 2, 1, 16, 18, 3, 16, gate="softcap" in options)
    leaves = inputs.leaves()
    if layout == "cached":
        leaves |= {name: leaves[name].contiguous() for name in ("key", "value")}
        # As a reparametrised prefix is, not dense.
        leaves |= {name: leaves[name].mT.contiguous().mT for name in ("prefix_key", "prefix_value")}
    tensors = [leaves.get(name) for name in ("query", "key", "value", "prefix_key", "prefix_value")]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    tensors += [torch.ones(16, 18, dtype=torch.bool), inputs.gate]
    threshold = reference.drop_threshold(options.get("dropout_p", 0.0))
    seed = torch.tensor([SEED]) if threshold else None
    window, cap = options.get("sliding_window"), options.get("softcap")
    rules = [threshold, seed, options.get("is_causal", False), window, cap, 0.25]
    torch.library.opcheck(torch.ops.peft_fast.prefix_attention, (*tensors, *rules, backend, ""))
    plan = _choose_plan(tensors, Options(*rules), backend)
    plain = [None if tensor is None else tensor.detach() for tensor in tensors]
    torch.library.opcheck(torch.ops.peft_fast.prefix_attention_fwd, (*plain, *rules, plan))
    _, *lse = results = torch.ops.peft_fast.prefix_attention_fwd(*plain, *rules, plan)
    needs = ["query", "key", "value", "prefix_key", "prefix_value"]
    args = (inputs.dy, *plain, *rules, results if lse else [], needs, plan)
    torch.library.opcheck(torch.ops.peft_fast.prefix_attention_bwd, args)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [8, 400])
def test_compiled(options, size):
    """One graph, and the same results; small calls as torch's own attention."""
    torch._dynamo.reset()
    inputs = prefix_attention_inputs(2, 4, 2, size, size, 3, 16)
    seed = {"seed": torch.tensor([SEED])} if "dropout_p" in options else {}

    def call(*tensors):
        return prefix_attention(*tensors, **options, **seed)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for run in (call, compiled):
        leaves = [leaf.detach().requires_grad_() for leaf in inputs.leaves().values()]
        y = run(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_function_transforms_and_traces():
    inputs = prefix_attention_inputs(2, 4, 2, 96, 96, 3, 16, dtype=torch.float64)
    leaves = inputs.leaves()
    options = {"dropout_p": 0.2, "seed": torch.tensor([SEED])}

    def loss(prefix_key):
        return (prefix_attention(**leaves | {"prefix_key": prefix_key}, **options) * inputs.dy).sum()

    plain = inputs.prefix_key.detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss(plain), plain)
    torch.testing.assert_close(torch.func.grad(loss)(inputs.prefix_key), expected)
    jvp = torch.func.jvp(loss, (inputs.prefix_key,), (torch.ones_like(inputs.prefix_key),))[1]
    torch.testing.assert_close(jvp, expected.sum())
    leaf = inputs.prefix_key.detach().requires_grad_()
    graph = make_fx(lambda t: torch.autograd.grad(loss(t), t))(leaf)
    torch.testing.assert_close(graph(leaf)[0], expected)
    y = prefix_attention(**leaves | {"prefix_key": leaf}, **options)
    batched = torch.autograd.grad(y, leaf, torch.stack([inputs.dy, 2 * inputs.dy]), is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack([expected, 2 * expected]))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(leaf) for name, leaf in leaves.items()}
        assert prefix_attention(**fake).shape == inputs.query.shape


def test_transforms_of_small_calls():
    """Which else run torch's own attention, whose fused kernel has no forward-mode and no second derivatives."""
    inputs = prefix_attention_inputs(2, 4, 2, 8, 8, 3, 16, dtype=torch.float64)

    def loss(prefix_key):
        return (prefix_attention(**inputs.leaves() | {"prefix_key": prefix_key}) * inputs.dy).sum()

    ones = torch.ones_like(inputs.prefix_key)
    jvp = torch.func.jvp(loss, (inputs.prefix_key,), (ones,))[1]
    torch.testing.assert_close(jvp, torch.func.grad(loss)(inputs.prefix_key).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(inputs.prefix_key, ones))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, jvp)
    batch = torch.stack([inputs.prefix_key, 2 * inputs.prefix_key])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(key) for key in batch]))
    with peft_fast.backend("eager"):
        assert torch.autograd.gradgradcheck(loss, inputs.prefix_key.requires_grad_())


def test_an_input_changed_in_place_is_an_error():
    inputs = prefix_attention_inputs(2, 4, 2, 96, 96, 3, 16)
    query = inputs.query.clone()
    with peft_fast.backend("eager"):
        y = prefix_attention(**inputs.leaves() | {"query": query, "prefix_key": inputs.prefix_key.requires_grad_()})
    query += 1
    with pytest.raises(RuntimeError, match="prefix_attention: a tensor saved for backward"):
        y.backward(inputs.dy)


def test_create_graph_through_inputs_that_depend_on_each_other():
    query, key = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    prefix = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def gradients(op):
        y = op(query, key, 2 * key, prefix, prefix)
        return torch.autograd.grad(y.square().sum(), (query, key, prefix), create_graph=True)

    with peft_fast.backend("eager"):
        actual = gradients(prefix_attention)
    for value, expected in zip(actual, gradients(reference.prefix_attention), strict=True):
        assert torch.allclose(value, expected)

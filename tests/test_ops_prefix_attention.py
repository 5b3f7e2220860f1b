"""The prefix attention op against its reference, under every transform of torch that it promises to serve."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from prefix_calls import (
    MASKS,
    RULES,
    SEED,
    additive,
    assert_op_within_budget,
    boolean_mask,
    forward_backward,
    wide,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_fast
from op_dtypes import DTYPES
from peft_fast import reference, support
from peft_fast.ops import prefix_attention
from peft_fast.ops.prefix_attention import _is_small
from peft_fast.testing import (
    PrefixAttentionInputs,
    assert_within_budget,
    prefix_attention_inputs,
)

BACKENDS = ["eager", "triton"]


LENGTHS = list(itertools.product([1, 7, 64, 130], repeat=2))
PREFIXES, HEAD_SIZES, GROUPS = [1, 5, 16, 100], [16, 40, 64, 128], [1, 4, 8]
SIZES = list(itertools.product(PREFIXES, HEAD_SIZES, GROUPS))


def _seeded(shape: tuple[int, ...], seed: int, **options) -> PrefixAttentionInputs:
    return prefix_attention_inputs(*shape, **options, seed=seed)


# Each prefix length meets each head size and group, and each of them all pairs of lengths. Of few numbers, eager's own
# error in one call is chance.
@pytest.mark.parametrize(("P", "DH", "group"), SIZES)
@pytest.mark.parametrize(("dtype", "prefix_dtype"), DTYPES)
def test_sizes(dtype, prefix_dtype, P, DH, group):
    i = SIZES.index((P, DH, group))
    for j, (S, T) in enumerate(LENGTHS[(i + i // 4) % 4 :: 4]):
        seeds = 4 if min(S, T) < 64 else 1
        shape = (2, group, 1, S, T, P, DH)
        draw = functools.partial(_seeded, shape, dtype=dtype, prefix_dtype=prefix_dtype)
        assert_op_within_budget("eager", *map(draw, range(seeds)), draw=draw, is_causal=bool(j % 2))


@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gate"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize(("dtype", "prefix_dtype"), DTYPES)
def test_masks_and_rules(dtype, prefix_dtype, dropout_p, mask, gate):
    shape = (2, 4, 2, 66, 86, 16, 40)
    draw = functools.partial(_seeded, shape, dtype=dtype, prefix_dtype=prefix_dtype, gate=gate)
    # The worst row decides, and of one draw it is chance whose worst row is worse.
    calls = [draw(seed) for seed in range(6 if dtype == torch.float32 else 1)]
    rules = list(RULES.values())[(list(MASKS).index(mask) + gate) % len(RULES)] if mask != "none" else {}
    for options in [rules, *(RULES.values() if mask == "none" else [{}])]:
        call = options | {"dropout_p": dropout_p, "attn_mask": MASKS[mask](dtype)}
        assert_op_within_budget("eager", *calls, draw=draw, **call)


@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gate"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_kernels_behind_the_op(dropout_p, gate):
    inputs = prefix_attention_inputs(2, 4, 2, 66, 70, 5, 40, gate=gate)
    assert_op_within_budget("triton", inputs, dropout_p=dropout_p, attn_mask=boolean_mask(2, 66, 70), softcap=2.0)
    assert_op_within_budget("triton", inputs, dropout_p=dropout_p, is_causal=True)


@pytest.mark.parametrize("shape", [(1, 4, 130, 150), (2, 1, 130, 150), (2, 4, 1, 150), (130, 1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_bias_that_requires_grad_gets_its_gradient(shape, dropout_p):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = prefix_attention_inputs(2, 4, 2, 130, 150, 5, 16, dtype=dtype)
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        assert_op_within_budget("eager", inputs, dropout_p=dropout_p, attn_mask=bias, softcap=3.0)


def test_such_a_bias_is_not_for_the_kernels():
    inputs = prefix_attention_inputs(1, 2, 2, 4, 4, 2, 16)
    bias = torch.zeros(4, 4, requires_grad=True)
    with peft_fast.backend("triton"), pytest.raises(NotImplementedError, match="attn_mask requires grad"):
        prefix_attention(**inputs.leaves(), attn_mask=bias)


def test_the_gradient_of_an_expanded_bias():
    inputs = prefix_attention_inputs(2, 4, 4, 7, 9, 3, 16)
    bias = torch.randn(2, 1, 1, 9, requires_grad=True)
    grads = []
    for op in (prefix_attention, reference.prefix_attention):
        with peft_fast.backend("eager"):
            y = op(**inputs.leaves(), attn_mask=bias.expand(2, 1, 7, 9))
        grads.append(torch.autograd.grad(y, bias, inputs.dy)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"sliding_window": 3}], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_small_calls_run_as_usual(options, mask):
    """Where a call is small, torch's fused attention runs, and gives the same."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = prefix_attention_inputs(2, 4, 2, 7, 9, 3, 16, dtype=dtype)
        assert inputs.query.shape[:3].numel() * 12 < support.MIN_CPU_ATTENTION_LOGITS
        masks = {None: None, "bool": boolean_mask(2, 7, 9)}
        masks["float"] = additive(masks["bool"], dtype, -math.inf)
        call = options | {"attn_mask": masks[mask]}
        actual = forward_backward(prefix_attention, inputs, **call)
        expected = forward_backward(reference.prefix_attention, inputs, **call)
        truth = forward_backward(reference.prefix_attention, inputs.to(torch.float64), **wide(call))
        for name in truth:
            assert_within_budget(actual[name], truth[name], expected[name], length=64, name=name)


@pytest.mark.parametrize(("S", "T", "small"), [(512, 512, True), (1024, 1024, False), (1, 1024, False), (1, 64, True)])
def test_small_calls_on_a_gpu(S, T, small):
    with FakeTensorMode():
        query, key = (torch.empty(16, 16, length, 64, device="cuda", dtype=torch.bfloat16) for length in (S, T))
        prefix_key = torch.empty(16, 8, 64, device="cuda", dtype=torch.bfloat16)
        assert _is_small(query, key, prefix_key, 0.0) == _is_small(query, key, prefix_key, 0.1) == small


def test_a_mask_wider_than_the_query_is_not_rounded():
    """As torch's own attention would: ALiBi's distances in fp32 beside bf16."""
    inputs = prefix_attention_inputs(1, 2, 2, 64, 64, 3, 16, dtype=torch.bfloat16)
    distance = (torch.arange(64) - torch.arange(64)[:, None]).float() * 2 ** (-8 / 12)
    actual = prefix_attention(**inputs.leaves(), attn_mask=distance)
    truth = reference.prefix_attention(**inputs.to(torch.float64).leaves(), attn_mask=distance.double())
    # The reference in bf16 rounds the mask itself: the truth, rounded, sets the budget.
    assert_within_budget(actual, truth, truth.bfloat16(), length=64)


def test_large_calls_run_as_usual_where_no_key_can_be_left_out():
    """Of all that torch's fused attention serves, ours is faster where rows see different keys."""
    leaves = {
        name: leaf.requires_grad_()
        for name, leaf in prefix_attention_inputs(2, 8, 2, 300, 300, 16, 16).leaves().items()
    }
    assert leaves["query"].shape[:3].numel() * 316 > support.MIN_CPU_ATTENTION_LOGITS
    padding = torch.arange(300) < torch.tensor([[300], [200]])[:, None, None]
    causal = torch.ones(300, 300, dtype=torch.bool).tril()

    def is_ours(**options) -> bool:
        return "_PrefixAttention" in type(prefix_attention(**leaves, **options).grad_fn).__name__

    assert not is_ours()
    assert not is_ours(attn_mask=padding)
    assert not is_ours(attn_mask=padding.expand(2, 1, 300, 300).contiguous())
    assert is_ours(attn_mask=padding, dropout_p=0.1)
    assert is_ours(is_causal=True)
    assert is_ours(attn_mask=causal)
    assert is_ours(attn_mask=padding & causal)
    assert is_ours(sliding_window=30)
    assert is_ours(attn_mask=torch.zeros(300, 300).masked_fill(~causal, -torch.inf))
    # One block of rows sees all keys together.
    leaves = {
        name: leaf.requires_grad_()
        for name, leaf in prefix_attention_inputs(64, 2, 2, 128, 128, 16, 16).leaves().items()
    }
    assert not is_ours(is_causal=True)
    assert is_ours(is_causal=True, dropout_p=0.1)


def test_small_calls_drop():
    inputs = prefix_attention_inputs(64, 2, 2, 4, 4, 4, 16)
    torch.manual_seed(0)
    y = prefix_attention(**inputs.leaves(), dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(y, prefix_attention(**inputs.leaves(), dropout_p=0.5))
    assert not torch.equal(y, prefix_attention(**inputs.leaves(), dropout_p=0.5))


def test_zeros_are_no_neutral_prefix_but_a_zero_gate_is():
    inputs = prefix_attention_inputs(2, 4, 2, 33, 33, 5, 16, dtype=torch.float64)
    tensors = inputs.leaves() | {
        "prefix_key": torch.zeros(2, 5, 16).double(),
        "prefix_value": torch.zeros(2, 5, 16).double(),
    }
    plain = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, enable_gqa=True)
    with peft_fast.backend("eager"):
        assert not torch.allclose(prefix_attention(**tensors), plain, atol=0.01)
        gated = prefix_attention(**inputs.leaves(), gate=torch.zeros(4).double())
    torch.testing.assert_close(gated, plain, rtol=1e-12, atol=1e-12)


def test_causal_is_aligned_bottom_right():
    """As a cache needs it: the last query sees all keys. torch's own flag aligns top-left."""
    inputs = prefix_attention_inputs(1, 2, 2, 3, 8, 2, 16, dtype=torch.float64)
    with peft_fast.backend("eager"):
        y = prefix_attention(**inputs.leaves(), is_causal=True)
        assert torch.equal(y, prefix_attention(**inputs.leaves(), attn_mask=torch.ones(3, 8, dtype=torch.bool).tril(5)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_calls(backend):
    for Z, S, T in [(2, 5, 0), (2, 0, 5), (0, 5, 5)]:
        assert_op_within_budget(backend, prefix_attention_inputs(Z, 4, 2, S, T, 3, 16))


# A row that sees no key is no excuse to take what is not a number for 0.
@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_stays_so(backend, gate):
    inputs = prefix_attention_inputs(1, 1, 1, 4, 2, 3, 16, gate=gate)
    options = {"is_causal": True}  # the first two queries see no key
    with peft_fast.backend(backend):
        clean = forward_backward(prefix_attention, inputs, **options)
        inputs.query[0, 0, 3, 5] = torch.nan
        result = forward_backward(prefix_attention, inputs, **options)
    for name in ("y", "query"):
        assert result[name][0, 0, 3].isnan().all(), name
        assert torch.equal(result[name][0, 0, :3], clean[name][0, 0, :3]), name
    for name in ("key", "value", "prefix_key", "prefix_value"):
        assert result[name].isnan().any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout(backend):
    """y is laid out (Z, S, H, DH), so that a model's transpose back is free, and is no view."""
    inputs = prefix_attention_inputs(2, 4, 2, 16, 16, 3, 16)
    query = inputs.query.detach().requires_grad_()
    with peft_fast.backend(backend):
        y = prefix_attention(**inputs.leaves() | {"query": query})
    assert y.transpose(1, 2).is_contiguous()
    assert not y._is_view()
    if backend == "eager":  # the kernels keep y, as torch's fused attention does
        y += 1
    y.sum().backward()


def test_gradcheck():
    """The kernels' own is beside them."""
    inputs = prefix_attention_inputs(1, 4, 2, 5, 6, 3, 8, dtype=torch.float64, gate=True)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}

    def call(*tensors):
        options = {"is_causal": True, "softcap": 2.0, "dropout_p": 0.3, "seed": torch.tensor([SEED])}
        return prefix_attention(**dict(zip(leaves, tensors, strict=True)), **options)

    with peft_fast.backend("eager"):
        torch.autograd.gradcheck(call, tuple(leaves.values()))
        torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed_gets_a_gradient(backend):
    inputs = prefix_attention_inputs(2, 4, 2, 9, 9, 3, 16, dtype=torch.float64, gate=True)
    expected = forward_backward(reference.prefix_attention, inputs)
    names = list(inputs.leaves())
    subsets = [{name} for name in names] + [set(names) - {name} for name in names]
    for chosen in subsets if backend == "eager" else subsets[3:9:2]:  # the kernels' own tests have them all
        leaves = {name: leaf.detach().requires_grad_(name in chosen) for name, leaf in inputs.leaves().items()}
        with peft_fast.backend(backend):
            prefix_attention(**leaves).backward(inputs.dy)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in chosen)
            if name in chosen:
                torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_nothing_of_the_logits_size_is_kept(dropout_p):
    """The eager form keeps its inputs; the kernels y and one number a row."""
    inputs = prefix_attention_inputs(2, 4, 2, 128, 128, 16, 16)
    for backend in BACKENDS:
        kept: dict[int, torch.Tensor] = {}
        leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with peft_fast.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = prefix_attention(**leaves, is_causal=True, dropout_p=dropout_p)
        inputs_kept = sum(leaf.numel() for leaf in leaves.values())
        rows = 0 if backend == "eager" else y.numel() + y.shape[:3].numel()
        assert sum(tensor.numel() for tensor in kept.values()) == inputs_kept + rows + bool(dropout_p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_each_time(backend):
    inputs = prefix_attention_inputs(3, 8, 2, 40, 40, 5, 16, dtype=torch.bfloat16, prefix_dtype=torch.float32)
    with peft_fast.backend(backend):
        options = {"is_causal": True, "dropout_p": 0.1, "seed": torch.tensor([SEED])}
        first, second = (forward_backward(prefix_attention, inputs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prefix_gradients_of_a_large_batch_are_summed_in_float32():
    """Summed in bf16, 512 sequences would leave three digits less."""
    inputs = prefix_attention_inputs(512, 2, 2, 4, 4, 3, 16, dtype=torch.bfloat16, prefix_dtype=torch.float32)
    with peft_fast.backend("eager"):
        actual = forward_backward(prefix_attention, inputs)
    rounded = inputs.to(torch.float64)
    rounded.prefix_key, rounded.prefix_value = (
        prefix.bfloat16().double() for prefix in (inputs.prefix_key, inputs.prefix_value)
    )
    truth = forward_backward(reference.prefix_attention, rounded)
    for name in ("prefix_key", "prefix_value"):
        error = (actual[name] - truth[name]).abs().max() / truth[name].abs().max()
        assert error < 1e-5


def test_errors_name_the_argument_and_the_shapes():
    inputs = prefix_attention_inputs(2, 4, 2, 5, 6, 3, 16)
    wrong = {
        "key": inputs.key[..., :8],
        "value": inputs.value[:, :1],
        "prefix_key": inputs.prefix_key[:1],
        "prefix_value": inputs.prefix_value[:, :2],
        "attn_mask": torch.ones(5, 5),
        "gate": torch.ones(2),
    }
    for name, tensor in wrong.items():
        with pytest.raises(ValueError, match=f"prefix_attention: {name} does not fit: expected .*query \\(2, 4, 5, 16"):
            prefix_attention(**inputs.leaves() | {name: tensor})
    with pytest.raises(ValueError, match="prefix_key does not fit"):
        prefix_attention(**inputs.leaves() | {n: getattr(inputs, n)[:, :0] for n in ("prefix_key", "prefix_value")})
    with pytest.raises(ValueError, match="number of heads does not fit"):
        prefix_attention(**inputs.leaves() | {"query": inputs.query[:, :3]})
    with pytest.raises(ValueError, match=r"query, key and value must have one dtype, got .*key torch\.float64"):
        prefix_attention(**inputs.leaves() | {"key": inputs.key.double()})
    with pytest.raises(ValueError, match="prefix must have query's dtype"):
        prefix_attention(**inputs.leaves() | {n: getattr(inputs, n).half() for n in ("prefix_key", "prefix_value")})
    for name, value in {"sliding_window": 0, "softcap": 0.0, "dropout_p": 1.0}.items():
        with pytest.raises(ValueError, match=name):
            prefix_attention(**inputs.leaves(), **{name: value})
    with pytest.raises(ValueError, match="seed must be one int64"):
        prefix_attention(**inputs.leaves(), dropout_p=0.1, seed=torch.ones(1))

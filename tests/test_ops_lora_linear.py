"""The op against its reference, on both backends, under every transform of torch that it promises to serve."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_fast
from op_dtypes import DTYPES
from peft_fast import eager, reference, support
from peft_fast.ops import lora_linear
from peft_fast.testing import LoraLinearInputs, assert_within_budget, lora_linear_inputs

BACKENDS = ["eager", "triton"]
NAMES = ("y", "dx", "da", "db", "dbias")


def mask_of(backend: str, seed: torch.Tensor, shape: tuple[int, int], dropout_p: float) -> torch.Tensor | None:
    if not dropout_p:
        return None
    threshold = reference.drop_threshold(dropout_p)
    if backend == "eager":
        return eager.dropout_mask(seed, shape, threshold)
    from peft_fast.kernels.dropout import dropout_mask

    return dropout_mask(seed, shape, threshold)


def forward_backward(op, inputs: LoraLinearInputs, **kwargs) -> list[torch.Tensor]:
    """y and the gradients of x, lora_a, lora_b and, where there is one, bias."""
    leaves = [inputs.x, inputs.lora_a, inputs.lora_b] + ([] if inputs.bias is None else [inputs.bias])
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x, lora_a, lora_b, *bias = leaves
    y = op(x, inputs.weight, lora_a, lora_b, bias=bias[0] if bias else None, scaling=inputs.scaling, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)]


def assert_op_within_budget(inputs: LoraLinearInputs, backend: str, dropout_p: float = 0.0) -> None:
    M, K = inputs.x.shape
    seed = torch.tensor([29])
    keep_mask = mask_of(backend, seed, (M, K), dropout_p)
    with peft_fast.backend(backend):
        actual = forward_backward(lora_linear, inputs, dropout_p=dropout_p, seed=seed)
    expected = forward_backward(reference.lora_linear, inputs, dropout_p=dropout_p, keep_mask=keep_mask)
    truth = forward_backward(reference.lora_linear, inputs.to(torch.float64), dropout_p=dropout_p, keep_mask=keep_mask)
    length = max(M, K, inputs.weight.shape[0])
    for name, *values in zip(NAMES, actual, truth, expected, strict=False):
        assert_within_budget(*values, length=length, name=name)
    # The low-rank term by itself, and block by block, where a wrong tile cannot hide.
    base = (inputs.to(torch.float64).x @ inputs.weight.double().t()) if M else truth[0]
    low_rank = [(values[0].double() - base) for values in (actual, truth, expected)]
    for start in range(0, M, 64):
        block = [values[start : start + 64] for values in low_rank]
        error, budget = (block[0] - block[1]).abs().max(), (block[2] - block[1]).abs().max()
        eps, scale = torch.finfo(inputs.x.dtype).eps, truth[0][start : start + 64].abs().max()
        slack = 4 * math.sqrt(length) if inputs.x.dtype == torch.float64 else 2
        assert error <= slack * (budget + eps * scale), f"rows {start}.. of the low-rank term"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5], ids=lambda p: f"p{p}")
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_error_budget(backend, dtype, factor_dtype, dropout_p):
    inputs = lora_linear_inputs(131, 160, 96, 8, dtype=dtype, factor_dtype=factor_dtype)
    inputs.x[::7] = 0  # exact zeros that are not dropped
    assert_op_within_budget(inputs, backend, dropout_p)


# Ranks off the powers of two, sizes off the tiles, and each kind of emptiness; the kernels have a wider grid.
@pytest.mark.parametrize(
    ("M", "K", "N", "R"),
    [(0, 8, 8, 2), (1, 1, 1, 1), (17, 33, 5, 3), (300, 65, 130, 12), (64, 96, 32, 100), (9, 400, 40, 384)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(backend, M, K, N, R):
    assert_op_within_budget(lora_linear_inputs(M, K, N, R, bias=R % 2 == 0), backend, dropout_p=0.1)


def test_several_dropout_blocks():
    assert_op_within_budget(lora_linear_inputs(2700, 400, 32, 4), "eager", dropout_p=0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("M", "R", "dropout_p"), [(256, 8, 0.0), (256, 8, 0.1), (257, 8, 0.3), (256, 16, 0.1), (256, 1, 0.0)]
)
def test_rows_in_a_batch_for_each_thread(monkeypatch, M, R, dropout_p, dtype):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    # Large enough for `narrow_mm` and `tall_mm` to take their batched forms, and 257 rows that fill no batches.
    assert_op_within_budget(lora_linear_inputs(M, 320, 288, R, dtype=dtype), "eager", dropout_p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(backend, dropout_p):
    # The kernels run in the interpreter, for every element.
    M, K, N = (5, 6, 7) if backend == "eager" else (3, 2, 2)
    inputs = lora_linear_inputs(M, K, N, 2, dtype=torch.float64, scaling=1 / 3)

    def op(x, lora_a, lora_b, bias):
        seed = torch.tensor([5])
        return lora_linear(x, inputs.weight, lora_a, lora_b, bias=bias, scaling=1 / 3, dropout_p=dropout_p, seed=seed)

    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.bias)]
    with peft_fast.backend(backend):
        assert torch.autograd.gradcheck(op, leaves)
        assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (2, 1, 3, 12)], ids=lambda shape: f"{len(shape)}d")
def test_leading_dimensions(backend, shape):
    inputs = lora_linear_inputs(1, 12, 20, 4, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    call = (inputs.weight, inputs.lora_a.requires_grad_(), inputs.lora_b.requires_grad_())
    with peft_fast.backend(backend):
        y = lora_linear(x, *call, bias=inputs.bias)
    expected = reference.lora_linear(x, *call, bias=inputs.bias)
    assert y.shape == (*shape[:-1], 20)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = (x, inputs.lora_a, inputs.lora_b)
    actual, truth = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    for name, value, true_value in zip(NAMES, [y, *actual], [expected, *truth], strict=False):
        assert_within_budget(value, true_value.detach(), true_value, length=20, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5], ids=lambda p: f"p{p}")
@pytest.mark.parametrize("leading", [(3,), (2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize(("K", "N"), [(0, 5), (5, 0), (0, 0)])
def test_without_features(backend, K, N, leading, dropout_p):
    inputs = lora_linear_inputs(1, max(K, 1), max(N, 1), 2)
    x, dy = torch.ones(*leading, K, requires_grad=True), torch.ones(*leading, N)
    a, b = inputs.lora_a[:, :K].requires_grad_(), inputs.lora_b[:N].requires_grad_()
    bias = inputs.bias[:N].requires_grad_()

    def run(op, **options):
        y = op(x, inputs.weight[:N, :K], a, b, bias=bias, **options)
        return [y, *torch.autograd.grad(y, (x, a, b, bias), dy)]

    with peft_fast.backend(backend):
        actual = run(lora_linear, dropout_p=dropout_p)
    for value, expected in zip(actual, run(reference.lora_linear), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    # A transposed x, a transposed weight (Conv1D stores (K, N)) and an expanded dy, which `sum` gives.
    inputs = lora_linear_inputs(40, 24, 36, 4, dtype=torch.float64)
    plain = forward_backward(reference.lora_linear, inputs)
    inputs.x = inputs.x.t().contiguous().t()
    inputs.weight = inputs.weight.t().contiguous().t()
    inputs.dy = torch.ones(1, 1, dtype=torch.float64).expand(40, 36)
    with peft_fast.backend(backend):
        actual = forward_backward(lora_linear, inputs)
    inputs.dy = torch.ones(40, 36, dtype=torch.float64)
    truth = forward_backward(reference.lora_linear, inputs)
    assert torch.allclose(truth[0], plain[0])
    for name, value, true_value in zip(NAMES, actual, truth, strict=True):
        assert_within_budget(value, true_value, true_value, length=40, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "needs",
    list(itertools.product([False, True], repeat=4)),
    ids=lambda needs: "".join(letter if need else "-" for letter, need in zip("xabd", needs, strict=True)),
)
def test_only_what_is_needed_is_computed(backend, needs):
    inputs = lora_linear_inputs(20, 12, 16, 2, dtype=torch.float64)
    leaves = [inputs.x, inputs.lora_a, inputs.lora_b, inputs.bias]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    seed, dropout_p = torch.tensor([1]), 0.25
    keep_mask = mask_of(backend, seed, (20, 12), dropout_p)
    call = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    with peft_fast.backend(backend):
        y = lora_linear(*call, bias=inputs.bias, dropout_p=dropout_p, seed=seed)
    truth = reference.lora_linear(*call, bias=inputs.bias, dropout_p=dropout_p, keep_mask=keep_mask)
    assert y.requires_grad == any(needs)
    needed = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if needed:
        for value, true_value in zip(
            torch.autograd.grad(y, needed, inputs.dy), torch.autograd.grad(truth, needed, inputs.dy), strict=True
        ):
            assert_within_budget(value, true_value, true_value, length=20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES[1:])
def test_saved_for_backward(backend, dtype, factor_dtype):
    """x itself, M·R fp32, the parameters and the 8-byte seed, nothing else."""
    M, K, N, R = 128, 64, 96, 8
    inputs = lora_linear_inputs(M, K, N, R, dtype=dtype, factor_dtype=factor_dtype)
    known = {tensor.data_ptr() for tensor in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)}
    for tensor in (inputs.x, inputs.lora_a, inputs.lora_b):
        tensor.requires_grad_()
    saved = []
    with (
        peft_fast.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
    ):
        lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, bias=inputs.bias, dropout_p=0.1)
    others = sorted(tensor.nbytes for tensor in saved if tensor.data_ptr() not in known)
    assert known <= {tensor.data_ptr() for tensor in saved}
    assert others == [8, 4 * M * R]


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_a_frozen_factor_saves_less(frozen):
    inputs = lora_linear_inputs(64, 32, 48, 4)
    inputs.lora_a.requires_grad_(frozen != "lora_a")
    inputs.lora_b.requires_grad_(frozen != "lora_b")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    shapes = [tuple(tensor.shape) for tensor in saved]
    assert ((64, 32) in shapes) == (frozen != "lora_a")
    assert ((64, 4) in shapes) == (frozen != "lora_b")


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_same_bits(backend):
    inputs = lora_linear_inputs(150, 64, 96, 8)
    with peft_fast.backend(backend):
        runs = [forward_backward(lora_linear, inputs, dropout_p=0.1, seed=torch.tensor([3])) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_each_call_draws_its_own_mask():
    inputs = lora_linear_inputs(32, 64, 48, 4)
    call = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    torch.manual_seed(0)
    first, second = (lora_linear(*call, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(lora_linear(*call, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_recomputes_the_same_mask(backend, use_reentrant):
    inputs = lora_linear_inputs(64, 48, 48, 4)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b)]

    def block(x):
        for _ in range(2):
            x = lora_linear(x, inputs.weight, inputs.lora_a, inputs.lora_b, dropout_p=0.5)
        return x

    with peft_fast.backend(backend):
        torch.manual_seed(4)
        plain = torch.autograd.grad(block(inputs.x), leaves, inputs.dy)
        torch.manual_seed(4)
        y = checkpoint(block, inputs.x, use_reentrant=use_reentrant)
        y.backward(inputs.dy)
    for leaf, grad in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_backward_keeps_the_backend_of_forward():
    inputs = lora_linear_inputs(64, 64, 64, 4)
    x = inputs.x.requires_grad_()
    seed = torch.tensor([2])
    with peft_fast.backend("triton"):
        y = lora_linear(x, inputs.weight, inputs.lora_a, inputs.lora_b, dropout_p=0.5, seed=seed)
    keep_mask = mask_of("triton", seed, (64, 64), 0.5)
    truth = reference.lora_linear(
        x.double(),
        *(t.double() for t in (inputs.weight, inputs.lora_a, inputs.lora_b)),
        dropout_p=0.5,
        keep_mask=keep_mask,
    )
    (dx,), (true_dx,) = torch.autograd.grad(y, x, inputs.dy), torch.autograd.grad(truth, x, inputs.dy.double())
    assert torch.allclose(dx, true_dx.float(), atol=1e-5)  # with eager's own mask half of the elements were off


def test_output_may_be_changed_in_place_and_graph_kept():
    inputs = lora_linear_inputs(6, 8, 10, 2)
    x = inputs.x.view(2, 3, 8).requires_grad_()
    y = lora_linear(x, inputs.weight, inputs.lora_a.requires_grad_(), inputs.lora_b)
    y += 1
    loss = y.sum() + (x * 2).sum()
    first = torch.autograd.grad(loss, (x, inputs.lora_a), retain_graph=True)
    second = torch.autograd.grad(loss, (x, inputs.lora_a), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_input_changed_in_place_is_a_clear_error():
    inputs = lora_linear_inputs(6, 8, 10, 2)
    x = inputs.x.requires_grad_() * 1
    y = lora_linear(x, inputs.weight, inputs.lora_a.requires_grad_(), inputs.lora_b)
    x += 1
    with pytest.raises(RuntimeError, match=r"changed in place.*peft_fast\.unpatch"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    inputs = lora_linear_inputs(64, 48, 40, 4)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.bias)]

    def run(op):
        with torch.autocast("cpu", dtype=dtype):
            y = op(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, bias=inputs.bias, scaling=inputs.scaling)
        return [y, *torch.autograd.grad(y, leaves, inputs.dy.to(dtype))]

    actual, expected = run(lora_linear), run(reference.lora_linear)
    # The truth starts from the operands that autocast rounds.
    truth = forward_backward(reference.lora_linear, inputs.to(dtype).to(torch.float64))
    for name, *values in zip(NAMES, actual, truth, expected, strict=True):
        assert_within_budget(*values, length=64, name=name)


def test_float64_under_autocast():
    inputs = lora_linear_inputs(12, 24, 40, 4, dtype=torch.float64)
    arguments = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(*arguments)
        assert torch.nn.functional.linear(inputs.x, inputs.weight).dtype is torch.float64
    assert torch.equal(y, lora_linear(*arguments))


def test_backward_inside_autocast():
    inputs = lora_linear_inputs(64, 48, 40, 4)
    x = inputs.x.requires_grad_()
    y = lora_linear(x, inputs.weight, inputs.lora_a, inputs.lora_b)
    (expected,) = torch.autograd.grad(y, x, inputs.dy, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (dx,) = torch.autograd.grad(y, x, inputs.dy)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pending_minus_sign(backend):
    inputs = lora_linear_inputs(12, 8, 10, 2)
    x = torch.randn(12, 8, dtype=torch.complex64).conj().imag
    dy = torch.randn(12, 10, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    lora_a = inputs.lora_a.requires_grad_()
    call = (inputs.weight, lora_a, inputs.lora_b)
    with peft_fast.backend(backend):
        y = lora_linear(x, *call)
        (da,) = torch.autograd.grad(y, lora_a, dy)
    expected = reference.lora_linear(x, *call)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(da, torch.autograd.grad(expected, lora_a, dy)[0], atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_repeated_forward_keeps_the_backend(use_reentrant):
    """Checkpointing repeats the forward in backward, where the `with` may be over: the mask must be the same."""
    x = torch.ones(16, 4096, requires_grad=True)
    weight, lora_a, lora_b = torch.zeros(1, 4096), torch.ones(1, 4096), torch.ones(1, 1)
    with peft_fast.backend("triton"):
        y = checkpoint(lambda x: lora_linear(x, weight, lora_a, lora_b, dropout_p=0.5), x, use_reentrant=use_reentrant)
    (dx,) = torch.autograd.grad(y.sum(), x) if not use_reentrant else (y.sum().backward(), x.grad)[1:]
    assert torch.allclose(dx.sum(1, keepdim=True), y)


def test_blocks_of_backend_may_end_in_any_order():
    first, second = peft_fast.backend("eager"), peft_fast.backend("triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert support.current_backend(torch.ones(1)) == "triton"
    second.__exit__(None, None, None)
    assert support.current_backend(torch.ones(1)) == "auto"


def test_no_input_gradient_saves_no_weight():
    inputs = lora_linear_inputs(64, 32, 48, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(inputs.x, inputs.weight, inputs.lora_a.requires_grad_(), inputs.lora_b)
    assert (48, 32) not in [tuple(tensor.shape) for tensor in saved]


def bad_calls():
    def call(**changes):
        inputs = lora_linear_inputs(4, 6, 5, 2)
        arguments = {"x": inputs.x, "weight": inputs.weight, "lora_a": inputs.lora_a, "lora_b": inputs.lora_b}
        return arguments | changes

    f = torch.zeros
    yield "x-width", call(x=f(4, 7)), r"x does not fit.*x \(4, 7\).*weight \(5, 6\)"
    yield "x-0d", call(x=f(())), r"dimensions.*expected x \(\.\.\., K\)"
    yield "weight-1d", call(weight=f(5)), r"weight \(5,\)"
    yield "lora_a-width", call(lora_a=f(2, 7)), r"lora_a does not fit.*lora_a \(2, 7\)"
    yield "lora_b-rank", call(lora_b=f(5, 3)), r"lora_b does not fit.*lora_b \(5, 3\)"
    yield "bias", call(bias=f(6)), r"bias does not fit.*bias \(6,\)"
    yield "rank-0", call(lora_a=f(0, 6), lora_b=f(5, 0)), "rank 0"
    yield "integer-x", call(x=f(4, 6, dtype=torch.int64)), "x has dtype torch.int64"
    yield "devices", call(lora_a=f(2, 6, device="meta")), "x is on cpu and lora_a on meta"
    yield "base-dtype", call(weight=f(5, 6, dtype=torch.bfloat16)), "weight and bias must have x's dtype"
    yield "factor-dtypes", call(lora_a=f(2, 6, dtype=torch.bfloat16)), "lora_a and lora_b must both"
    yield "trainable-weight", call(weight=f(5, 6).requires_grad_()), "weight requires grad"
    yield "p", call(dropout_p=1.5), r"dropout_p must lie in \[0, 1\), got 1.5"
    yield "scaling", call(scaling=torch.tensor(2.0)), "scaling must be a number, got Tensor"
    yield "p-one", call(dropout_p=1.0), "dropout_p"
    yield "seed", call(dropout_p=0.1, seed=f(2)), r"seed must be one int64 on cpu, got \(2,\) torch.float32"


BAD_CALLS = list(bad_calls())


@pytest.mark.parametrize(
    ("arguments", "message"), [case[1:] for case in BAD_CALLS], ids=[case[0] for case in BAD_CALLS]
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(**arguments)


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"backend: expected one of auto, triton, eager, got 'cuda'"),
        peft_fast.backend("cuda"),
    ):
        pass


def test_explicit_triton_never_falls_back(monkeypatch):
    monkeypatch.setattr("peft_fast.support._interprets_triton", lambda: False)
    monkeypatch.setattr("peft_fast.support._runs_triton", lambda device: False)
    inputs = lora_linear_inputs(4, 6, 5, 2)
    with peft_fast.backend("triton"), pytest.raises(NotImplementedError, match=r'backend\("triton"\) cannot serve'):
        lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)


@pytest.mark.parametrize(("dropout_p", "drawn_by"), [(0.0, ""), (0.1, "native"), (0.03, "numpy"), (0.1, "numpy")])
def test_passes_over_the_activations(dropout_p, drawn_by, monkeypatch):
    """What the CPU is asked for: the calls that touch a whole x, y, dx or dy. Time is not asserted here."""
    from torch.profiler import ProfilerActivity, profile

    M, K, N, R = 512, 384, 256, 8  # one dropout block
    inputs = lora_linear_inputs(M, K, N, R)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b)]
    native, apply = [], eager.dropout_native.Dropped.apply
    monkeypatch.setattr(eager.dropout_native.Dropped, "apply", lambda *args: native.append(apply(*args)))
    if drawn_by == "numpy":
        monkeypatch.setattr(eager.dropout_native, "library", lambda: None)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as recorded:
        y = lora_linear(inputs.x, inputs.weight, *leaves[1:], bias=inputs.bias, dropout_p=dropout_p)
        torch.autograd.grad(y, leaves, inputs.dy)

    def is_activation(shape):
        return math.prod(shape) >= M * N

    calls = [event.name for event in recorded.events() if any(map(is_activation, event.input_shapes))]
    matmuls = {"mm", "bmm", "baddbmm", "addmm", "addmm_"}
    work = {*matmuls, "mul_", "mul", "add", "add_", "ge_", "ge", "copy_", "sum", "bernoulli_", "where"}
    counts = {name: calls.count(f"aten::{name}") for name in work if f"aten::{name}" in calls}
    # Forward s, y; backward dB, ds, dA, dx: eight products, of which two small ones do not read an activation.
    products = sum(counts.pop(name, 0) for name in matmuls)
    assert products == 6
    # The bias is copied into y as F.linear does. Dropout masks x twice and dx once; numpy's masks are cast, twice.
    assert counts == ({"copy_": 3, "mul": 2, "mul_": 1} if drawn_by == "numpy" else {"copy_": 1})
    assert len(native) == (3 if drawn_by == "native" else 0)

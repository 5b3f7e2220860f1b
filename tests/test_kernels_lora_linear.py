"""The Triton LoRA kernels against the float64 reference, in the interpreter where there is no GPU."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_cases import DTYPES, SEED
from triton.backends.compiler import GPUTarget

from peft_fast import reference
from peft_fast.kernels import _launch, low_rank, partial_sums, skinny
from peft_fast.kernels._launch import needs_int64, recording, unit
from peft_fast.kernels.dropout import dropout_mask
from peft_fast.kernels.lora_linear import lora_bwd, lora_fwd
from peft_fast.testing import LoraLinearInputs, assert_within_budget, lora_linear_inputs

PLANS = ["fused", "split"]
ALL = (True, True, True, True)
NAMES = ("dx", "da", "db", "dbias")


def inputs_with_zeros(M, K, N, R, *, device, dtypes="fp32", **kwargs) -> LoraLinearInputs:
    """Inputs some of whose activations are exactly zero, so that a zero does not tell a dropped element."""
    dtype, factor_dtype = DTYPES[dtypes]
    inputs = lora_linear_inputs(M, K, N, R, dtype=dtype, factor_dtype=factor_dtype, device=device, **kwargs)
    inputs.x[..., ::5] = 0
    return inputs


def run(inputs: LoraLinearInputs, *, plan, p=0.0, needs=ALL, scaling=None):
    """(y, s, dx, da, db, dbias) of the kernels."""
    i = inputs
    scaling = i.scaling if scaling is None else scaling
    threshold = reference.drop_threshold(p)
    seed = torch.tensor([SEED], device=i.x.device) if threshold else None
    y, s = lora_fwd(i.x, i.weight, i.lora_a, i.lora_b, i.bias, scaling, threshold, seed, plan=plan)
    grads = lora_bwd(i.dy, i.x, i.weight, i.lora_a, i.lora_b, s, scaling, threshold, seed, needs=needs, plan=plan)
    return y, s, *grads


def expected(inputs: LoraLinearInputs, p: float) -> tuple[Tensor, ...]:
    """(y, dx, da, db, dbias) of the reference, with the mask that the kernels draw."""
    i = inputs
    threshold = reference.drop_threshold(p)
    seed = torch.tensor([SEED], device=i.x.device)
    keep_mask = dropout_mask(seed, i.x.shape, threshold) if threshold else None
    leaves = [tensor.detach().requires_grad_() for tensor in (i.x, i.lora_a, i.lora_b, i.bias)]
    x, lora_a, lora_b, bias = leaves
    y = reference.lora_linear(
        x, i.weight, lora_a, lora_b, bias=bias, scaling=i.scaling, dropout_p=p, keep_mask=keep_mask
    )
    return y.detach(), *torch.autograd.grad(y, leaves, i.dy)


def assert_matches(inputs: LoraLinearInputs, *, plan, p=0.0) -> None:
    """Every result within the error budget; y also without its base product, and by blocks of rows."""
    (M, K), (N, R) = inputs.x.shape, inputs.lora_b.shape
    y, _, *grads = run(inputs, plan=plan, p=p)
    inputs64 = inputs.to(torch.float64)
    y64, *grads64 = expected(inputs64, p)
    y_eager, *grads_eager = expected(inputs, p)

    assert_within_budget(y, y64, y_eager, length=K + R, name="y")
    base = inputs64.x @ inputs64.weight.T
    low, low_eager = ((value.double() - base).to(y.dtype) for value in (y, y_eager))
    for row in range(0, M, 64):
        rows = slice(row, row + 64)
        assert_within_budget(
            low[rows], (y64 - base)[rows], low_eager[rows], length=K + R, name=f"y - x Wᵀ from row {row}"
        )
    lengths = {"dx": N + R, "da": M + N, "db": M + K, "dbias": M}
    for name, grad, grad64, grad_eager in zip(NAMES, grads, grads64, grads_eager, strict=True):
        assert_within_budget(grad, grad64, grad_eager, length=lengths[name], name=name)


# Every pair of types, each plan, no, little and much dropout; every dimension is several tiles with a tail.
@pytest.mark.parametrize("p", [0, 0.05, 0.5])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_results(dtypes, plan, p, device):
    assert_matches(inputs_with_zeros(136, 136, 264, 8, device=device, dtypes=dtypes), plan=plan, p=p)


# Below, between and at powers of two; more than one block of the rank. Odd K and N; mixed types take most paths.
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("R", [1, 3, 12, 64, 100, 384])
def test_ranks(R, plan, device):
    assert_matches(inputs_with_zeros(67, 131, 77, R, device=device, dtypes="bf16-fp32"), plan=plan, p=0.1)


# Nothing, one row, less than a tile, several tiles; dimensions of length 0, 1, and off every alignment.
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("M", "K", "N"), [(0, 33, 17), (1, 33, 17), (17, 1, 131), (300, 33, 1), (5, 0, 7), (5, 7, 0)], ids=str
)
def test_shapes(M, K, N, plan, device):
    inputs = lora_linear_inputs(M, max(K, 1), N, 3, device=device)
    if K == 0:
        inputs.x, inputs.weight, inputs.lora_a = inputs.x[:, :0], inputs.weight[:, :0], inputs.lora_a[:, :0]
    assert_matches(inputs, plan=plan, p=0.1)


# The tiles of large activations, 16 ranks at most, with tails in rows and columns.
@pytest.mark.parametrize("dtypes", ["bf16", "bf16-fp32", "fp16-fp32"])
def test_large_tiles(dtypes, device, monkeypatch):
    monkeypatch.setattr(_launch, "_plans", {})
    monkeypatch.setattr(skinny, "_LARGE", 0)
    assert_matches(inputs_with_zeros(300, 264, 520, 12, device=device, dtypes=dtypes), plan="split", p=0.1)


# The same tiles in the same order, so the same bits; a tail in every dimension, and rows that no descriptor serves.
@pytest.mark.parametrize("case", ["plain", "strided x", "strided weight", "odd rows", "conv1d"])
@pytest.mark.parametrize("dtypes", ["bf16", "fp16-fp32"])
def test_descriptors_read_what_pointers_read(dtypes, case, device):
    K = 263 if case == "odd rows" else 264
    inputs = inputs_with_zeros(136, K, 200, 12, device=device, dtypes=dtypes)
    if case == "strided x":
        inputs.x, inputs.dy = strided(inputs.x), strided(inputs.dy)
    if case == "strided weight":
        inputs.weight = strided(inputs.weight)
    if case == "conv1d":
        inputs.weight = transposed(inputs.weight)
    by_pointers = run(inputs, plan="fused", p=0.1)
    assert all(torch.equal(a, b) for a, b in zip(by_pointers, run(inputs, plan="fused tma", p=0.1), strict=True))
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        run(inputs, plan="fused tma", p=0.1)
    described = [launch.constexprs["DESCRIBED"] for launch in launches if "DESCRIBED" in launch.constexprs]
    # y from x and Wᵀ, dx from dy and W.
    expected = {"plain": ["NK", "KN"], "conv1d": ["KN", "NK"], "odd rows": ["", ""]}
    assert described == expected.get(case, ["", ""])


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def strided(tensor: Tensor) -> Tensor:
    """Every other row and column of a larger tensor."""
    larger = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    larger[::2, ::2] = tensor
    return larger[::2, ::2]


# What autograd and models hand over: y.sum() (expanded both ways), Conv1D's weight, slices, and copies of none.
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dy", lambda dy: dy[:1, :1].expand_as(dy)),
        ("dy", lambda dy: dy[:1].expand_as(dy)),
        ("dy", transposed),
        ("x", transposed),
        ("x", strided),
        ("weight", transposed),
        ("weight", strided),
        ("lora_a", transposed),
        ("lora_b", strided),
    ],
    ids=["dy-one-value", "dy-one-row", "dy-T", "x-T", "x-strided", "weight-T", "weight-strided", "a-T", "b-strided"],
)
def test_layouts(name, layout, plan, device):
    inputs = inputs_with_zeros(72, 136, 80, 8, device=device, dtypes="bf16")
    setattr(inputs, name, layout(getattr(inputs, name)))
    assert_matches(inputs, plan=plan, p=0.1)


# Every combination, for a rank whose dy is read once and for one whose dy is read twice.
@pytest.mark.parametrize("R", [4, 40])
def test_needs(R, device):
    inputs = lora_linear_inputs(20, 33, 17, R, device=device)
    _, _, *everything = run(inputs, plan="fused", p=0.1)
    for needs in itertools.product([False, True], repeat=4):
        _, _, *grads = run(inputs, plan="fused", p=0.1, needs=needs)
        for name, needed, grad, whole in zip(NAMES, needs, grads, everything, strict=True):
            assert (grad is not None) == needed, (needs, name)
            if needed:
                torch.testing.assert_close(grad, whole, msg=f"{needs}: {name}")


def kernels_launched(needs, *, R=16, plan="split", bias=None) -> list[str]:
    """The names of the kernels in backward."""
    M, K, N = 512, 256, 512
    x, weight, lora_a, lora_b, dy, s = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in [(M, K), (N, K), (R, K), (N, R), (M, N), (M, R)]
    )
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        lora_bwd(dy, x, weight, lora_a, lora_b, s, 2.0, 0, None, needs=needs, plan=plan)
    return [launch.kernel.__name__.removeprefix("_").removesuffix("_kernel") for launch in launches]


def test_no_work_for_what_is_not_needed():
    total = "sum_partials"
    assert kernels_launched((False, False, False, False)) == []
    assert kernels_launched((False, False, True, False)) == ["factor_grad", total]
    assert kernels_launched((False, True, False, False)) == ["shrink", total, "factor_grad", total]
    assert kernels_launched((True, False, False, False)) == ["shrink", total, "update"]
    assert kernels_launched((True, False, False, False), plan="fused") == ["shrink", total, "matmul"]
    # One read of dy for ds and dB, one of x for dA.
    one_read = ["factor_grad", total]
    assert kernels_launched((True, True, True, False)) == [*one_read, "factor_grad", total, "update"]


@pytest.mark.parametrize("plan", PLANS)
def test_bits_repeat(plan, device):
    inputs = inputs_with_zeros(136, 136, 72, 8, device=device, dtypes="bf16-fp32")
    first, second = (run(inputs, plan=plan, p=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_16_bit_results_round_to_nearest(device):
    """Products of two bf16 numbers are exact in fp32, so the result must be theirs, rounded once."""
    inputs = lora_linear_inputs(70, 1, 70, 1, dtype=torch.bfloat16, bias=False, device=device)
    inputs.lora_b = torch.zeros_like(inputs.lora_b)
    y = run(inputs, plan="fused", needs=(False,) * 4)[0]
    assert torch.equal(y, (inputs.x.float() * inputs.weight.float().T).bfloat16())


# The intermediate tensors, and with fp32 factors the factors, may leave fp16's range where every result is inside it.
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("dtypes", "power"), [("fp16", 12), ("fp16-fp32", 24), ("fp16-fp32", -24)], ids=lambda value: str(value)
)
def test_range_of_fp16(dtypes, power, plan, device):
    inputs = inputs_with_zeros(136, 136, 264, 8, device=device, dtypes=dtypes, scaling=64.0)
    inputs.lora_a *= 2.0**power
    inputs.lora_b *= 2.0**-power
    inputs.dy /= 256
    s = run(inputs, plan=plan)[1]
    assert s.abs().max() > 65504 or power < 0
    assert_matches(inputs, plan=plan, p=0.1)


# What one token has that is not finite is its own affair: the others share its tile, not its range.
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtypes", ["fp16", "fp16-fp32", "bf16"])
@pytest.mark.parametrize("plan", PLANS)
def test_tokens_that_are_not_finite(plan, dtypes, value, device):
    inputs = inputs_with_zeros(20, 64, 64, 8, device=device, dtypes=dtypes)
    inputs.x[3] = 0
    expected = run(inputs, plan=plan)[0]
    inputs.x[3, 5] = value
    with np.errstate(invalid="ignore", over="ignore"):
        y = run(inputs, plan=plan)[0]
    assert not y[3].isfinite().any()
    others = torch.arange(20, device=device) != 3
    assert torch.equal(y[others], expected[others])


# To fp32's end, where the inverse of a power of two is no normal number; what is not finite stays so, by itself.
def test_range_of_factors_beside_fp16(device):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 128, generator=generator) / 1024).half().to(device)
    factor = torch.randn(128, 8, generator=generator).to(device)
    factor *= 3e38 / factor.abs().max()
    s = skinny.shrink(x, factor, 1.0)
    assert_within_budget(s, x.double() @ factor.double(), x.float() @ factor, length=128)
    for value in (torch.inf, torch.nan):
        factor[7, 3] = value
        with np.errstate(invalid="ignore"):
            others = skinny.shrink(x, factor, 1.0)
        assert not others[:, 3].isfinite().any()
        s[:, 3] = others[:, 3]
        torch.testing.assert_close(others, s, rtol=0, atol=0, equal_nan=True)


# Not representable, negative, zero, and the types that a buffer may have.
@pytest.mark.parametrize("dtypes", ["fp64", "fp32"])
def test_scaling(dtypes, device):
    inputs = lora_linear_inputs(20, 33, 17, 4, dtype=DTYPES[dtypes][0], device=device)
    for scaling in (1 / 3, -0.7, 0.0):
        inputs.scaling = scaling
        assert_matches(inputs, plan="fused", p=0.1)
        as_tensor = torch.tensor(scaling, dtype=torch.float64, device=device)
        for a, b in zip(run(inputs, plan="fused"), run(inputs, plan="fused", scaling=as_tensor), strict=True):
            assert torch.equal(a, b)
    for dtype in (torch.float32, torch.bfloat16):
        inputs.scaling = 0.375
        as_tensor = torch.tensor(0.375, dtype=dtype, device=device)
        assert torch.equal(run(inputs, plan="split", scaling=as_tensor)[0], run(inputs, plan="split")[0])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, seed, plan):
        y, s = lora_fwd(x, weight, lora_a, lora_b, bias, 1 / 3, 20000, seed, plan=plan)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s, seed)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_a, lora_b, s, seed = ctx.saved_tensors
        dx, da, db, dbias = lora_bwd(dy, x, weight, lora_a, lora_b, s, 1 / 3, 20000, seed, needs=ALL, plan=ctx.plan)
        return dx, None, da, db, dbias, None, None


# As small as tells every index apart: gradcheck runs the kernels twice for every input element.
@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck(plan, device):
    i = lora_linear_inputs(3, 2, 2, 2, dtype=torch.float64, device=device)
    leaves = [tensor.requires_grad_() for tensor in (i.x, i.lora_a, i.lora_b, i.bias)]
    seed = torch.tensor([SEED], device=device)

    def call(x, lora_a, lora_b, bias):
        return _LoraLinear.apply(x, i.weight, lora_a, lora_b, bias, seed, plan)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=False)


def test_64_bit_offsets_where_32_do_not_reach():
    rows = torch.empty(2**19, 4096, device="meta")
    assert not needs_int64(rows[:-1], None)
    assert not needs_int64(rows)
    assert needs_int64(torch.empty(2**19 + 1, 4096, device="meta"))
    assert needs_int64(torch.empty(2**18, 4096, device="meta"), torch.empty(1, 2**31 + 1, device="meta"))
    assert not needs_int64(torch.empty(1, device="meta").expand(2**20, 4096))
    assert not needs_int64(torch.empty(0, 2**40, device="meta"))


def test_unit_divides_sizes_and_strides():
    matrix = torch.empty(5, 24, device="meta")
    assert unit(matrix, 24) == 8
    assert unit(matrix.T, 24) == 8
    assert unit(matrix, 24, 20) == 4
    assert unit(matrix[:, ::2], 12) == 2
    assert unit(torch.empty(5, 33, device="meta"), 33) == 1
    assert unit(matrix[:1, :1].expand(5, 24), 24) == 8


# The widest tensor decides, wherever it enters.
@pytest.mark.parametrize(("M", "wide"), [(2**18, False), (2**20, True)])
@pytest.mark.parametrize("plan", PLANS)
def test_launches_use_64_bit_offsets(M, wide, plan):
    K, N, R = 4096, 128, 16
    x, weight, lora_a, lora_b, dy, s = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in [(M, K), (N, K), (R, K), (N, R), (M, N), (M, R)]
    )
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        lora_fwd(x, weight, lora_a, lora_b, None, 1.0, 0, None, plan=plan)
        lora_bwd(dy, x, weight, lora_a, lora_b, s, 1.0, 0, None, needs=ALL, plan=plan)
    touches_x = [any(isinstance(arg, Tensor) and arg.numel() == M * K for arg in launch.args) for launch in launches]
    assert sum(touches_x) >= 3
    for launch, touched in zip(launches, touches_x, strict=True):
        assert launch.constexprs["WIDE"] == (wide and touched), launch.kernel


@pytest.mark.parametrize("plan", PLANS)
def test_64_bit_offsets_give_the_same_bits(plan, device, monkeypatch):
    inputs = inputs_with_zeros(72, 136, 80, 8, device=device, dtypes="bf16")
    narrow = run(inputs, plan=plan, p=0.1)
    monkeypatch.setattr(_launch, "_plans", {})
    for module in (low_rank, partial_sums, skinny):
        monkeypatch.setattr(module, "needs_int64", lambda *tensors: True)
    wide = run(inputs, plan=plan, p=0.1)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))

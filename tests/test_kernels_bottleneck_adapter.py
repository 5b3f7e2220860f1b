"""The Triton bottleneck adapter against the float64 reference, in the interpreter where there is no GPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_cases import DTYPES, SEED
from triton.backends.compiler import GPUTarget

from peft_fast import reference
from peft_fast.kernels import _launch, bottleneck_adapter, bottleneck_norm, partial_sums, skinny
from peft_fast.kernels._launch import recording
from peft_fast.kernels.bottleneck_adapter import adapter_bwd, adapter_fwd
from peft_fast.kernels.dropout import dropout_mask
from peft_fast.testing import assert_within_budget

EPS = 1e-5
MOST_PATHS = ("fp64", "bf16-fp32")
# name -> (LN_before, LN_after, residual_after_norm)
NORMS = {
    "plain": (False, False, False),
    "before": (True, False, False),
    "after": (False, True, False),
    "after-inside": (False, True, True),
    "both": (True, True, False),
    "both-inside": (True, True, True),
}


@dataclass
class Case:
    """The tensors of one call, by the names of the launchers, and how it is made."""

    tensors: dict[str, Any]
    dy: Tensor
    activation: str = "relu"
    residual_after_norm: bool = False
    p: float = 0.0

    @property
    def needs(self) -> set[str]:
        needs = {name for name, value in self.tensors.items() if value is not None and not isinstance(value, float)}
        return needs - {"residual"} if self.tensors["residual"] is self.tensors["x"] else needs


def make_case(
    M, K, N, R, *, dtypes="fp32", norms="plain", residual="x", biases=True, scaling=0.7, device="cpu", seed=0, **options
) -> Case:
    """Random inputs, some exactly zero, with every branch about as large as the residual.

    residual: "x", "other" or "none".
    """
    dtype, weight_dtype = DTYPES[dtypes]
    before, after, residual_after_norm = NORMS[norms]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype = weight_dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std + mean
        return values.to(device=device, dtype=dtype)

    x = normal(M, K, dtype=dtype)
    x[:, ::5] = 0
    tensors = {
        "x": x,
        "residual": {"x": x, "other": normal(M, N, dtype=dtype), "none": None}[residual],
        "down_weight": normal(R, K, std=max(K, 1) ** -0.5),
        "down_bias": normal(R, std=0.5) if biases else None,
        "up_weight": normal(N, R, std=R**-0.5),
        "up_bias": normal(N, std=0.5) if biases else None,
        "scaling": scaling,
        "norm_before": (normal(K, std=0.2, mean=1.0), normal(K, std=0.2)) if before else None,
        "norm_after": (normal(N, std=0.2, mean=1.0), normal(N, std=0.2)) if after else None,
    }
    return Case(tensors, normal(M, N, dtype=dtype), residual_after_norm=residual_after_norm, **options)


def seed_and_threshold(case: Case) -> tuple[Tensor | None, int]:
    threshold = reference.drop_threshold(case.p)
    return torch.tensor([SEED], device=case.dy.device) if threshold else None, threshold


def forward(case: Case):
    """(y, z, stats_before, stats_after) of the kernels."""
    seed, threshold = seed_and_threshold(case)
    options = {"activation": case.activation, "residual_after_norm": case.residual_after_norm}
    return adapter_fwd(*arguments(case), threshold, seed, eps=EPS, **options)


def arguments(case: Case) -> tuple:
    """The launchers' first arguments, which `make_case` names in their order."""
    return tuple(case.tensors.values())


def run(case: Case, needs: set[str] | None = None) -> dict[str, Any]:
    """Every result of the kernels by name: y, z and the gradients that `needs` names, all where it is not given."""
    seed, threshold = seed_and_threshold(case)
    y, z, *stats = forward(case)
    options = {"activation": case.activation, "residual_after_norm": case.residual_after_norm}
    needs = case.needs if needs is None else needs
    grads = adapter_bwd(case.dy, *arguments(case), z, *stats, threshold, seed, needs=needs, **options)
    assert set(grads) == needs
    return {"y": y, "z": z, **grads}


def convert(value, dtype: torch.dtype | None):
    """Leaves that require grad, in `dtype` where one is given."""
    if isinstance(value, tuple):
        return tuple(convert(item, dtype) for item in value)
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype or value.dtype).requires_grad_()


def expected(case: Case, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same of the reference, in `dtype` where one is given, with the mask that the kernels draw."""
    seed, threshold = seed_and_threshold(case)
    leaves = {name: convert(value, dtype) for name, value in case.tensors.items()}
    if case.tensors["residual"] is case.tensors["x"]:
        leaves["residual"] = leaves["x"]
    y = reference.bottleneck_adapter(
        **leaves,
        activation=case.activation,
        residual_after_norm=case.residual_after_norm,
        eps=EPS,
        dropout_p=case.p,
        keep_mask=dropout_mask(seed, case.dy.shape, threshold) if threshold else None,
    )
    names = sorted(case.needs)
    flat = [tensor for name in names for tensor in as_tuple(leaves[name])]
    grads = iter(torch.autograd.grad(y, flat, case.dy.to(y.dtype)))
    return {"y": y.detach()} | {
        name: tuple(next(grads) for _ in leaves[name]) if isinstance(leaves[name], tuple) else next(grads)
        for name in names
    }


def as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def drop_undefined_rows(case: Case) -> None:
    """No gradient into rows with a z so near 0 that rounding alone decides relu's slope; not for 16-bit parameters."""
    if case.activation not in ("relu", "leaky_relu") or case.tensors["down_weight"].element_size() == 2:
        return
    x, weight, bias, norm = (
        convert(case.tensors[name], torch.float64) for name in ("x", "down_weight", "down_bias", "norm_before")
    )
    if norm is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[1:], *norm, EPS)
    z = torch.nn.functional.linear(x, weight, bias)
    near = torch.finfo(case.tensors["down_weight"].dtype).eps * 64
    case.dy[(z.abs() < near).any(1)] = 0


def assert_matches(case: Case, needs: set[str] | None = None) -> None:
    """Every result within the error budget."""
    drop_undefined_rows(case)
    actual, truth, eager = run(case, needs), expected(case, torch.float64), expected(case)
    del actual["z"]
    (M, K), (N, R) = case.tensors["x"].shape, case.tensors["up_weight"].shape
    for name, value in actual.items():
        triples = zip(as_tuple(value), as_tuple(truth[name]), as_tuple(eager[name]), strict=True)
        for index, (a, t, e) in enumerate(triples):
            assert_within_budget(a, t, e, length=M + N + K + R, name=f"{name}[{index}]")


# Every pair of types without and with both norms, each place of a norm in the types that take most paths and where the
# budget is tightest. Every dimension is more than one of the interpreter's tiles, with a tail; both kinds of residual.
@pytest.mark.parametrize(
    ("dtypes", "norms"),
    [(dtypes, norms) for dtypes in DTYPES for norms in NORMS if norms in ("plain", "both") or dtypes in MOST_PATHS],
    ids=str,
)
def test_results(dtypes, norms, device):
    residual = "other" if norms in ("before", "after-inside", "both") else "x"
    assert_matches(make_case(40, 136, 136, 72, dtypes=dtypes, norms=norms, residual=residual, p=0.1, device=device))


# Little and much dropout, and values on both sides of where a formula for tanh changes.
@pytest.mark.parametrize("dtypes", ["fp64", "fp32"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation, dtypes, device):
    case = make_case(17, 64, 96, 16, dtypes=dtypes, residual="other", p=0.5, activation=activation, device=device)
    case.tensors["down_weight"][:4] *= 1e-3
    case.tensors["down_bias"][:4] *= 1e-3
    case.tensors["down_weight"][4:8] *= 8
    assert_matches(case)


# Nothing, one row, a tail, many blocks of rows; bottlenecks of one, between powers of two, of several blocks; widths of
# 0, 1, off every alignment, of real models, and not the same on both sides.
@pytest.mark.parametrize(
    ("M", "K", "N", "R", "norms", "residual", "biases"),
    [
        (0, 64, 64, 8, "both", "other", True),
        (1, 1000, 64, 1, "before", "other", True),
        (300, 64, 64, 8, "plain", "x", False),
        (17, 384, 384, 48, "after", "x", False),
        (17, 768, 384, 200, "both-inside", "none", True),
        (17, 33, 17, 300, "after", "none", False),
        (5, 1, 131, 3, "plain", "none", True),
        (5, 7, 1, 64, "plain", "other", True),
        (5, 0, 7, 3, "both", "other", True),
        (5, 7, 0, 3, "both", "other", True),
        (5, 0, 0, 3, "both-inside", "x", True),
    ],
    ids=str,
)
def test_shapes(M, K, N, R, norms, residual, biases, device):
    case = make_case(
        M, K, N, R, dtypes="bf16-fp32", norms=norms, residual=residual, biases=biases, p=0.1, device=device
    )
    assert_matches(case)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def strided(tensor: Tensor) -> Tensor:
    """Every other element, along each dimension, of a larger tensor."""
    larger = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    every_other = larger[(slice(None, None, 2),) * tensor.dim()]
    return every_other.copy_(tensor)


# What autograd and models hand over: y.sum() (expanded both ways), slices of wider tensors, and copies of none.
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dy", lambda dy: dy[:1, :1].expand_as(dy)),
        ("dy", lambda dy: dy[:1].expand_as(dy)),
        ("dy", transposed),
        ("x", lambda x: torch.nn.functional.pad(x, (8, 8))[:, 8:-8]),
        ("residual", strided),
        ("down_weight", transposed),
        ("up_weight", strided),
        ("down_bias", strided),
        ("norm_before", lambda norm: tuple(map(strided, norm))),
        ("norm_after", lambda norm: tuple(map(strided, norm))),
    ],
    ids=["dy-value", "dy-row", "dy-T", "x-slice", "residual", "down-T", "up", "down-bias", "before", "after"],
)
def test_layouts(name, layout, device):
    case = make_case(20, 40, 48, 8, dtypes="bf16", norms="both", residual="other", p=0.1, device=device)
    if name == "dy":
        case.dy = layout(case.dy)
    else:
        case.tensors[name] = layout(case.tensors[name])
    assert_matches(case)


# Where exp overflows, and far beyond; a series that is not taken there overflows too.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_far_values(activation, device):
    case = make_case(8, 32, 40, 16, dtypes="fp32", residual="other", activation=activation, device=device)
    case.tensors["down_bias"][:] = torch.linspace(-200, 200, 16, device=device)
    assert_matches(case)


# A number that no type represents, negative, zero; learned, as a number of no and of one dimension.
@pytest.mark.parametrize("norms", ["plain", "after"])
@pytest.mark.parametrize("scaling", [1 / 3, -0.7, 0.0])
def test_scaling(scaling, norms, device):
    case = make_case(33, 64, 64, 8, norms=norms, activation="silu", p=0.1, device=device, scaling=scaling)
    assert_matches(case)
    # The gradient of a learned scaling would cancel, and eager's error with it by chance, if dy did not follow y.
    case.dy = forward(case)[0] + case.dy / 8
    plain = run(case)
    for shape in [(), (1,)]:
        case.tensors["scaling"] = torch.full(shape, scaling, device=device)
        assert_matches(case)
        learned = run(case)
        assert learned["scaling"].shape == shape
        assert all(torch.equal(plain[name], learned[name]) for name in ("y", "x", "up_weight", "down_weight"))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(as_tuple(a), as_tuple(b), strict=True))


# Each gradient alone and without each: nothing depends on what else is asked for.
@pytest.mark.parametrize("norms", ["plain", "both"])
def test_needs(norms, device):
    case = make_case(8, 40, 40, 8, dtypes="bf16-fp32", norms=norms, residual="other", p=0.1, device=device)
    case.tensors["scaling"] = torch.tensor(0.7, device=device)
    everything = run(case)
    for name in case.needs:
        for needs in ({name}, case.needs - {name}):
            if device == "cuda":  # code compiled for other gradients may contract other products
                assert_matches(case, needs)
                continue
            for key, value in run(case, needs).items():
                assert equal(value, everything[key]), (needs, key)
    assert set(run(case, set())) == {"y", "z"}


def kernels_launched(*needs: str, norms="plain", residual="x") -> list[str]:
    """The names of the kernels in backward."""
    case = make_case(512, 256, 256, 16, dtypes="bf16", norms=norms, residual=residual, device="meta")
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        _, z, *stats = forward(case)
        launches.clear()
        options = {"activation": "relu", "residual_after_norm": case.residual_after_norm, "needs": set(needs)}
        adapter_bwd(case.dy, *arguments(case), z, *stats, 0, None, **options)
    return [launch.kernel.__name__.removeprefix("_").removesuffix("_kernel") for launch in launches]


def test_no_work_for_what_is_not_needed():
    rows, weight, total = "adapter_bwd", "factor_grad", "sum_partials"
    assert kernels_launched() == []
    assert kernels_launched("residual", residual="other") == []
    assert kernels_launched("residual", norms="after-inside", residual="other") == []
    assert kernels_launched("residual", norms="after", residual="other") == [rows]
    assert kernels_launched("x") == kernels_launched("x", norms="both") == [rows]
    assert kernels_launched("up_bias") == [weight, total]
    assert kernels_launched("up_weight") == [rows, weight, total]
    assert kernels_launched("norm_after", norms="after") == [rows, total]
    assert kernels_launched("down_bias") == [rows, total]
    assert kernels_launched("down_weight") == [rows, weight, total]
    assert kernels_launched("norm_before", norms="before") == [rows, weight, total, "down_grad"]


@pytest.mark.parametrize("norms", ["plain", "both"])
def test_bits_repeat(norms, device):
    case = make_case(40, 136, 136, 8, dtypes="bf16-fp32", norms=norms, p=0.1, device=device)
    first, second = run(case), run(case)
    assert all(equal(first[name], second[name]) for name in first)


# z, its gradient and fp32 parameters may leave fp16's range where every result is inside it.
@pytest.mark.parametrize(("dtypes", "power"), [("fp16", 12), ("fp16-fp32", 24), ("fp16-fp32", -24)], ids=str)
def test_range_of_fp16(dtypes, power, device):
    case = make_case(40, 136, 136, 8, dtypes=dtypes, p=0.1, device=device, scaling=64.0)
    case.tensors["down_weight"] *= 2.0**power
    case.tensors["down_bias"] *= 2.0**power
    case.tensors["up_weight"] *= 2.0**-power
    case.dy /= 256
    assert forward(case)[1].abs().max() > 65504 or power < 24
    assert_matches(case)


# What one token has that is not finite is its own affair: the others share its tile, not its range.
@pytest.mark.parametrize("dtypes", ["fp16", "bf16"])
def test_tokens_that_are_not_finite(dtypes, device):
    case = make_case(20, 64, 64, 8, dtypes=dtypes, device=device)
    case.tensors["x"][3] = 0
    expected = forward(case)[0]
    case.tensors["x"][3, 5] = torch.inf
    with np.errstate(invalid="ignore", over="ignore"):
        y = forward(case)[0]
    others = torch.arange(20, device=device) != 3
    assert not y[3].isfinite().all()
    assert torch.equal(y[others], expected[others])


# relu's zeros are where the exact z has them: fp32 weights rounded to 16 bits would move its sign.
@pytest.mark.parametrize("dtypes", ["bf16-fp32", "fp16-fp32"])
def test_signs_of_z_with_fp32_parameters(dtypes, device):
    case = make_case(64, 136, 136, 64, dtypes=dtypes, device=device)
    x, weight, bias = (case.tensors[name].double() for name in ("x", "down_weight", "down_bias"))
    exact = x @ weight.T + bias
    z = forward(case)[1]
    assert z.dtype == torch.float32
    assert (z - exact).abs().max() < 16 * torch.finfo(torch.float32).eps
    assert torch.equal(z[exact.abs() > 1e-5] > 0, exact[exact.abs() > 1e-5] > 0)


# A mean far above the deviation: E[v²] - E[v]², or a norm folded into the product, would lose every digit.
def test_norms_of_rows_far_from_zero(device):
    case = make_case(20, 264, 264, 16, norms="both", activation="tanh", device=device)
    case.tensors["x"] += 1000
    assert_matches(case)


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, seed, x, residual, wd, bd, wu, bu, scaling, before_w, before_b, after_w, after_b):
        norms = (before_w, before_b), (after_w, after_b)
        inputs = (x, x if residual is None else residual, wd, bd, wu, bu, scaling, *norms)
        y, z, *stats = adapter_fwd(*inputs, 20000, seed, eps=EPS, **options)
        ctx.saved = (*inputs, z, *stats, 20000, seed)
        ctx.options = options
        ctx.separate = residual is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        needs = {"x", "down_weight", "down_bias", "up_weight", "up_bias", "scaling", "norm_before", "norm_after"}
        needs |= {"residual"} if ctx.separate else set()
        grads = adapter_bwd(dy, *ctx.saved, needs=needs, **ctx.options)
        names = ("x", "residual", "down_weight", "down_bias", "up_weight", "up_bias", "scaling")
        return None, None, *map(grads.get, names), *grads["norm_before"], *grads["norm_after"]


# As small as tells every index apart: gradcheck runs the kernels twice for every input element.
@pytest.mark.parametrize(
    ("activation", "residual", "norms"), [("gelu", "x", "both"), ("silu", "other", "both-inside")], ids=str
)
def test_gradcheck(activation, residual, norms, device):
    case = make_case(2, 3, 3, 2, dtypes="fp64", norms=norms, residual=residual, device=device)
    case.tensors["scaling"] = torch.tensor(1 / 3, dtype=torch.float64, device=device)
    if residual == "x":
        case.tensors["residual"] = None
    options = {"activation": activation, "residual_after_norm": case.residual_after_norm}
    leaves = [None if value is None else value.requires_grad_() for item in arguments(case) for value in as_tuple(item)]
    seed = torch.tensor([SEED], device=device)
    assert torch.autograd.gradcheck(lambda *leaves: _Adapter.apply(options, seed, *leaves), leaves, fast_mode=False)


@pytest.mark.parametrize(("M", "wide"), [(2**19, False), (2**20, True)])
def test_launches_use_64_bit_offsets(M, wide):
    case = make_case(1, 4096, 4096, 16, dtypes="bf16", norms="both", residual="other", device="meta")
    case.tensors["x"], case.tensors["residual"], case.dy = (
        torch.empty(M, 4096, dtype=torch.bfloat16, device="meta") for _ in range(3)
    )
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        run(case)
    large = [launch for launch in launches if any(isinstance(a, Tensor) and a.numel() == M * 4096 for a in launch.args)]
    assert len(large) == 4
    assert all(launch.constexprs["WIDE"] == wide for launch in large)


# The gradient of an expanded x is dense, however few elements x itself has.
def test_launches_use_64_bit_offsets_for_dx_of_an_expanded_x():
    case = make_case(1, 4096, 16, 16, dtypes="bf16", device="meta")
    M = 2**19 + 1
    case.tensors["x"] = torch.empty(1, 4096, dtype=torch.bfloat16, device="meta").expand(M, 4096)
    case.dy = torch.empty(M, 16, dtype=torch.bfloat16, device="meta")
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        run(case)
    writes_dx = [launch for launch in launches if launch.kernel.fn.__name__ == "adapter_bwd_kernel"]
    assert writes_dx
    assert all(launch.constexprs["WIDE"] for launch in writes_dx)


def test_64_bit_offsets_give_the_same_bits(device, monkeypatch):
    case = make_case(40, 136, 136, 72, dtypes="bf16", norms="both", residual="other", p=0.1, device=device)
    narrow = run(case)
    monkeypatch.setattr(_launch, "_plans", {})
    for module in (bottleneck_adapter, bottleneck_norm, partial_sums, skinny):
        monkeypatch.setattr(module, "needs_int64", lambda *tensors: True)
    wide = run(case)
    assert all(equal(narrow[name], wide[name]) for name in narrow)

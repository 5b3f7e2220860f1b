"""The Triton bottleneck adapter against the float64 reference, in the interpreter where there is no GPU."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from peft_fast import reference
from peft_fast.kernels import bottleneck_adapter, skinny
from peft_fast.kernels._launch import recording
from peft_fast.kernels.bottleneck_adapter import adapter_bwd, adapter_fwd
from peft_fast.kernels.dropout import dropout_mask
from peft_fast.testing import assert_within_budget

SEED = 0x5EED_0F_D20F_0075
EPS = 1e-5
# (activations, parameters)
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
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
    options: dict[str, Any] = field(default_factory=dict)

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
    names = ("x", "residual", "down_weight", "down_bias", "up_weight", "up_bias", "scaling", "norm_before", "norm_after")
    return tuple(case.tensors[name] for name in names)


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


# Every pair of types with every place of the norms; dimensions of several tiles with a tail, both kinds of residual.
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_results(dtypes, norms, device):
    residual = "other" if norms in ("before", "after-inside", "both") else "x"
    assert_matches(make_case(70, 264, 264, 48, dtypes=dtypes, norms=norms, residual=residual, p=0.1, device=device))

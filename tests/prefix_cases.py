"""What the tests of the prefix attention's kernels share: calls, what they give, and the truth they are held to."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


from kernel_cases import DTYPES, SEED

from peft_fast import reference
from peft_fast.kernels.prefix_attention import attention_bwd, attention_dropout_mask, attention_fwd
from peft_fast.testing import PrefixAttentionInputs, assert_within_budget, prefix_attention_inputs


@dataclass
class Case:
    """The tensors of one call and how it is made."""

    inputs: PrefixAttentionInputs
    attn_mask: Tensor | None = None
    p: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> set[str]:
        return set(self.inputs.leaves())


def make_case(
    Z,
    H,
    H_KV,
    S,
    T,
    P,
    DH,
    *,
    dtypes="fp32",
    gate=False,
    mask=None,
    p=0.0,
    causal=False,
    window=None,
    softcap=None,
    scale=None,
    device="cpu",
    seed=0,
) -> Case:
    """`mask` is the name of a mask in `make_mask`."""
    dtype, prefix_dtype = DTYPES[dtypes]
    inputs = prefix_attention_inputs(
        Z, H, H_KV, S, T, P, DH, dtype=dtype, prefix_dtype=prefix_dtype, gate=gate, device=device, seed=seed
    )
    options = {
        "is_causal": causal,
        "sliding_window": window,
        "softcap": softcap,
        "scale": DH**-0.5 if scale is None else scale,
    }
    return Case(inputs, None if mask is None else make_mask(mask, Z, H, S, T, dtype, device), p, options)


def make_mask(name: str, Z: int, H: int, S: int, T: int, dtype: torch.dtype, device: str) -> Tensor:
    """Padding on both sides, of everything in the first sequence's first query; as bool, additive, or a bias."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.ones(Z, 1, S, T, dtype=torch.bool, device=device)
    keep[:1, :, :, : T // 3] = False
    keep[-1:, :, :, T - T // 4 :] = False
    if name == "keys":
        return keep[:, :, :1]
    keep[:1, :, :1] = False
    if name == "bool":
        return keep
    if name == "bias":
        return torch.randn(1, H, S, T, generator=generator).to(device=device, dtype=dtype)
    lowest = {"-inf": -torch.inf, "min": torch.finfo(dtype).min, "-2000": -2000.0}[name]
    return torch.zeros(keep.shape, dtype=dtype, device=device).masked_fill(~keep, lowest)


def seed_and_threshold(case: Case) -> tuple[Tensor | None, int]:
    threshold = reference.drop_threshold(case.p)
    return torch.tensor([SEED], device=case.inputs.dy.device) if threshold else None, threshold


def arguments(case: Case) -> tuple:
    """The launchers' common arguments."""
    seed, threshold = seed_and_threshold(case)
    x = case.inputs
    return (x.query, x.key, x.value, x.prefix_key, x.prefix_value, case.attn_mask, x.gate, threshold, seed)


def run(case: Case, needs: set[str] | None = None) -> dict[str, Tensor]:
    """Every result of the kernels by name: y, lse and the gradients that `needs` names, all where it is not given."""
    needs = case.needs if needs is None else needs
    y, lse = attention_fwd(*arguments(case), **case.options)
    grads = attention_bwd(case.inputs.dy, *arguments(case), y, lse, **case.options, needs=needs)
    assert set(grads) == needs
    return {"y": y, "lse": lse, **grads}


def keep_mask(case: Case) -> Tensor | None:
    seed, threshold = seed_and_threshold(case)
    (Z, H, S, _), T, P = case.inputs.query.shape, case.inputs.key.shape[2], case.inputs.prefix_key.shape[1]
    return attention_dropout_mask(seed, (Z, H, S, P, T), threshold) if threshold else None


def expected(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same of the reference, in `dtype` where one is given, with the mask that the kernels draw."""
    inputs = case.inputs if dtype is None else case.inputs.to(dtype)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves().items()}
    y = reference.prefix_attention(
        **leaves, **case.options, attn_mask=case.attn_mask, dropout_p=case.p, keep_mask=keep_mask(case)
    )
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), inputs.dy), strict=True))


def assert_matches(case: Case, needs: set[str] | None = None) -> None:
    """Every result within the error budget."""
    actual, truth, eager = run(case, needs), expected(case, torch.float64), expected(case)
    del actual["lse"]
    Z, H, S, DH = case.inputs.query.shape
    for name, value in actual.items():
        length = DH + Z * H * S + case.inputs.key.shape[2] + case.inputs.prefix_key.shape[1]
        assert_within_budget(value, truth[name], eager[name], length=length, name=name)

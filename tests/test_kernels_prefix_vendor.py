"""The prefix added to what the vendor's attention gave for the own keys, for which torch's operations stand in here."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


from peft_fast.kernels import vendor_attention
from peft_fast.kernels.prefix_attention import attention_fwd
from prefix_cases import arguments, assert_matches, make_case, run


def own_logits(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    logits = query.float() @ key.float().mT * scale
    return logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf) if is_causal else logits


def vendor_fwd(query, key, value, is_causal, scale):
    """What `vendor_attention.fwd` gives, in torch's operations."""
    group = query.shape[1] // key.shape[1]
    logits = own_logits(query, key.repeat_interleave(group, 1), is_causal, scale)
    y = logits.softmax(-1) @ value.repeat_interleave(group, 1).float()
    return torch.empty_like(query).copy_(y), logits.logsumexp(-1)


def vendor_bwd(dy, y, lse, query, key, value, is_causal, scale):
    """What `vendor_attention.bwd` gives."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, 1).float() for x in (key, value))
    weights = (own_logits(query, keys, is_causal, scale) - lse[..., None]).exp()
    delta = (dy.float() * y.float()).sum(-1, keepdim=True)
    dl = weights * (dy.float() @ values.mT - delta)
    per_head = (dl.mT @ query.float() * scale, weights.mT @ dy.float())
    dk, dv = (x.unflatten(1, (-1, group)).sum(2).to(key.dtype) for x in per_head)
    return (dl @ keys * scale).to(query.dtype), dk, dv


@pytest.fixture
def vendor(monkeypatch) -> list[str]:
    """torch's operations in place of the vendor's kernels, which here serve every plain call; the calls they get."""
    calls: list[str] = []
    monkeypatch.setattr(vendor_attention, "serves", lambda *args: True)
    monkeypatch.setattr(vendor_attention, "fwd", lambda *args: calls.append("fwd") or vendor_fwd(*args))
    monkeypatch.setattr(vendor_attention, "bwd", lambda *args: calls.append("bwd") or vendor_bwd(*args))
    return calls


# The prefix added to what the own keys gave: one tile of it and more, its last one partly filled, in both units of lse.
@pytest.mark.parametrize("P", [5, 32, 70])
@pytest.mark.parametrize("H_KV", [2, 4], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtypes", ["fp32", "fp16", "bf16", "bf16-fp32"])
def test_prefix_added_to_the_vendors_part(dtypes, causal, H_KV, P, vendor, device):
    assert_matches(make_case(2, 4, H_KV, 40, 40, P, 16, dtypes=dtypes, causal=causal, device=device))
    assert vendor == ["fwd", "bwd"]


# The vendor's kernels give all of their gradients at once; only for one of them they are run.
@pytest.mark.parametrize(
    ("needs", "calls"),
    [
        ({"query"}, ["fwd", "bwd"]),
        ({"key"}, ["fwd", "bwd"]),
        ({"value", "prefix_key"}, ["fwd", "bwd"]),
        ({"prefix_key"}, ["fwd"]),
        ({"prefix_value"}, ["fwd"]),
        ({"prefix_key", "prefix_value"}, ["fwd"]),
        (set(), ["fwd"]),
    ],
    ids=lambda value: "-".join(sorted(value)) or "none" if isinstance(value, set) else "",
)
def test_needs_beside_the_vendors_part(needs, calls, vendor, device):
    assert_matches(make_case(2, 4, 2, 40, 50, 5, 16, dtypes="bf16", device=device), needs)
    assert vendor == calls


# Layouts that the vendor's results follow; ours do not.
def test_layouts_beside_the_vendors_part(vendor, device):
    case = make_case(2, 4, 2, 40, 40, 5, 16, dtypes="bf16", device=device)
    for name in ("query", "key", "value"):
        setattr(case.inputs, name, getattr(case.inputs, name).contiguous())
    assert_matches(case)
    results = run(case)
    for name in ("y", "query", "key", "value"):
        assert results[name].transpose(1, 2).is_contiguous(), name
    assert results["lse"].shape == (1, 2, 4, 40)


def test_no_vendor_where_it_does_not_know_the_rules(vendor, device):
    for options in ({"mask": "bool"}, {"gate": True}, {"window": 9}, {"softcap": 2.0}, {"p": 0.1}):
        assert_matches(make_case(2, 4, 2, 20, 20, 5, 16, device=device, **options))
    assert vendor == []


def test_no_vendor_in_deterministic_backward(vendor, device):
    case = make_case(2, 4, 2, 20, 20, 5, 16, dtypes="bf16", device=device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        run(case)
    finally:
        torch.use_deterministic_algorithms(before)
    assert vendor == ["fwd"]


def test_rows_of_which_the_vendor_saw_no_key(monkeypatch, vendor, device):
    """A row without an own key, whatever y the vendor gives for it, is the prefix's alone."""
    case = make_case(1, 2, 1, 20, 20, 5, 16, device=device)
    nothing = torch.full_like(case.inputs.query, torch.nan), torch.full((1, 2, 20), -torch.inf, device=device)
    monkeypatch.setattr(vendor_attention, "fwd", lambda *args: nothing)
    y, lse = attention_fwd(*arguments(case), **case.options)
    case.inputs.key, case.inputs.value = (x[:, :, :0] for x in (case.inputs.key, case.inputs.value))
    monkeypatch.setattr(vendor_attention, "serves", lambda *args: False)
    expected_y, expected_lse = attention_fwd(*arguments(case), **case.options)
    assert torch.equal(y, expected_y)
    assert torch.equal(lse, expected_lse)

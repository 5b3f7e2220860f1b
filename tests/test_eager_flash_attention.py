"""Prefix attention by torch's fused attention for CPUs, in blocks of rows, against the reference."""

import functools
import itertools
import math

import pytest
import torch
from prefix_calls import (
    MASKS,
    RULES,
    additive,
    boolean_mask,
    forward_backward,
    wide,
)
from torch.utils.checkpoint import checkpoint

import peft_fast
from models import Watching
from op_dtypes import DTYPES
from peft_fast import reference
from peft_fast.eager import flash_attention as flash
from peft_fast.eager.prefix_attention import Options, Seen, seen_keys
from peft_fast.ops import prefix_attention
from peft_fast.ops.prefix_attention import _as_usual
from peft_fast.testing import assert_within_budget, prefix_attention_inputs, saved_bytes


@pytest.fixture
def blocks(monkeypatch):
    """The blocks that were computed, as (rows, keys) of the forward passes; three in a call, however small it is."""
    found = []

    def listed(tensors, options):
        for block in each(tensors, options):
            found.append((block.at[2], block.keys))
            yield block

    each = flash._blocks
    monkeypatch.setattr(flash, "_blocks", listed)
    monkeypatch.setattr(flash, "block_count", lambda query, key, span: 3)
    return found


def as_stock(query, key, value, prefix_key, prefix_value, attn_mask, is_causal=False, sliding_window=None, scale=None):
    """Copies of the prefix in front of all keys, and torch's attention."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _as_usual(
        query, key, value, prefix_key, prefix_value, attn_mask, is_causal, sliding_window, scale, dropout_p=0.0
    )


def assert_within_budget_of_stock(calls, attn_mask=None, **rules):
    """Twice the error of stock's own call: torch's kernel, which both run, rounds more than softmax and matmuls do.

    A seed is passed to the op, which then takes no usual call, however small this one is.
    """
    options, results = rules | {"attn_mask": attn_mask}, []
    for inputs in calls:
        actual = forward_backward(prefix_attention, inputs, seed=torch.tensor([1]), **options)
        expected = forward_backward(as_stock, inputs, **options)
        truth = forward_backward(reference.prefix_attention, inputs.to(torch.float64), **wide(options))
        results.append((actual, truth, expected))
    for name in truth:
        values = [torch.cat([result[name].flatten() for result in kind]) for kind in zip(*results, strict=True)]
        assert_within_budget(*values, length=inputs.query.numel(), name=name)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "softcap"])
@pytest.mark.parametrize(("dtype", "prefix_dtype"), DTYPES)
def test_masks_and_rules(blocks, dtype, prefix_dtype, rule, mask):
    calls = [
        prefix_attention_inputs(2, 4, 2, 66, 86, 16, 40, dtype=dtype, prefix_dtype=prefix_dtype, seed=seed)
        for seed in range(6 if dtype == torch.float32 else 1)
    ]
    assert_within_budget_of_stock(calls, MASKS[mask](dtype), **RULES[rule])
    assert len(blocks) == 2 * 3 * len(calls)


LENGTHS = list(itertools.product([1, 7, 64, 130], repeat=2))


@pytest.mark.parametrize(("S", "T"), LENGTHS)
@pytest.mark.parametrize(("H", "H_KV"), [(4, 4), (8, 2)])
def test_lengths(blocks, H, H_KV, S, T):
    """Also rows that see nothing but the prefix, where there are more queries than keys."""
    calls = [prefix_attention_inputs(2, H, H_KV, S, T, 5, 16, seed=seed) for seed in range(6)]
    for rules in ({"is_causal": True}, {"sliding_window": 9}, {"is_causal": True, "sliding_window": 9}):
        assert_within_budget_of_stock(calls, **rules)
    assert blocks


@pytest.fixture
def apart(monkeypatch):
    """A call for each sequence that sees other keys than the one before."""
    monkeypatch.setattr(flash, "APART_ROWS", 0)
    monkeypatch.setattr(flash, "CALL_LOGITS", 0)
    monkeypatch.setattr(flash, "_threads", lambda: 1)


def padded(T: int, ranges: list[tuple[int, int]]) -> torch.Tensor:
    """(Z, 1, 1, T), True from the first key of each sequence to the last."""
    keys = torch.arange(T)
    return torch.stack([(keys >= first) & (keys < last) for first, last in ranges])[:, None, None]


# Padding on the right, none, on the left, on both sides, a sequence that is all padding.
PADDING = [(0, 40), (0, 66), (0, 66), (13, 66), (9, 50), (0, 0)]


@pytest.mark.parametrize("kind", ["bool", "rows", "lowest", "causal"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("H", "H_KV"), [(4, 4), (8, 2)])
@pytest.mark.parametrize(("dtype", "prefix_dtype"), DTYPES)
def test_padding_is_left_out(blocks, apart, dtype, prefix_dtype, H, H_KV, is_causal, kind):
    mask = padded(66, PADDING)
    if kind == "rows":
        mask = mask.expand(-1, -1, 66, -1).contiguous()
    if kind == "causal":
        mask = mask & torch.ones(66, 66).bool().tril()
    if kind == "lowest":
        mask = additive(mask, dtype, torch.finfo(dtype).min)
    inputs = prefix_attention_inputs(6, H, H_KV, 66, 66, 5, 16, dtype=dtype, prefix_dtype=prefix_dtype)
    assert_within_budget_of_stock([inputs], mask, is_causal=is_causal)
    last_rows = [keys for rows, keys in blocks if rows.stop == 66]
    assert [(keys.start, keys.stop) for keys in last_rows] == [(0, 40), (0, 66), (13, 66), (9, 50), (0, 0)] * 2


def test_sequences_are_joined_where_that_costs_less(monkeypatch):
    query = torch.empty(5, 4, 1024, 16)
    ends = [100, 104, 60, 128, 127]

    def groups(blocks=1):
        sequences = (torch.zeros(5, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32))
        return [(g.stop - g.start, k.stop) for g, k in flash.sequence_groups(query, 128, Seen(None, sequences), blocks)]

    monkeypatch.setattr(flash, "_threads", lambda: 4)
    monkeypatch.setattr(flash, "CALL_LOGITS", 4 * 1024 * 8)
    assert groups() == [(2, 104), (1, 60), (2, 128)]
    assert groups(blocks=8) == [(3, 104), (2, 128)]
    monkeypatch.setattr(flash, "APART_ROWS", 4 * 1024 + 1)
    assert groups() == [(5, 128)]
    monkeypatch.setattr(flash, "APART_ROWS", 4 * 1024)
    assert len(groups()) == 3
    monkeypatch.setattr(flash, "_threads", lambda: 5)
    assert groups() == [(5, 128)], "threads without a head"


def test_keys_that_no_row_of_a_block_sees_are_left_out(blocks):
    inputs = prefix_attention_inputs(2, 4, 2, 66, 66, 5, 16)
    seed = torch.tensor([1])
    prefix_attention(**inputs.leaves(), is_causal=True, seed=seed)
    assert blocks == [(slice(44, 66), slice(0, 66)), (slice(22, 44), slice(0, 44)), (slice(0, 22), slice(0, 22))]
    blocks.clear()
    prefix_attention(**inputs.leaves(), is_causal=True, sliding_window=9, seed=seed)
    assert blocks == [(slice(44, 66), slice(36, 66)), (slice(22, 44), slice(14, 44)), (slice(0, 22), slice(0, 22))]
    blocks.clear()
    packed = torch.block_diag(*[torch.ones(22, 22).bool().tril()] * 3)
    prefix_attention(**inputs.leaves(), attn_mask=packed, seed=seed)
    assert blocks == [(slice(44, 66), slice(44, 66)), (slice(22, 44), slice(22, 44)), (slice(0, 22), slice(0, 22))]


def test_what_is_kept(blocks):
    """Beside the caller's tensors y and a number for each of its rows."""
    leaves = {
        name: leaf.requires_grad_() for name, leaf in prefix_attention_inputs(2, 4, 2, 66, 66, 5, 16).leaves().items()
    }
    mask, seed = boolean_mask(2, 66, 66), torch.tensor([1])
    kept = saved_bytes(lambda: prefix_attention(**leaves, attn_mask=mask, seed=seed), [*leaves.values(), mask])
    assert kept == 2 * 4 * 66 * (16 + 1) * 4
    assert blocks


def test_the_same_gradients_twice_and_second_derivatives(blocks):
    inputs = prefix_attention_inputs(1, 2, 1, 12, 12, 3, 8, dtype=torch.float64)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}
    y = prefix_attention(**leaves, is_causal=True, seed=torch.tensor([1]))
    first, second = (torch.autograd.grad(y, list(leaves.values()), inputs.dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def call(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return prefix_attention(**named, is_causal=True, seed=torch.tensor([1]))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()), fast_mode=True)
    assert blocks


@pytest.mark.parametrize(
    ("H_KV", "S", "count"),
    [(8, 383, 1), (8, 384, 2), (8, 1024, 4), (8, 4096, 8), (2, 127, 1), (2, 128, 2), (2, 512, 8), (2, 4095, 8)],
)
def test_block_count(H_KV, S, count):
    query, key = torch.empty(1, 8, S, 4), torch.empty(1, H_KV, S, 4)
    assert flash.block_count(query, key) == count
    assert flash.block_count(query, key, 16) == max(count, S // 64)
    assert flash.block_count(query, key, S) == count


def test_blocks_are_no_higher_than_a_window_or_what_was_packed():
    packed = torch.block_diag(*[torch.ones(22, 22).bool().tril()] * 3)
    causal, window = Options(0, None, True, None, None, 0.25), Options(0, None, True, 9, None, 0.25)

    def seen(mask):
        return seen_keys(mask[None, None], 66).rows

    assert [keys.tolist()[20:24] for keys in seen(packed)] == [[0, 0, 22, 22], [21, 22, 23, 24]]
    assert flash._span(causal, None) is None
    assert flash._span(causal, seen(packed)) == 22
    assert flash._span(window, None) == flash._span(window, seen(packed)) == 9
    assert flash._span(window._replace(is_causal=False), None) is None  # later keys are all seen
    assert seen(torch.ones(1, 66, dtype=torch.bool)) is seen(torch.ones(4, 66, dtype=torch.bool)) is None
    unseeing = torch.ones(66, 66).bool().tril(-1)
    assert flash._span(causal, seen(unseeing[:1].expand(66, -1))) is None
    assert flash._span(causal, seen(unseeing)) == 65
    assert flash.block_count(torch.empty(1, 8, 512, 4), torch.empty(1, 8, 512, 4), -66) == 8


@pytest.mark.parametrize("name", ["query", "key", "value", "prefix_key", "dy", "mask"])
def test_strides(blocks, name):
    """torch's kernel takes rows to be dense, and does not ask."""
    inputs = prefix_attention_inputs(2, 4, 2, 66, 66, 5, 16)
    leaves, dy, mask = inputs.leaves(), inputs.dy, boolean_mask(2, 66, 66)
    results = []
    for lay_out in (lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, x], -1)[..., 0]):
        tensors = {key: (lay_out(leaf) if key == name else leaf).requires_grad_() for key, leaf in leaves.items()}
        given = {"attn_mask": lay_out(mask) if name == "mask" else mask, "seed": torch.tensor([1])}
        y = prefix_attention(**tensors, **given)
        results.append([y, *torch.autograd.grad(y, list(tensors.values()), lay_out(dy) if name == "dy" else dy)])
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))
    assert blocks


def test_one_block_where_nothing_is_left_out(blocks):
    inputs = prefix_attention_inputs(2, 4, 2, 66, 66, 5, 16)
    mask = torch.rand(66, 66) > 0.5
    mask[:, [0, -1]] = True
    prefix_attention(**inputs.leaves(), attn_mask=mask, seed=torch.tensor([1]))
    assert blocks == [(slice(0, 66), slice(0, 66))]


def test_no_queries(blocks):
    inputs = prefix_attention_inputs(2, 4, 2, 0, 66, 5, 16)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}
    y = prefix_attention(**leaves, is_causal=True, seed=torch.tensor([1]))
    assert y.shape == (2, 4, 0, 16)
    assert all(not grad.any() for grad in torch.autograd.grad(y.sum(), list(leaves.values())))


def test_a_mask_that_is_no_number_gives_none(blocks):
    inputs = prefix_attention_inputs(2, 4, 2, 66, 66, 5, 16)
    mask = torch.zeros(66, 66).masked_fill_(~torch.ones(66, 66).bool().tril(), -math.inf)
    mask[:22, -1] = math.nan
    y = prefix_attention(**inputs.leaves(), attn_mask=mask, seed=torch.tensor([1]))
    assert y[:, :, :22].isnan().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_watched_forward_and_its_repetition_choose_alike(use_reentrant):
    """Where all rows see the same keys, the usual calls run, whoever watches."""
    inputs = prefix_attention_inputs(2, 8, 2, 300, 300, 16, 16)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    mask = (torch.arange(300) < 290).expand(1, 1, 300, 300).contiguous()

    def call(*tensors):
        return prefix_attention(*tensors, attn_mask=mask)

    expected = torch.autograd.grad(call(*leaves), leaves, inputs.dy)
    with Watching():
        y = checkpoint(call, *leaves, use_reentrant=use_reentrant)
    y.backward(inputs.dy)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


def test_what_is_served():
    inputs = prefix_attention_inputs(1, 2, 2, 8, 8, 3, 16, dtype=torch.bfloat16, gate=True)
    tensors = list(inputs.leaves().values())[:5]
    plain = Options(0, None, True, None, None, 0.25)
    mask = torch.zeros(8, 8)
    assert flash.serves([*tensors, None, None], plain)
    assert flash.serves([*tensors, mask.bfloat16(), None], plain)
    assert not flash.serves([*tensors, mask, None], plain), "it would round the mask"
    assert not flash.serves([*tensors, mask.bfloat16().requires_grad_(), None], plain)
    assert not flash.serves([*tensors, None, inputs.gate], plain)
    assert not flash.serves([*tensors, None, None], plain._replace(softcap=2.0))
    assert not flash.serves([*tensors, None, None], plain._replace(threshold=1, seed=torch.tensor([1])))
    assert not flash.serves([tensor.to("meta") for tensor in tensors] + [None, None], plain)


def test_an_explicit_backend_does_not_take_it(blocks):
    inputs = prefix_attention_inputs(1, 2, 2, 8, 8, 3, 16)
    with peft_fast.backend("eager"):
        forward_backward(prefix_attention, inputs, is_causal=True)
    assert not blocks


def test_a_row_of_least_values_attends_to_the_prefix_alone(blocks):
    inputs = prefix_attention_inputs(2, 4, 2, 66, 66, 5, 16)
    mask = additive(boolean_mask(2, 66, 66), torch.float32, torch.finfo(torch.float32).min)
    infinite = additive(boolean_mask(2, 66, 66), torch.float32, -math.inf)
    seed = torch.tensor([1])
    y, expected = (prefix_attention(**inputs.leaves(), attn_mask=m, seed=seed) for m in (mask, infinite))
    torch.testing.assert_close(y, expected)
    assert blocks


def long_padding(Z: int = 4, T: int = 512) -> torch.Tensor:
    """(Z, 1, 1, T), of which a call of 8 heads leaves something out."""
    return padded(T, [(0, T - 100 * i) for i in range(Z)])


def test_what_padding_is_worth_leaving_out(monkeypatch):
    monkeypatch.setattr(flash, "_threads", lambda: 2)

    def runs_ours(mask, S=512):
        inputs = prefix_attention_inputs(4, 8, 8, S, mask.shape[-1], 4, 16)
        y = prefix_attention(**{name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}, attn_mask=mask)
        return type(y.grad_fn).__name__ == "_PrefixAttentionBackward"

    assert runs_ours(long_padding())
    assert not runs_ours(padded(512, [(0, 512), (0, 510), (0, 440), (3, 512)])), "a tenth of it"
    assert runs_ours(padded(512, [(0, 300)])), "of all sequences"
    assert runs_ours(padded(384, [(0, 128), (0, 128), (3, 128), (0, 99)]), S=192), (
        "padded to one length for all batches"
    )
    assert not runs_ours(padded(384, [(0, 310)]), S=192), "a fifth of a short call"
    assert not runs_ours(padded(256, [(0, 99)]), S=128), "a small call"


def test_a_look_at_padding_does_not_break_graphs():
    inputs = prefix_attention_inputs(4, 8, 8, 512, 512, 4, 16)
    leaves = list(inputs.leaves().values())
    for mask in (long_padding(), long_padding().expand(-1, -1, 512, -1).contiguous()):
        compiled = torch.compile(
            lambda *args: prefix_attention(*args[:-1], attn_mask=args[-1]).transpose(1, 2).reshape(4, 512, -1),
            backend="aot_eager",
            fullgraph=True,
        )
        expected = prefix_attention(*leaves, attn_mask=mask).transpose(1, 2).reshape(4, 512, -1)
        torch.testing.assert_close(compiled(*leaves, mask), expected)


@pytest.mark.parametrize("lay_out", [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
@pytest.mark.parametrize(
    "mask", [None, long_padding(2, 66), padded(66, [(0, 66), (0, 66)])], ids=["none", "some", "all"]
)
def test_the_layout_is_that_of_the_fake_kernel(apart, mask, lay_out):
    """One block alone too, for which torch's kernel lays y out as it finds the query."""
    inputs = prefix_attention_inputs(2, 4, 2, 66, 66, 5, 16)
    tensors = [lay_out(leaf) if leaf.dim() == 4 else leaf for leaf in inputs.leaves().values()]
    options = Options(0, None, False, None, None, 0.25)
    torch.library.opcheck(torch.ops.peft_fast.prefix_attention_fwd, (*tensors, mask, None, *options, "flash"))


def test_a_repetition_by_other_threads_chooses_alike(one_thread, monkeypatch):
    monkeypatch.setattr(flash, "_threads", functools.cache(flash._threads.__wrapped__))
    inputs = prefix_attention_inputs(4, 8, 8, 512, 512, 4, 16)
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves().values()]
    y = checkpoint(lambda *args: prefix_attention(*args, attn_mask=long_padding()), *leaves, use_reentrant=False)
    torch.set_num_threads(9)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y, leaves, inputs.dy))

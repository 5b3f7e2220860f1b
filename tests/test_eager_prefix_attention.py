"""The eager form of prefix attention: its chunks, which keys they leave out, and what dropout drops of them."""

import math

import torch
from prefix_calls import SEED, additive, assert_op_within_budget, boolean_mask, keep_mask

from peft_fast.eager import prefix_attention as eager_form
from peft_fast.ops import prefix_attention
from peft_fast.testing import prefix_attention_inputs


def test_the_mask_of_dropout_is_that_of_the_seed_however_attn_mask_lies_in_memory():
    """Hooks that keep copies give backward a dense one."""
    inputs = prefix_attention_inputs(2, 4, 4, 200, 200, 3, 16)
    mask = (torch.arange(200) < torch.tensor([[150], [180]]))[:, None, None].expand(2, 1, 200, 200)
    strided, dense = (keep_mask("eager", inputs, 0.3, attn_mask=m) for m in (mask, mask.contiguous()))
    assert torch.equal(strided, dense)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}
    grads = []
    for pack in (lambda x: x, torch.clone):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = prefix_attention(**leaves, attn_mask=mask, dropout_p=0.3, seed=torch.tensor([SEED]))
        grads.append(torch.autograd.grad(y, list(leaves.values()), inputs.dy))
    assert all(map(torch.equal, *grads))


def test_small_chunks_are_the_same_call(monkeypatch):
    """Many heads, sequences and blocks of rows a chunk, or one of each."""
    inputs = prefix_attention_inputs(3, 8, 4, 70, 70, 5, 16)
    for limit in (1 << 20, 1 << 14, 1 << 12, 1 << 8, 1):
        monkeypatch.setattr(eager_form, "CPU_LOGITS", limit)
        assert_op_within_budget("eager", inputs, dropout_p=0.2, attn_mask=boolean_mask(3, 70, 70))
        assert_op_within_budget("eager", inputs, dropout_p=0.2, is_causal=True)


def test_the_mask_is_that_of_the_seed_whatever_the_number_of_threads(one_thread, monkeypatch):
    monkeypatch.setattr(eager_form, "CPU_LOGITS", 1 << 13)  # four sequences, which three threads do not share evenly
    inputs = prefix_attention_inputs(7, 1, 1, 40, 40, 5, 16)
    masks = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        masks.append(keep_mask("eager", inputs, 0.2))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_keys_that_nobody_sees_are_not_multiplied():
    """Of a causal mask, flag or tensor, half of the logits are made."""
    inputs = prefix_attention_inputs(1, 1, 1, 1024, 1024, 16, 16)
    tensors = [inputs.query, inputs.key, inputs.value, inputs.prefix_key, inputs.prefix_value]
    dense = torch.ones(1024, 1024, dtype=torch.bool).tril()

    def logits(mask: torch.Tensor | None, is_causal: bool) -> int:
        options = eager_form.Options(0, None, is_causal, None, None, 0.25)
        call = eager_form._Call([*tensors, mask, None], options)
        return sum(math.prod(call.shape(chunk, chunk.keys.stop)) for chunk, _ in call.chunks())

    flag = logits(None, True)
    assert flag == logits(dense, False) == logits(additive(dense, torch.float32, -math.inf), False)
    assert flag == logits(additive(dense, torch.float32, torch.finfo(torch.float32).min), False)
    assert flag == 1024 * 1024 * 9 // 16
    assert logits(None, False) == 1024 * 1024


def test_padding_is_not_multiplied(monkeypatch):
    """By chunks of few sequences, each with the range of keys that one of them sees."""
    inputs = prefix_attention_inputs(5, 4, 2, 60, 70, 5, 16)
    keys = torch.arange(70)
    ranges = [(0, 30), (5, 40), (0, 0), (20, 70), (0, 70)]
    padded = torch.stack([(keys >= first) & (keys < last) for first, last in ranges])[:, None, None]
    monkeypatch.setattr(eager_form, "CPU_LOGITS", 60 * 75 * 4 * 2)  # of two sequences
    tensors = [inputs.query, inputs.key, inputs.value, inputs.prefix_key, inputs.prefix_value, padded, None]
    chunks = list(eager_form._Call(tensors, eager_form.Options(0, None, False, None, None, 0.25)).chunks())
    found = [(chunk.heads, chunk.batch, chunk.keys) for chunk, _ in chunks]
    both = slice(0, 2)
    assert found == [(both, both, slice(0, 40)), (both, slice(2, 4), slice(20, 70)), (both, slice(4, 5), slice(0, 70))]
    for options in ({}, {"is_causal": True}, {"softcap": 1.5}):
        for mask in (padded, additive(padded, torch.float32, torch.finfo(torch.float32).min)):
            assert_op_within_budget("eager", inputs, dropout_p=0.2, attn_mask=mask, **options)
            assert_op_within_budget("eager", inputs, attn_mask=mask, **options)
    gated = prefix_attention_inputs(5, 4, 2, 60, 70, 5, 16, gate=True)
    assert_op_within_budget("eager", gated, dropout_p=0.2, attn_mask=padded)

"""The layer for prefix attention without PEFT."""

import copy

import pytest
import torch
import torch.nn.functional as F

from peft_fast import layers, reference


def tensors(Z=2, H=4, H_KV=2, S=5, T=6, DH=8, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = (Z, H, S, DH), (Z, H_KV, T, DH), (Z, H_KV, T, DH)
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def test_it_is_the_op():
    attention = layers.PrefixAttention(4, 8, 3, 2, dtype=torch.float64)
    q, k, v = tensors()
    y = attention(q, k, v, is_causal=True)
    expected = reference.prefix_attention(q, k, v, attention.prefix_key, attention.prefix_value, is_causal=True)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in attention.parameters())


def test_a_gated_layer_starts_without_a_prefix():
    attention = layers.PrefixAttention(4, 8, 3, 2, gate=True, dtype=torch.float64)
    q, k, v = tensors()
    y = attention(q, k, v)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    y.sum().backward()
    assert attention.gate.grad.abs().sum() > 0


def test_dropout_in_training_only():
    attention = layers.PrefixAttention(4, 8, 3, dropout=0.5)
    inputs = tensors(H_KV=4, dtype=torch.float32)
    assert not torch.equal(attention(*inputs), attention(*inputs))
    attention.eval()
    assert torch.equal(attention(*inputs), attention(*inputs))


def test_state_and_copies():
    attention = layers.PrefixAttention(4, 8, 3, 2, gate=True)
    assert set(attention.state_dict()) == {"prefix_key", "prefix_value", "gate"}
    assert {tuple(parameter.shape) for parameter in attention.parameters()} == {(2, 3, 8), (4,)}
    inputs = tensors(dtype=torch.float32)
    assert torch.equal(attention(*inputs), copy.deepcopy(attention)(*inputs))
    assert "2 key-value heads of size 8, 3 virtual tokens" in repr(attention)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 3), "num_heads: expected a whole number of at least 1, got 0"),
        ((4, 8, 0), "num_virtual_tokens: expected a whole number"),
        ((4, 8, 3, 3), "num_heads: must be a multiple of num_key_value_heads, got 4 and 3"),
    ],
    ids=["heads", "length", "groups"],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.PrefixAttention(*arguments)


def test_dropout_out_of_range():
    with pytest.raises(ValueError, match=r"dropout: must lie in \[0, 1\), got 1"):
        layers.PrefixAttention(4, 8, 3, dropout=1)

"""Prefix attention by torch's fused attention for CPUs, in blocks of rows: what runs there without dropout.

    y = softmax(scale · q [Kp; K]ᵀ + mask) [Vp; V], its gradients from y and the log-sum-exp of the rows

A block of rows meets the prefix, which every row sees, and the keys that one of its rows sees: in four blocks, under a
causal mask, five eighths of the sequence's part of one call over all keys. Kept for backward are the caller's tensors,
y and lse; the copies of the prefix in front of the keys are made again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.eager.prefix_attention import Options, Tensors, added, empty_y, hidden_keys, row_blocks, seen_keys

_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def serves(tensors: Tensors, options: Options) -> bool:
    """Whether `attention_fwd` can take a call."""
    query, *_, attn_mask, gate = tensors
    return (
        query.is_cpu
        and query.shape[2] != 0
        and gate is None
        and options.softcap is None
        and not options.threshold
        and (attn_mask is None or not attn_mask.requires_grad)
        # It would round a wider mask.
        and (attn_mask is None or torch.promote_types(attn_mask.dtype, query.dtype) is query.dtype)
    )


def block_count(query: Tensor, key: Tensor, span: int | None = None) -> int:
    """Into how many blocks of rows a call goes where not all rows see the same keys.

    More blocks leave out more keys, but torch's kernel works in tiles of 32 rows below 192 and of 64 from there on, and
    the gradients of keys and values are added up: of those, grouped heads have fewer. As measured on an Intel Emerald
    Rapids. Where no row sees more than `span` keys in a row, blocks need not be higher than that.
    """
    S = query.shape[2]
    rows, most = (192, 4) if query.shape[1] == key.shape[1] else (64, 8)
    count = max(1, min(most, S // rows), S // 512)
    return count if span is None else max(count, S // max(64, span))


def attention_fwd(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """y (Z, H, S, DH), a transposed (Z, S, H, DH), and lse (Z, H, S), natural, in float32 or wider.

    The tensors are those of `prefix_attention.attention_fwd`.
    """
    query = _dense_rows(tensors[0])
    y, lse = empty_y(query), query.new_empty(query.shape[:3], dtype=_wide(query))
    for rows, _, key, value, mask in _blocks(tensors, options):
        y_rows, lse_rows = _fwd(query[:, :, rows], key, value, 0.0, False, attn_mask=mask, scale=options.scale)
        y[:, :, rows], lse[:, :, rows] = y_rows, lse_rows
    return y, lse


def attention_bwd(
    dy: Tensor, tensors: Tensors, options: Options, saved: Sequence[Tensor], needs: set[str]
) -> dict[str, Tensor]:
    """The gradients that `needs` names among query, key, value, prefix_key and prefix_value; `saved` is y and lse."""
    y, lse = saved
    query, key, value, prefix_key, prefix_value, *_ = tensors
    P, dq = prefix_key.shape[1], torch.empty_like(query)
    dy, query = _dense_rows(dy), _dense_rows(query)
    dk, dv = _Sum(key, P), _Sum(value, P)
    for rows, keys, key_block, value_block, mask in _blocks(tensors, options):
        attended = dy[:, :, rows], query[:, :, rows], key_block, value_block, y[:, :, rows], lse[:, :, rows]
        dq[:, :, rows], *others = _bwd(*attended, 0.0, False, attn_mask=mask, scale=options.scale)
        dk.add(others[0], keys)
        dv.add(others[1], keys)
    grads = {"query": dq, "key": dk.own(), "value": dv.own()}
    grads |= {"prefix_key": dk.prefix(prefix_key), "prefix_value": dv.prefix(prefix_value)}
    return {name: grads[name] for name in needs}


def _blocks(tensors: Tensors, options: Options) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor | None]]:
    """Of each block, the last rows first: rows, keys of the sequence, [Kp; K], [Vp; V], and what is added."""
    query, key, value, prefix_key, prefix_value, attn_mask, _ = tensors
    S, T, P = query.shape[2], key.shape[2], prefix_key.shape[1]
    mask, seen = None, None
    if attn_mask is not None:
        mask = attn_mask.view((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        seen = seen_keys(mask, T)
    added_to_all = _added(mask, query, P, T, options)
    joints = [
        torch.cat([prefix.to(own.dtype).expand(len(own), -1, -1, -1), own], dim=2)
        for prefix, own in ((prefix_key, key), (prefix_value, value))
    ]
    height = -(-S // block_count(query, key, _span(options, seen)))
    blocks = row_blocks(S, T, height, options, seen)
    if all(keys == blocks[0][1] for _, keys in blocks):  # nothing to leave out
        blocks = [(slice(0, S), blocks[0][1])]
    for rows, keys in reversed(blocks):
        key_block, value_block = (_attended(joint, P, keys, 2) for joint in joints)
        added_rows = None if added_to_all is None else _attended(added_to_all[:, :, rows], P, keys, 3)
        yield rows, keys, key_block, value_block, added_rows


def _span(options: Options, seen: tuple[Tensor, Tensor] | None) -> int | None:
    """The most keys from the first that a row sees to its last, as far as that is less than all."""
    spans = [options.sliding_window] if options.sliding_window is not None and options.is_causal else []
    if seen is not None:
        spans.append(int((seen[1] - seen[0]).max()))
    return min(spans) if spans else None


def _attended(joint: Tensor, P: int, keys: slice, dim: int) -> Tensor:
    """Of `joint`, which has the prefix first in that dimension, the prefix and `keys`."""
    if keys.start == 0:
        return joint.narrow(dim, 0, P + keys.stop)
    own = joint.narrow(dim, P + keys.start, keys.stop - keys.start)
    return torch.cat([joint.narrow(dim, 0, P), own], dim)


def _added(mask: Tensor | None, query: Tensor, P: int, T: int, options: Options) -> Tensor | None:
    """What is added to all logits, (Z or 1, H or 1, S, P + T): zeros for the prefix."""
    S = query.shape[2]
    hidden = hidden_keys(slice(0, S), slice(0, T), S, T, options)
    if hidden is None and mask is None:
        return None
    if mask is None:
        mask = ~hidden[None, None]
    elif hidden is not None:
        mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, -torch.inf)
    mask = mask.expand(*mask.shape[:2], S, T)
    return added(F.pad(mask, (P, 0), value=mask.dtype == torch.bool), query.dtype)


class _Sum:
    """The gradient of [prefix; own] (Z, H_KV, P + T, DH), added up over blocks of rows."""

    def __init__(self, own: Tensor, P: int) -> None:
        self.of, self.P = own, P
        self.total: Any = None

    def add(self, block: Tensor, keys: slice) -> None:
        Z, H_KV, T, DH = self.of.shape
        if self.total is None:
            if keys == slice(0, T) and block.dtype is _wide(block):
                self.total = block
                return
            self.total = block.new_zeros(Z, H_KV, self.P + T, DH, dtype=_wide(block))
        if keys.start == 0:
            self.total[:, :, : self.P + keys.stop] += block
        else:
            self.total[:, :, : self.P] += block[:, :, : self.P]
            self.total[:, :, self.P + keys.start : self.P + keys.stop] += block[:, :, self.P :]

    def own(self) -> Tensor:
        return self.total[:, :, self.P :].to(self.of.dtype)

    def prefix(self, like: Tensor) -> Tensor:
        return self.total[:, :, : self.P].sum(0).to(like.dtype)


def _dense_rows(x: Tensor) -> Tensor:
    """torch's kernel reads rows as if they were dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

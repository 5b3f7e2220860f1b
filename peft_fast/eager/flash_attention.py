"""Prefix attention by torch's fused attention for CPUs, in blocks of rows: what runs there without dropout.

    y = softmax(scale · q [Kp; K]ᵀ + mask) [Vp; V], its gradients from y and the log-sum-exp of the rows

A block of rows meets the prefix, which every row sees, and the keys that one of its rows sees: in four blocks, under a
causal mask, five eighths of the sequence's part of one call over all keys. Sequences with more padding than others have
blocks of their own. Kept for backward are the caller's tensors, y and lse; the copies of the prefix in front of the
keys are made again.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.eager.prefix_attention import (
    Options,
    Seen,
    Tensors,
    added,
    both,
    empty_y,
    four_sizes,
    hidden_keys,
    row_blocks,
    seen_keys,
)

_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Rows of all heads from which on sequences get calls of torch's kernel apart, and what such a call, forward and
# backward, costs beside its logits, in logits. As measured on an Intel Emerald Rapids.
APART_ROWS = 4096
CALL_LOGITS = 1 << 17


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
    y: Any = None
    lse: Any = None
    for at, _, *attended, mask in _blocks(tensors, options):
        y_block, lse_block = _fwd(query[at], *attended, 0.0, False, attn_mask=mask, scale=options.scale)
        if y is None:
            y, lse = empty_y(query), query.new_empty(query.shape[:3], dtype=_wide(query))
        if y_block.shape == y.shape and y_block.stride() == y.stride():
            return y_block, lse_block.contiguous()
        y[at], lse[at] = y_block, lse_block
    return y, lse


def attention_bwd(
    dy: Tensor, tensors: Tensors, options: Options, saved: Sequence[Tensor], needs: set[str]
) -> dict[str, Tensor]:
    """The gradients that `needs` names among query, key, value, prefix_key and prefix_value; `saved` is y and lse."""
    y, lse = saved
    query, key, value, prefix_key, prefix_value, *_ = tensors
    dy, rows = _dense_rows(dy), _dense_rows(query)
    dq: Any = None
    dk, dv = (_Gradients(own, prefix_key.shape[1], query.shape[2]) for own in (key, value))
    for at, keys, *attended, mask in _blocks(tensors, options):
        saved_here = y[at], lse[at], 0.0, False
        dq_block, *others = _bwd(dy[at], rows[at], *attended, *saved_here, attn_mask=mask, scale=options.scale)
        dk.add(at, keys, others[0])
        dv.add(at, keys, others[1])
        if dq_block.shape == query.shape:
            dq = dq_block
        else:
            dq = torch.empty_like(query) if dq is None else dq
            dq[at] = dq_block
    grads = {"query": dq, "key": dk.own, "value": dv.own, "prefix_key": dk.prefix(), "prefix_value": dv.prefix()}
    inputs = {"query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    return {name: grads[name].to(inputs[name].dtype) for name in needs}


class _Block(NamedTuple):
    """Some rows of some sequences, and [prefix; keys] that they meet."""

    at: tuple[slice, slice, slice]  # where in query: sequences, heads, rows
    keys: slice  # of the sequence
    key: Tensor  # (sequences, H_KV, P + keys, DH)
    value: Tensor
    mask: Tensor | None  # what is added to the logits


def _blocks(tensors: Tensors, options: Options) -> Iterator[_Block]:
    """All blocks of a call, of each group of sequences the last rows first."""
    query, own_key, own_value, prefix_key, prefix_value, attn_mask, _ = tensors
    S, T, P = query.shape[2], own_key.shape[2], prefix_key.shape[1]
    mask = None if attn_mask is None else four_sizes(attn_mask)
    seen = None if mask is None else seen_keys(mask, T)
    seen_by_rows = None if seen is None else seen.rows
    if mask is not None and mask.stride(2) == 0:  # rows that are one in memory
        mask = mask[:, :, :1]
    height = -(-S // block_count(query, own_key, _span(options, seen_by_rows)))
    blocks = row_blocks(S, T, height, options, seen_by_rows)
    if all(keys == blocks[0][1] for _, keys in blocks):  # nothing to leave out
        blocks = [(slice(0, S), blocks[0][1])]
    hidden = hidden_keys(slice(0, S), slice(0, T), S, T, options)
    for batch, seen_by_batch in sequence_groups(query, T, seen, len(blocks)):
        joints = [
            torch.cat(
                [prefix.to(own.dtype).expand(batch.stop - batch.start, -1, -1, -1), own[batch, :, seen_by_batch]], 2
            )
            for prefix, own in ((prefix_key, own_key), (prefix_value, own_value))
        ]
        masked = _added(mask, hidden, batch, seen_by_batch, S, P, query.dtype)
        for rows, keys in reversed(blocks):
            keys = both(keys, seen_by_batch)
            key, value = (_attended(joint, P, keys, seen_by_batch, 2) for joint in joints)
            added_rows = None if masked is None else _attended(masked[:, :, rows], P, keys, seen_by_batch, 3)
            yield _Block((batch, slice(None), rows), keys, key, value, added_rows)


def sequence_groups(query: Tensor, T: int, seen: Seen | None, blocks: int = 1) -> list[tuple[slice, slice]]:
    """The sequences in groups of so many blocks of rows, each with the range of the T keys that one of them may see.

    A group ends where leaving out what the next one does not see takes less than the calls that it costs. torch's
    kernel shares sequences and heads among threads.
    """
    Z, H, S, _ = query.shape
    if seen is None:
        return [(slice(0, Z), slice(0, T))]
    if len(seen.sequences[0]) == 1 or H * S < APART_ROWS or _threads() > H:
        first, last = int(seen.sequences[0].min()), int(seen.sequences[1].max())
        return [(slice(0, Z), slice(first, last) if first < last else slice(0, 0))]
    groups: list[tuple[slice, slice]] = []
    for z, (first, last) in enumerate(zip(*(ends.tolist() for ends in seen.sequences), strict=True)):
        keys = slice(first, last) if first < last else slice(0, 0)
        if groups:
            batch, others = groups[-1]
            count, joint = z - batch.start, _either(keys, others)
            more = (count + 1) * _length(joint) - count * _length(others) - _length(keys)
            if more * H * S <= CALL_LOGITS * blocks:
                groups[-1] = slice(batch.start, z + 1), joint
                continue
        groups.append((slice(z, z + 1), keys))
    return groups


@functools.cache
def _threads() -> int:
    """Those of the process when it was first asked: a repeated forward has to choose as the first one did."""
    return torch.get_num_threads()


def _length(keys: slice) -> int:
    return keys.stop - keys.start


def _either(a: slice, b: slice) -> slice:
    """The range of all keys of two."""
    if a.start == a.stop or b.start == b.stop:
        return b if a.start == a.stop else a
    return slice(min(a.start, b.start), max(a.stop, b.stop))


def _span(options: Options, seen: tuple[Tensor, Tensor] | None) -> int | None:
    """The most keys from the first that a row sees to its last, as far as that is less than all."""
    spans = [options.sliding_window] if options.sliding_window is not None and options.is_causal else []
    if seen is not None:
        spans.append(int((seen[1] - seen[0]).max()))
    return min(spans) if spans else None


def _attended(joint: Tensor, P: int, keys: slice, of: slice, dim: int) -> Tensor:
    """Of `joint`, which has the prefix and the keys `of` a sequence in that dimension, the prefix and `keys`."""
    start, length = P + keys.start - of.start, _length(keys)
    if start == P:
        return joint.narrow(dim, 0, P + length)
    return torch.cat([joint.narrow(dim, 0, P), joint.narrow(dim, start, length)], dim)


def _added(
    mask: Tensor | None, hidden: Tensor | None, batch: slice, keys: slice, S: int, P: int, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the logits of some sequences, (sequences or 1, H or 1, S, P + keys): zeros for the prefix.

    None where that is nothing.
    """
    if mask is not None:
        mask = _part(mask, batch, keys)
        if mask.dtype == torch.bool and mask.numel() and bool(mask.view(torch.uint8).amin()):
            mask = None
    if hidden is not None:
        hidden = hidden[:, keys]
        if mask is None:
            mask = ~hidden[None, None]
        else:
            mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, -torch.inf)
    if mask is None:
        return None
    mask = F.pad(added(mask, dtype).expand(*mask.shape[:3], _length(keys)), (P, 0))
    return mask.expand(-1, -1, S, -1)


def _part(mask: Tensor, batch: slice, keys: slice) -> Tensor:
    """A part of a mask, whose sizes of 1 stand for any."""
    return mask[batch if mask.shape[0] > 1 else slice(None), :, :, keys if mask.shape[3] > 1 else slice(None)]


class _Gradients:
    """Those of keys or values, of the sequences (Z, H_KV, T, DH) and of the prefix."""

    def __init__(self, own: Tensor, P: int, S: int) -> None:
        self._of, self._P, self._S = own, P, S
        self.own: Any = None
        self._prefixes: list[Tensor] = []  # by groups of sequences

    def add(self, at: tuple[slice, slice, slice], keys: slice, grad: Tensor) -> None:
        """That of a block's [prefix; keys]; those of several blocks are added up in float32 or wider.

        The first block of a sequence has its last rows.
        """
        batch, _, rows = at
        grad = grad.to(_wide(grad))
        prefix, own = grad[:, :, : self._P], grad[:, :, self._P :]
        if rows.stop < self._S:
            self._prefixes[-1] += prefix
            self.own[batch][:, :, keys] += own
            return
        if own.shape == self._of.shape:
            self.own = own
            self._prefixes.append(prefix)
            return
        self._prefixes.append(prefix.clone())  # the block's memory is not kept
        if self.own is None:
            self.own = torch.empty_like(self._of, dtype=own.dtype)
        target = self.own[batch]
        target[:, :, : keys.start] = 0
        target[:, :, keys] = own
        target[:, :, keys.stop :] = 0

    def prefix(self) -> Tensor:
        """(H_KV, P, DH)."""
        return torch.cat(self._prefixes).sum(0)


def _dense_rows(x: Tensor) -> Tensor:
    """torch's kernel reads rows as if they were dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

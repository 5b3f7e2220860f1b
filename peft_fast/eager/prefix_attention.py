"""Prefix attention from ordinary torch calls: what runs on the CPU.

    l  = cap(scale · q [Kp; K]ᵀ) + mask       p = softmax(l)            y = drop(p) [Vp; V]
    dp = drop(dy [Vp; V]ᵀ)                    ds = p ∘ (dp - Σ p dp)    [dVp; dV] = drop(p)ᵀ dy
    dq = scale · cap' ds [Kp; K]              [dKp; dK] = scale · (cap' ds)ᵀ q

Logits exist one chunk at a time, small enough to stay in the cache, and are made again in backward: nothing but the
inputs is kept. The query heads of a group are rows of one matmul, so that keys are read once for all of them. Rows are
taken in blocks where they see different keys, and keys that no row of a block sees are left out: nearly half of the
work under a long causal mask, be it a flag or a tensor.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_fast.eager.dropout import Dropped, dropped_pieces
from peft_fast.reference import keep_scale

# Logits of a chunk: on the CPU what stays in the cache between its passes, elsewhere few large launches.
CPU_LOGITS = 1 << 20
OTHER_LOGITS = 1 << 26
# Rows of a block, heads of the group counted, where blocks see different keys.
BLOCK_ROWS = 128
FEW_ROWS, MANY_ROWS = 16, 64


class Options(NamedTuple):
    """What is not a tensor in a call of the op, and its seed."""

    threshold: int
    seed: Tensor | None
    is_causal: bool
    sliding_window: int | None
    softcap: float | None
    scale: float

    def keywords(self) -> dict[str, Any]:
        """Those that are keywords of the reference and of the kernels' launchers."""
        return {name: getattr(self, name) for name in ("is_causal", "sliding_window", "softcap", "scale")}


# query, key, value, prefix_key, prefix_value, attn_mask, gate
Tensors = Sequence[Any]


class _Chunk(NamedTuple):
    """Which logits are made at a time: kv heads, sequences, queries, and the keys of the sequence."""

    heads: slice
    batch: slice
    rows: slice
    keys: slice

    def take(self, tensor: Tensor) -> Tensor:
        """The chunk of (H_KV, Z, G, S, DH), as (H_KV · Z, G · S, DH)."""
        part = tensor[self.heads, self.batch, :, self.rows]
        wide = torch.promote_types(tensor.dtype, torch.float32)
        return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[-1]).to(wide)

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """The inverse of `take`."""
        target = tensor[self.heads, self.batch, :, self.rows]
        target.copy_(part.view(target.shape))

    def of_mask(self, mask: Tensor) -> Tensor:
        """The chunk of (H_KV, Z, G, S, T), any size of which may be 1."""
        index = (self.heads, self.batch, slice(None), self.rows, self.keys)
        return mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, index, strict=True))]


def attention_fwd(tensors: Tensors, options: Options) -> Tensor:
    """y (Z, H, S, DH), a transposed (Z, S, H, DH).

    The tensors: query (Z, H, S, DH), key and value (Z, H_KV, T, DH), prefix_key and prefix_value (H_KV, P, DH),
    attn_mask that broadcasts to (Z, H, S, T) or None, gate (H,) or None.
    """
    call = _Call(tensors, options)
    y = empty_y(tensors[0])
    y_folded = call.fold(y)
    for chunk, dropped in call.chunks():
        q = chunk.take(call.query)
        _, _, weights = call.weights(chunk, q, call.joint(chunk, call.prefix_key, call.key))
        if dropped is not None:
            dropped.mask_(weights)
        chunk.put(
            y_folded, call.product(weights, call.joint(chunk, call.prefix_value, call.value), call.keep_scale, "rows")
        )
    return y


def empty_y(query: Tensor) -> Tensor:
    """Memory for y, (Z, H, S, DH), laid out as (Z, S, H, DH); no view in autograd's eyes."""
    Z, H, S, DH = query.shape
    return query.new_empty_strided((Z, H, S, DH), (S * H * DH, DH, H * DH, 1))


def attention_bwd(dy: Tensor, tensors: Tensors, options: Options, needs: set[str]) -> dict[str, Tensor]:
    """The gradients that `needs` names among query, key, value, prefix_key, prefix_value, attn_mask and gate."""
    query, key, value, prefix_key, prefix_value, attn_mask, gate = tensors
    call = _Call(tensors, options)
    P, scale, keep = call.P, options.scale, call.keep_scale
    dy = call.fold(dy)
    dq = torch.empty_like(query)
    dq_folded = call.fold(dq)
    # Sums over chunks. Keys and values keep the memory order of the inputs, (Z, T, H_KV, DH) as a rule.
    dk, dv = (torch.zeros_like(tensor, dtype=call.wide).transpose(0, 1) for tensor in (key, value))
    dkp, dvp = (torch.zeros_like(tensor) for tensor in (call.prefix_key, call.prefix_value))
    dgate = None if call.gate is None else torch.zeros_like(call.gate)
    dmask = torch.zeros_like(call.mask) if call.mask is not None and "attn_mask" in needs else None
    for chunk, dropped in call.chunks():
        q, dy_rows = chunk.take(call.query), chunk.take(dy)
        joint_key = call.joint(chunk, call.prefix_key, call.key)
        logits, p, weights = call.weights(chunk, q, joint_key)
        dweights = call.product(dy_rows, call.joint(chunk, call.prefix_value, call.value).mT, keep, "dweights")
        if dropped is not None:
            weights = dropped.masked(weights)
            dropped.mask_(dweights)
        if needs & {"value", "prefix_value"}:  # [dVp; dV] = drop(p)ᵀ dy
            call.add_reduced(weights, dy_rows, keep, chunk, dvp, dv)
        if dgate is not None:
            dgate[chunk.heads] += (dweights * p)[..., :P].reshape(call.shape(chunk, P)).sum((1, 3, 4))
        ds = call.softmax_bwd(chunk, dweights, p)  # p ∘ (dp - Σ p dp)
        if dmask is not None:
            part = chunk.of_mask(dmask)
            part += ds[..., P:].view(call.shape(chunk, -1)).sum_to_size(part.shape)
        if logits is not None:  # cap' = 1 - tanh²
            ds *= 1 - (logits / call.options.softcap).square()
        if "query" in needs:
            chunk.put(dq_folded, call.product(ds, joint_key, scale, "rows"))
        if needs & {"key", "prefix_key"}:
            call.add_reduced(ds, q, scale, chunk, dkp, dk)
    grads = {"query": dq, "key": dk.transpose(0, 1), "value": dv.transpose(0, 1)}
    grads |= {"prefix_key": dkp, "prefix_value": dvp}
    if dgate is not None:
        grads["gate"] = dgate.view(-1)
    if dmask is not None and attn_mask is not None:
        grads["attn_mask"] = dmask.transpose(0, 1).reshape(attn_mask.shape).contiguous()
    inputs = {"query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    inputs |= {"gate": gate, "attn_mask": attn_mask}
    return {name: grads[name].to(inputs[name].dtype) for name in needs}


def attention_dropout_mask(tensors: Tensors, options: Options) -> Tensor:
    """The mask (Z, H, S, P + T), True where a weight is kept, of a call of `attention_fwd` with these arguments.

    It is made chunk by chunk, so it depends on all of them; keys that a query does not see count as kept.
    """
    call = _Call(tensors, options)
    query, key, *_ = tensors
    (Z, H, S, _), T, P = query.shape, key.shape[2], call.P
    keep = torch.ones(Z, H, S, P + T, dtype=torch.bool, device=query.device)
    folded = call.fold(keep)
    for chunk, dropped in call.chunks():
        part = folded[chunk.heads, chunk.batch, :, chunk.rows]
        columns = torch.cat([torch.arange(P), P + torch.arange(T)[chunk.keys]]).to(keep.device)
        mask = torch.ones(*part.shape[:-1], len(columns), dtype=torch.bool, device=keep.device)
        if dropped is not None:
            dropped.mask_(mask)
        part[..., columns] = mask
    return keep


class _Call:
    """One call's tensors with the kv heads in front, and the pieces of its forward and backward."""

    def __init__(self, tensors: Tensors, options: Options) -> None:
        query, key, value, prefix_key, prefix_value, attn_mask, gate = tensors
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.H_KV, self.P = prefix_key.shape[:2]
        self.G = query.shape[1] // self.H_KV
        self.query = self.fold(query)
        self.key, self.value = key.transpose(0, 1), value.transpose(0, 1)
        # Rounded to the activations' dtype, as where they meet in memory.
        self.prefix_key, self.prefix_value = (p.to(query.dtype).to(self.wide) for p in (prefix_key, prefix_value))
        self.gate = None if gate is None else gate.to(self.wide).view(self.H_KV, self.G)
        self.options = options
        self.keep_scale = keep_scale(options.threshold) if options.threshold else 1.0
        self.mask: Tensor | None = None
        self.seen: Seen | None = None
        if attn_mask is not None:
            self._take_mask(attn_mask)
        self.spaces: dict[str, Tensor] = {}
        self.triangles: dict[tuple[int, int, int], Tensor | None] = {}

    def fold(self, tensor: Tensor) -> Tensor:
        """(Z, H, S, D) as (H_KV, Z, G, S, D)."""
        return tensor.unflatten(1, (self.H_KV, self.G)).transpose(0, 1)

    def _take_mask(self, attn_mask: Tensor) -> None:
        mask = four_sizes(attn_mask)
        folded = self.fold(mask) if mask.shape[1] > 1 else mask.unsqueeze(2).transpose(0, 1)
        self.mask = added(folded, self.wide)
        if mask.is_cpu:
            self.seen = seen_keys(mask, self.key.shape[2], gated=self.gate is not None)

    def chunks(self) -> Iterator[tuple[_Chunk, Dropped | None]]:
        """The chunks of the call in their order, each with what dropout drops of it."""
        chunks, threshold = list(self._chunks()), self.options.threshold
        if not threshold:
            return zip(chunks, [None] * len(chunks), strict=True)
        shapes = [self.shape(chunk, self.P + chunk.keys.stop - chunk.keys.start) for chunk in chunks]
        return zip(chunks, dropped_pieces(self.options.seed, shapes, threshold), strict=True)

    def shape(self, chunk: _Chunk, columns: int) -> tuple[int, ...]:
        heads, batch, rows = (part.stop - part.start for part in chunk[:3])
        return (heads, batch, self.G, rows, columns)

    def _chunks(self) -> Iterator[_Chunk]:
        Z, limit = self.query.shape[1], CPU_LOGITS if self.query.is_cpu else OTHER_LOGITS
        for rows, keys in self._row_blocks(limit):
            each = (rows.stop - rows.start) * self.G * (self.P + keys.stop - keys.start)
            heads, batch = limit // max(1, Z * each), limit // max(1, each)
            if self.seen is not None and batch > self.H_KV:  # few sequences, whose padding can be left out
                heads, batch = self.H_KV, batch // self.H_KV
            elif heads > 1:
                batch = Z
            # Threads share a power of two evenly. Their own number must not count: backward may run on another, and
            # what dropout drops depends on the chunks.
            batch = batch if batch >= Z else 1 << max(1, batch).bit_length() - 1
            for head_slice in _slices(self.H_KV, heads):
                for batch_slice in _slices(Z, batch):
                    yield _Chunk(head_slice, batch_slice, rows, self._seen_by(batch_slice, keys))

    def _seen_by(self, batch: slice, keys: slice) -> slice:
        """Of some keys the range that holds all that one of the sequences may see."""
        if self.seen is None:
            return keys
        first, last = self.seen.sequences
        if len(first) > 1:
            first, last = first[batch], last[batch]
        return both(keys, slice(int(first.min()), int(last.max())))

    def _row_blocks(self, limit: int) -> list[tuple[slice, slice]]:
        """Blocks of queries, each with the range of keys that one of them may see."""
        S, T, (_, _, is_causal, window, *_) = self.query.shape[3], self.key.shape[2], self.options
        seen = None if self.seen is None else self.seen.rows
        differ = is_causal or window is not None or seen is not None
        height = max(1, limit // (self.G * (self.P + T)))
        if differ:
            height = min(height, max(1, BLOCK_ROWS // self.G))
        return row_blocks(S, T, height, self.options, seen)

    def _triangle(self, chunk: _Chunk) -> Tensor | None:
        """What is_causal and the window add to a chunk's own logits, (S, T), None where that is nothing."""
        rows, keys = chunk.rows, chunk.keys
        name = (rows.start, keys.start, keys.stop)
        if name not in self.triangles:
            hidden = hidden_keys(rows, keys, self.query.shape[3], self.key.shape[2], self.options)
            self.triangles[name] = None if hidden is None else added(~hidden, self.wide).to(self.query.device)
        return self.triangles[name]

    def joint(self, chunk: _Chunk, prefix: Tensor, own: Tensor) -> Tensor:
        """[prefix; own] of a chunk, (B, P + keys, DH).

        A copy that stays in the cache. One matmul with both takes a third (192 products of 32 by 48) to nine tenths
        (3 of 256 by 320) of the time of two that write beside each other.
        """
        own = own[chunk.heads, chunk.batch, chunk.keys]
        heads, batch, keys, DH = own.shape
        out = own.new_empty(heads, batch, self.P + keys, DH, dtype=self.wide)
        out[:, :, : self.P] = prefix[chunk.heads, None]
        out[:, :, self.P :] = own
        return out.view(heads * batch, self.P + keys, DH)

    def product(self, a: Tensor, b: Tensor, alpha: float, space: str) -> Tensor:
        """alpha · a b, in the memory of that name, which the next chunk's product overwrites.

        Of few rows, long sums are added piece by piece: a matmul rounds them more than the product of one row, which
        eager attention takes for one query.
        """
        shape = (len(a), a.shape[1], b.shape[2])
        numel = shape[0] * shape[1] * shape[2]
        if space not in self.spaces or self.spaces[space].numel() < numel:
            self.spaces[space] = a.new_empty(numel)
        out = self.spaces[space][:numel].view(shape)
        if a.shape[1] >= FEW_ROWS:
            return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)
        length = max(4, math.isqrt(a.shape[2]))
        pieces = zip(a.split(length, 2), b.split(length, 1), strict=True)
        for i, (a_piece, b_piece) in enumerate(pieces):
            torch.baddbmm(out, a_piece, b_piece, beta=min(i, 1), alpha=alpha, out=out)
        return out

    def add_reduced(
        self, weights: Tensor, rows: Tensor, alpha: float, chunk: _Chunk, prefix_sum: Tensor, own_sum: Tensor
    ) -> None:
        """Add alpha · weightsᵀ rows to the sums of the prefix (H_KV, P, DH) and of the sequence (H_KV, Z, T, DH).

        Where rows are many, each query head of a group gets a product of its own, as eager attention gives it one, and
        these are added: a matmul's sum over the rows of all of them rounds more.
        """
        if self.G > 1 and rows.shape[1] > MANY_ROWS:
            products = self.product(_by_query_head(weights, self.G).mT, _by_query_head(rows, self.G), alpha, "columns")
            products = products.unflatten(0, (-1, self.G)).sum(1)
        else:
            products = self.product(weights.mT, rows, alpha, "columns")
        prefix, own = products.unflatten(0, self.shape(chunk, 1)[:2]).split_with_sizes(
            [self.P, products.shape[1] - self.P], dim=2
        )
        prefix_sum[chunk.heads] += prefix.sum(1)
        own_sum[chunk.heads, chunk.batch, chunk.keys] += own

    def weights(self, chunk: _Chunk, q: Tensor, joint_key: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """With a soft cap the capped logits without masks, the softmax or the two of them, and these with the gate."""
        logits = self.product(q, joint_key.mT, self.options.scale, "logits")
        capped, softcap = None, self.options.softcap
        if softcap is not None:
            capped = logits.div_(softcap).tanh_().mul_(softcap)
            logits = capped.clone()
        own = logits.view(*self.shape(chunk, logits.shape[-1]))[..., self.P :]
        if self.mask is not None:
            own += chunk.of_mask(self.mask)
        triangle = self._triangle(chunk)
        if triangle is not None:
            own += triangle
        if self.gate is None:
            p = torch.softmax(logits, -1, out=logits)
            return capped, p, p
        own = logits[..., self.P :]
        # A row that sees no key has 0 / 0, which counts as 0; what is not a number in the inputs stays so.
        if own.shape[-1]:
            unseeing = own.amax(-1, keepdim=True) == -torch.inf
            own = own.softmax(-1).masked_fill_(unseeing, 0)
        p = torch.cat([logits[..., : self.P].softmax(-1), own], -1)
        weights = p.clone()
        weights[..., : self.P] *= self._gate_rows(chunk)
        return capped, p, weights

    def softmax_bwd(self, chunk: _Chunk, dweights: Tensor, p: Tensor) -> Tensor:
        if self.gate is None:
            return torch.ops.aten._softmax_backward_data.out(dweights, p, -1, p.dtype, grad_input=dweights)
        dweights[..., : self.P] *= self._gate_rows(chunk)
        parts = zip(dweights.tensor_split([self.P], -1), p.tensor_split([self.P], -1), strict=True)
        return torch.cat([torch._softmax_backward_data(d, p, -1, p.dtype) for d, p in parts], -1)

    def _gate_rows(self, chunk: _Chunk) -> Tensor:
        heads, batch, G, rows, _ = self.shape(chunk, 1)
        return self.gate[chunk.heads].view(heads, 1, G, 1).expand(heads, batch, G, rows).reshape(heads * batch, -1, 1)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the logits."""
    if mask.dtype == torch.bool:
        return torch.zeros((), dtype=dtype, device=mask.device).where(mask, -torch.inf)
    return mask.to(dtype)


def four_sizes(attn_mask: Tensor) -> Tensor:
    """A mask that broadcasts to (Z, H, S, T), with all of its sizes, any of which may be 1."""
    return attn_mask.view((1,) * (4 - attn_mask.dim()) + attn_mask.shape)


class Seen(NamedTuple):
    """The first key that a mask shows and the one past the last, T and 0 where it shows none.

    Of the rows (S,), in any sequence and head, None where it is the same for all; of the sequences (1 or Z,), in any
    row and head. They depend on what the mask holds, not on how it lies in memory, which a copy changes.
    """

    rows: tuple[Tensor, Tensor] | None
    sequences: tuple[Tensor, Tensor]


def seen_keys(mask: Tensor, T: int, *, gated: bool = False) -> Seen | None:
    """What rows and sequences see of the keys, of a mask of four dimensions; None where there are none."""
    if T == 0 or 0 in mask.shape:
        return None
    if mask.stride(2) == 0:
        mask = mask[:, :, :1]
    if mask.dtype != torch.bool:
        # With softmaxes apart, a row that has only the dtype's least value in its mask still attends.
        mask = ~(mask <= (-torch.inf if gated else torch.finfo(mask.dtype).min))  # what is no number is seen
    seen = mask.view(torch.uint8)  # ten times as fast as any()
    columns = torch.arange(T, dtype=torch.int32, device="cpu")

    def ends(seen: Tensor) -> tuple[Tensor, Tensor]:
        seen = seen.bool().expand(-1, T)
        return torch.where(seen, columns, T).amin(1), torch.where(seen, columns + 1, 0).amax(1)

    rows = ends(seen.amax((0, 1))) if mask.shape[2] > 1 else None
    if rows is not None and all(bool((keys == keys[0]).all()) for keys in rows):
        rows = None
    return Seen(rows, ends(seen.amax((1, 2))))


def hidden_keys(rows: slice, keys: slice, S: int, T: int, options: Options) -> Tensor | None:
    """What is_causal and the window hide of the keys from the rows, (rows, keys); None where that is nothing."""
    if not options.is_causal and options.sliding_window is None:
        return None
    i = torch.arange(rows.start, rows.stop, device="cpu")[:, None] + T - S
    j = torch.arange(keys.start, keys.stop, device="cpu")
    hidden = (j > i) if options.is_causal else torch.zeros(len(i), len(j), dtype=torch.bool, device="cpu")
    if options.sliding_window is not None:
        hidden = hidden | (j <= i - options.sliding_window)
    return hidden if bool(hidden.any()) else None


def row_blocks(
    S: int, T: int, height: int, options: Options, seen: tuple[Tensor, Tensor] | None
) -> list[tuple[slice, slice]]:
    """Equal blocks of at most `height` queries, each with the range of keys that one of them may see."""
    blocks = []
    for rows in _slices(S, -(-S // max(1, -(-S // height)))):
        first, last = 0, T
        if options.is_causal:
            last = min(T, max(0, rows.stop + T - S))
        if options.sliding_window is not None:
            first = min(last, max(0, rows.start + T - S - options.sliding_window + 1))
        if seen is not None:
            seen_first, seen_last = int(seen[0][rows].min()), int(seen[1][rows].max())
            nothing = seen_first >= seen_last
            first, last = (0, 0) if nothing else (max(first, seen_first), min(last, seen_last))
        blocks.append((rows, slice(first, max(first, last))))
    return blocks


def both(a: slice, b: slice) -> slice:
    """The keys that lie in two ranges; of none, before the first of the second."""
    first, last = max(a.start, b.start), min(a.stop, b.stop)
    return slice(first, last) if first < last else slice(b.start, b.start)


def _by_query_head(rows: Tensor, G: int) -> Tensor:
    """(B, G · S, n) as (B · G, S, n)."""
    return rows.unflatten(1, (G, -1)).flatten(0, 1)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + max(1, step), length)) for i in range(0, length, max(1, step))]

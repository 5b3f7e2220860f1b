"""Forward of prefix attention and its dropout mask; formulas in `prefix_attention`."""

import triton
import triton.language as tl

from ._tl import accumulator, cast, dot, exp, keep_rows, keep_scale, offsets, tile_ptrs
from .prefix_tile import (
    OWN,
    PREFIX,
    base_2,
    dropped,
    exponential,
    features,
    head_gate,
    in_units,
    keys_seen,
    keys_seen_by_all,
    logarithm,
    logits,
    natural,
    place,
    query_rows,
    store_features,
)


@triton.jit
def _attend(acc, top, total, x, v, seed_ptr, threshold, rows, col, SEGMENT: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: acc = Σ drop(exp(x - top)) v, total = Σ exp(x - top), top = max x so far."""
    BASE_2: tl.constexpr = base_2(v.dtype)
    new = tl.maximum(top, tl.max(x, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = exponential(x - base[:, None], BASE_2)
    shrink = exponential(top - base, BASE_2)
    total = total * shrink + tl.sum(p, 1)
    p = cast(dropped(p, seed_ptr, threshold, rows, col, SEGMENT), v.dtype)
    return dot(p, v, acc * shrink[:, None], PRECISION), new, total


@triton.jit
def _attend_own(state, queries, keys, start, end, call, TILE: tl.constexpr, CONFIG: tl.constexpr, BORDER: tl.constexpr):
    """(acc, top, total) after the own keys start..end."""
    acc, top, total = state
    q, i, h, rows = queries
    k_ptr, stride_kt, v_ptr, stride_vt = keys
    sizes, factors, mask, seed_ptr, threshold = call
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    DH: tl.constexpr = TILE[2]
    UNIT: tl.constexpr = TILE[3]
    WIDE: tl.constexpr = CONFIG[4]
    PRECISION: tl.constexpr = CONFIG[5]
    for col in range(start, end, BLOCK_N):
        j = col + tl.arange(0, BLOCK_N)
        inside = j < sizes[1]
        k = features(k_ptr, offsets(j, stride_kt, UNIT, WIDE), inside, q.dtype, DH, BLOCK_D)
        x, _ = logits(q, k, i, h, col, sizes, factors, mask, OWN, CONFIG, BORDER)
        v = features(v_ptr, offsets(j, stride_vt, UNIT, WIDE), inside, q.dtype, DH, BLOCK_D)
        acc, top, total = _attend(acc, top, total, x, v, seed_ptr, threshold, rows, col, OWN, PRECISION)
    return acc, top, total


@triton.jit(do_not_specialize=["threshold"])
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    mask_ptr,
    gate_ptr,
    own_y_ptr,
    own_lse_ptr,
    y_ptr,
    lse_ptr,
    inner: tl.float64,
    outer: tl.float64,
    seed_ptr,
    threshold,
    Z,
    S,
    T,
    P,
    H_KV,
    window,
    part_keys,
    stride_qz,
    stride_qh,
    stride_qs,
    stride_kz,
    stride_kh,
    stride_kt,
    stride_vz,
    stride_vh,
    stride_vt,
    stride_pkh,
    stride_pkp,
    stride_pvh,
    stride_pvp,
    stride_mz,
    stride_mh,
    stride_ms,
    stride_mt,
    stride_yz,
    stride_yh,
    stride_ys,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_BY_ROW: tl.constexpr,
    DH: tl.constexpr,
    GROUP: tl.constexpr,
    IN_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y and lse of one block of rows: the queries of the heads that share a key head.

    IN_PARTS these are (parts, Z, H, S, DH), dense, and (parts, Z, H, S): each part has `part_keys` of the own keys, the
    first one the prefix too, and `attention_merge_kernel` puts them together.

    lse (Z, H, S) is the joint one. With a gate it is (3, Z, H, S): of the own keys the largest logit and the log of the
    sum of exponentials below it, in the units of the logits, and the prefix's. Apart, since a mask of large negative
    numbers, under which all keys of a row may be, would take up all digits of their sum.

    With own_y and own_lse, those of the own keys alone, it walks the prefix and adds it to them. They are laid out as y
    and lse, and may be the same memory.
    """
    X_DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    DTYPE: tl.constexpr = accumulator(X_DTYPE)
    BASE_2: tl.constexpr = base_2(X_DTYPE)
    # As in backward.
    KEYS_FIRST: tl.constexpr = X_DTYPE == DTYPE
    CONFIG: tl.constexpr = (CAUSAL, SOFTCAP, MASK_BY_ROW, MASK_UNIT, WIDE, PRECISION, KEYS_FIRST)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_D, DH, UNIT)
    blocks = tl.cdiv(S * GROUP, BLOCK_M)
    block, kv_head, z = place(tl.program_id(0), blocks, H_KV)
    # The last blocks see most keys under a causal mask: they start first.
    block = blocks - 1 - block
    i, h = query_rows(block, kv_head, GROUP, BLOCK_M)
    valid = i < S
    rows = (z * H_KV * GROUP + h) * S + i
    z = z.to(tl.int64)
    kv_head = kv_head.to(tl.int64)
    sizes = (S, T, P, window)
    factors = (inner, outer)
    mask = (mask_ptr, stride_mh, stride_ms, stride_mt)
    if mask_ptr is not None:
        mask = (mask_ptr + offsets(z, stride_mz, MASK_UNIT, WIDE), stride_mh, stride_ms, stride_mt)
    k_ptr += z * stride_kz + offsets(kv_head, stride_kh, UNIT, True)
    v_ptr += z * stride_vz + offsets(kv_head, stride_vh, UNIT, True)
    pk_ptr += offsets(kv_head, stride_pkh, UNIT, True)
    pv_ptr += offsets(kv_head, stride_pvh, UNIT, True)
    prefix_end = P
    if IN_PARTS:
        part = tl.program_id(1)
        prefix_end = P if part == 0 else 0
        part_rows = part.to(tl.int64) * Z * (H_KV * GROUP * S)
        y_ptr += part_rows * DH
        lse_ptr += part_rows

    q_offs = offsets(h, stride_qh, UNIT, WIDE) + offsets(i, stride_qs, UNIT, WIDE)
    q = features(q_ptr + z * stride_qz, q_offs, valid, X_DTYPE, DH, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)
    top = tl.full((BLOCK_M,), float("-inf"), DTYPE)
    total = tl.zeros((BLOCK_M,), DTYPE)
    if own_y_ptr is not None:
        # The state of the online softmax after them: Σ exp(x - lse) is 1.
        own_lse = tl.load(own_lse_ptr + z * (H_KV * GROUP * S) + h * S + i, mask=valid, other=float("-inf"))
        seen = own_lse != float("-inf")
        y_offs = offsets(h, stride_yh, UNIT, WIDE) + offsets(i, stride_ys, UNIT, WIDE)
        acc = features(own_y_ptr + z * stride_yz, y_offs, valid & seen, DTYPE, DH, BLOCK_D)
        top = in_units(own_lse, BASE_2)
        total = tl.where(seen, 1.0, 0.0).to(DTYPE)
    if gate_ptr is None:
        for col in range(0, prefix_end, BLOCK_P):
            p = col + tl.arange(0, BLOCK_P)
            k = features(pk_ptr, offsets(p, stride_pkp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            x, _ = logits(q, k, i, h, col, sizes, factors, mask, PREFIX, CONFIG)
            v = features(pv_ptr, offsets(p, stride_pvp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            acc, top, total = _attend(acc, top, total, x, v, seed_ptr, threshold, rows, col, PREFIX, PRECISION)
    if own_y_ptr is None:
        first, last = block * BLOCK_M // GROUP, min(S - 1, ((block + 1) * BLOCK_M - 1) // GROUP)
        start, end = keys_seen(first, last, sizes, CAUSAL, BLOCK_N)
        if IN_PARTS:
            start, end = start + part * part_keys, min(end, start + (part + 1) * part_keys)
        state = (acc, top, total)
        queries = (q, i, h, rows)
        keys = (k_ptr, stride_kt, v_ptr, stride_vt)
        call = (sizes, factors, mask, seed_ptr, threshold)
        if window is None and not KEYS_FIRST and BLOCK_D <= 128:  # wider heads leave no registers for a second loop
            full = keys_seen_by_all(first, start, end, sizes, CAUSAL, BLOCK_N)
            state = _attend_own(state, queries, keys, start, full, call, TILE, CONFIG, False)
            start = full
        acc, top, total = _attend_own(state, queries, keys, start, end, call, TILE, CONFIG, True)
    total = tl.where(top == float("-inf"), 1.0, total)
    acc /= total[:, None]

    lse_ptr += z * (H_KV * GROUP * S)
    segment = tl.cast(Z, tl.int64) * (H_KV * GROUP * S)
    if gate_ptr is None:
        tl.store(lse_ptr + h * S + i, natural(top + logarithm(total, BASE_2), BASE_2), mask=valid)
    else:
        tl.store(lse_ptr + h * S + i, top, mask=valid)
        tl.store(lse_ptr + segment + h * S + i, logarithm(total, BASE_2), mask=valid)
        top = tl.full((BLOCK_M,), float("-inf"), DTYPE)
        total = tl.zeros((BLOCK_M,), DTYPE)
        for col in range(0, P, BLOCK_P):
            p = col + tl.arange(0, BLOCK_P)
            k = features(pk_ptr, offsets(p, stride_pkp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            x, _ = logits(q, k, i, h, col, sizes, factors, mask, PREFIX, CONFIG)
            new = tl.maximum(top, tl.max(x, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # of a row of NaN
            total *= exponential(top - base, BASE_2)
            total += tl.sum(exponential(x - base[:, None], BASE_2), 1)
            top = new
        lse = top + logarithm(total, BASE_2)
        tl.store(lse_ptr + 2 * segment + h * S + i, natural(lse, BASE_2), mask=valid)
        # With its softmax known, the prefix's part adds to the same accumulator: a second one would not fit.
        gate = head_gate(gate_ptr, h, DTYPE)
        for col in range(0, P, BLOCK_P):
            p = col + tl.arange(0, BLOCK_P)
            k = features(pk_ptr, offsets(p, stride_pkp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            x, _ = logits(q, k, i, h, col, sizes, factors, mask, PREFIX, CONFIG)
            v = features(pv_ptr, offsets(p, stride_pvp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            weight = exponential(x - lse[:, None], BASE_2) * gate[:, None]
            weight = cast(dropped(weight, seed_ptr, threshold, rows, col, PREFIX), X_DTYPE)
            acc = dot(weight, v, acc, PRECISION)
    if seed_ptr is not None:
        acc *= keep_scale(threshold, DTYPE)
    y_offs = offsets(h, stride_yh, UNIT, WIDE) + offsets(i, stride_ys, UNIT, WIDE)
    store_features(y_ptr + z * stride_yz, y_offs, valid, acc, DH, BLOCK_D)


@triton.jit(do_not_specialize=["parts"])
def attention_merge_kernel(
    part_y_ptr,
    part_lse_ptr,
    y_ptr,
    lse_ptr,
    parts,
    ROWS,
    H,
    S,
    stride_yz,
    stride_yh,
    stride_ys,
    DH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = Σ exp(lse_part - lse) y_part of a row, of ROWS = Z·H·S, and lse = log Σ exp(lse_part), natural.

    BLOCK_N parts at a time, added up over them at the end: no load waits for another.
    """
    DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0)
    top = tl.full((BLOCK_N,), float("-inf"), DTYPE)
    for first in range(0, parts, BLOCK_N):
        part = first + tl.arange(0, BLOCK_N)
        at = part.to(tl.int64) * ROWS + row
        top = tl.maximum(top, tl.load(part_lse_ptr + at, mask=part < parts, other=float("-inf")))
    top = tl.max(top, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK_N,), DTYPE)
    acc = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    for first in range(0, parts, BLOCK_N):
        part = first + tl.arange(0, BLOCK_N)
        at = part.to(tl.int64) * ROWS + row
        y = features(part_y_ptr, at * DH, part < parts, DTYPE, DH, BLOCK_D)
        weight = exp(tl.load(part_lse_ptr + at, mask=part < parts, other=float("-inf")) - base)
        total += weight
        acc += weight[:, None] * y
    total = tl.sum(total, 0)
    total = tl.where(total == 0, 1.0, total)
    y = tl.sum(acc, 0) / total
    i, h, z = place(row.to(tl.int64), S, H)
    tl.store(lse_ptr + row, top + logarithm(total, False))
    d = tl.arange(0, BLOCK_D)
    at = z * stride_yz + h * stride_yh + i * stride_ys
    tl.store(y_ptr + at + d, cast(y, y_ptr.dtype.element_ty), mask=d < DH)


@triton.jit(do_not_specialize=["threshold"])
def attention_mask_kernel(
    out_ptr,
    seed_ptr,
    threshold,
    ROWS,
    COLS,
    stride_row,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The dropout mask of one segment."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    keep = keep_rows(seed_ptr, threshold, rows, col, BLOCK_M, BLOCK_N, SEGMENT)
    mask = (rows < ROWS)[:, None] & (cols < COLS)[None, :]
    tl.store(tile_ptrs(out_ptr, rows, cols, stride_row, 1, 1, WIDE), keep, mask=mask)

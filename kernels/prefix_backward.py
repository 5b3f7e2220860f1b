"""Backward of prefix attention; formulas in `prefix_attention`."""

import triton
import triton.language as tl

from ._tl import accumulator, cast, dot, keep_scale, offsets
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
    logits,
    place,
    products,
    queries_seeing,
    queries_seeing_all,
    query_rows,
    store_features,
)

# Heads up to which a walk has a loop of its own for tiles that are no border: wider ones leave no registers for it.
NARROW = tl.constexpr(64)


@triton.jit
def _weights(x, lse, log_total, BASE_2: tl.constexpr):
    """softmax from logits and lse in the same units; a row without a key, whose lse is -inf, has none.

    Where there is a `log_total`, lse is but the largest logit, and it the log of the sum of exponentials below.
    """
    x -= tl.where(lse == float("-inf"), 0.0, lse)[:, None]
    if log_total is not None:
        x -= log_total[:, None]
    return exponential(x, BASE_2)


@triton.jit
def _logit_grad(w, dw, delta, slope, DTYPE: tl.constexpr):
    """dl / c = w∘(dw - δ / c)∘cap', in DTYPE; dw is masked dy vᵀ."""
    return cast(w * (dw - delta[:, None]) * slope, DTYPE)


@triton.jit
def _own_dq(dq, delta, queries, keys, start, end, call, TILE: tl.constexpr, CONFIG: tl.constexpr, BORDER: tl.constexpr):
    """dq + dl k / c over the own keys start..end."""
    q, dy, i, h, rows, lse, log_total = queries
    k_ptr, stride_kt, v_ptr, stride_vt = keys
    sizes, factors, mask, seed_ptr, threshold = call
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    DH: tl.constexpr = TILE[2]
    UNIT: tl.constexpr = TILE[3]
    WIDE: tl.constexpr = CONFIG[4]
    PRECISION: tl.constexpr = CONFIG[5]
    KEYS_FIRST: tl.constexpr = CONFIG[6]
    for col in range(start, end, BLOCK_N):
        j = col + tl.arange(0, BLOCK_N)
        inside = j < sizes[1]
        k = features(k_ptr, offsets(j, stride_kt, UNIT, WIDE), inside, q.dtype, DH, BLOCK_D)
        v = features(v_ptr, offsets(j, stride_vt, UNIT, WIDE), inside, q.dtype, DH, BLOCK_D)
        x, slope = logits(q, k, i, h, col, sizes, factors, mask, OWN, CONFIG, BORDER)
        dw = products(dy, v, dq.dtype, KEYS_FIRST, PRECISION)
        dw = dropped(dw, seed_ptr, threshold, rows, col, OWN)
        w = _weights(x, lse, log_total, base_2(q.dtype))
        dq = dot(_logit_grad(w, dw, delta, slope, q.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["threshold"])
def attention_dq_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    mask_ptr,
    gate_ptr,
    y_ptr,
    lse_ptr,
    delta_ptr,
    own_dq_ptr,
    dq_ptr,
    inner: tl.float64,
    outer: tl.float64,
    scale: tl.float64,
    seed_ptr,
    threshold,
    Z,
    S,
    T,
    P,
    H_KV,
    window,
    stride_dyz,
    stride_dyh,
    stride_dys,
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
    stride_dqz,
    stride_dqh,
    stride_dqs,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_BY_ROW: tl.constexpr,
    DH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a block of rows, and δ / c of each, what dk and the prefix's gradients take: (Z, H, S), with a gate
    (2, Z, H, S), own and prefix.

    With own_dq, the own keys' part of dq, it walks the prefix and adds its part. own_dq is laid out as dq, and may be
    the same memory.
    """
    X_DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    DTYPE: tl.constexpr = accumulator(X_DTYPE)
    BASE_2: tl.constexpr = base_2(X_DTYPE)
    # Ordinary cores take operands from registers, where q and dy would stay through the loops as first operands.
    KEYS_FIRST: tl.constexpr = X_DTYPE == DTYPE
    CONFIG: tl.constexpr = (CAUSAL, SOFTCAP, MASK_BY_ROW, MASK_UNIT, WIDE, PRECISION, KEYS_FIRST)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_D, DH, UNIT)
    blocks = tl.cdiv(S * GROUP, BLOCK_M)
    block, kv_head, z = place(tl.program_id(0), blocks, H_KV)
    block = blocks - 1 - block
    i, h = query_rows(block, kv_head, GROUP, BLOCK_M)
    valid = i < S
    rows = (z * H_KV * GROUP + h) * S + i
    segment = tl.cast(Z, tl.int64) * (H_KV * GROUP * S)
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
    lse_ptr += z * (H_KV * GROUP * S)
    delta_ptr += z * (H_KV * GROUP * S)
    stats = h * S + i

    dy_offs = offsets(h, stride_dyh, UNIT, WIDE) + offsets(i, stride_dys, UNIT, WIDE)
    dy = features(dy_ptr + z * stride_dyz, dy_offs, valid, X_DTYPE, DH, BLOCK_D)
    factor = tl.full((), scale, DTYPE)
    if seed_ptr is not None:
        factor *= keep_scale(threshold, DTYPE)
    if gate_ptr is not None or dq_ptr is not None:
        q_offs = offsets(h, stride_qh, UNIT, WIDE) + offsets(i, stride_qs, UNIT, WIDE)
        q = features(q_ptr + z * stride_qz, q_offs, valid, X_DTYPE, DH, BLOCK_D)
        lse = tl.load(lse_ptr + stats, mask=valid, other=float("inf"))
        if gate_ptr is None:
            lse = in_units(lse, BASE_2)
        prefix_lse = lse
    first, last = block * BLOCK_M // GROUP, min(S - 1, ((block + 1) * BLOCK_M - 1) // GROUP)
    start, end = keys_seen(first, last, sizes, CAUSAL, BLOCK_N)
    delta = tl.zeros((BLOCK_M,), DTYPE)
    if gate_ptr is None or X_DTYPE != DTYPE:
        y_offs = offsets(h, stride_yh, UNIT, WIDE) + offsets(i, stride_ys, UNIT, WIDE)
        y = features(y_ptr + z * stride_yz, y_offs, valid, X_DTYPE, DH, BLOCK_D)
        delta = tl.sum(dy.to(DTYPE) * y.to(DTYPE), 1)
        if seed_ptr is not None:
            delta /= keep_scale(threshold, DTYPE)
    prefix_delta = delta
    if gate_ptr is not None:
        log_total = tl.load(lse_ptr + segment + stats, mask=valid, other=0.0)
        prefix_lse = in_units(tl.load(lse_ptr + 2 * segment + stats, mask=valid, other=0.0), BASE_2)
        prefix_delta = tl.zeros((BLOCK_M,), DTYPE)
        total = tl.zeros((BLOCK_M,), DTYPE)
        gate = head_gate(gate_ptr, h, DTYPE)
        for col in range(0, P, BLOCK_P):
            p = col + tl.arange(0, BLOCK_P)
            k = features(pk_ptr, offsets(p, stride_pkp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            v = features(pv_ptr, offsets(p, stride_pvp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            x, _ = logits(q, k, i, h, col, sizes, factors, mask, PREFIX, CONFIG)
            dw = products(dy, v, DTYPE, KEYS_FIRST, PRECISION)
            dw = dropped(dw, seed_ptr, threshold, rows, col, PREFIX)
            w = _weights(x, prefix_lse, None, BASE_2)
            prefix_delta += tl.sum(w * dw, 1)
            total += tl.sum(w, 1)
        # Nearly 1. What lse's rounding adds to each weight would otherwise not cancel in Σ dl, and large keys show it.
        prefix_delta /= total
        tl.store(delta_ptr + segment + stats, prefix_delta, mask=valid)
        if X_DTYPE != DTYPE:
            delta -= gate * prefix_delta
        else:
            # Where few keys are seen little is left of that difference, and in fp32 y's rounding would show in it.
            total = tl.zeros((BLOCK_M,), DTYPE)
            for col in range(start, end, BLOCK_N):
                j = col + tl.arange(0, BLOCK_N)
                k = features(k_ptr, offsets(j, stride_kt, UNIT, WIDE), j < T, X_DTYPE, DH, BLOCK_D)
                v = features(v_ptr, offsets(j, stride_vt, UNIT, WIDE), j < T, X_DTYPE, DH, BLOCK_D)
                x, _ = logits(q, k, i, h, col, sizes, factors, mask, OWN, CONFIG)
                dw = products(dy, v, DTYPE, KEYS_FIRST, PRECISION)
                dw = dropped(dw, seed_ptr, threshold, rows, col, OWN)
                w = _weights(x, lse, log_total, BASE_2)
                delta += tl.sum(w * dw, 1)
                total += tl.sum(w, 1)
            delta /= tl.where(total == 0, 1.0, total)
    tl.store(delta_ptr + stats, delta, mask=valid)

    if dq_ptr is not None:
        dq = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)
        for col in range(0, P, BLOCK_P):
            p = col + tl.arange(0, BLOCK_P)
            k = features(pk_ptr, offsets(p, stride_pkp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            v = features(pv_ptr, offsets(p, stride_pvp, UNIT, WIDE), p < P, X_DTYPE, DH, BLOCK_D)
            x, slope = logits(q, k, i, h, col, sizes, factors, mask, PREFIX, CONFIG)
            w = _weights(x, prefix_lse, None, BASE_2)
            if gate_ptr is not None:
                w *= gate[:, None]
            dw = products(dy, v, DTYPE, KEYS_FIRST, PRECISION)
            dw = dropped(dw, seed_ptr, threshold, rows, col, PREFIX)
            dq = dot(_logit_grad(w, dw, prefix_delta, slope, X_DTYPE), k, dq, PRECISION)
        if own_dq_ptr is None:
            queries = (q, dy, i, h, rows, lse, gate_ptr if gate_ptr is None else log_total)
            keys = (k_ptr, stride_kt, v_ptr, stride_vt)
            call = (sizes, factors, mask, seed_ptr, threshold)
            if window is None and not KEYS_FIRST and BLOCK_D <= NARROW:
                full = keys_seen_by_all(first, start, end, sizes, CAUSAL, BLOCK_N)
                dq = _own_dq(dq, delta, queries, keys, start, full, call, TILE, CONFIG, False)
                start = full
            dq = _own_dq(dq, delta, queries, keys, start, end, call, TILE, CONFIG, True)
        # dq = scale · dl [kp; k]
        dq *= factor
        dq_offs = offsets(h, stride_dqh, UNIT, WIDE) + offsets(i, stride_dqs, UNIT, WIDE)
        if own_dq_ptr is not None:
            dq += features(own_dq_ptr + z * stride_dqz, dq_offs, valid, DTYPE, DH, BLOCK_D)
        store_features(dq_ptr + z * stride_dqz, dq_offs, valid, dq, DH, BLOCK_D)


@triton.jit
def _add_rows(
    grads,
    keys,
    rows_of,
    queries,
    stats,
    first,
    last,
    call,
    TILE: tl.constexpr,
    CONFIG: tl.constexpr,
    SEGMENT: tl.constexpr,
    BORDER: tl.constexpr,
):
    """(dk / scale, dv) / c with what the blocks of rows first..last add; each None where it is not asked for."""
    dk, dv = grads
    k, v, kv_head, col = keys
    z, S, H_KV, blocks, gate_ptr = rows_of
    q_ptr, stride_qz, stride_qh, stride_qs, dy_ptr, stride_dyz, stride_dyh, stride_dys = queries
    lse_ptr, log_total_ptr, delta_ptr = stats
    sizes, factors, of_mask, seed_ptr, threshold = call
    mask_ptr, stride_mz, stride_mh, stride_ms, stride_mt = of_mask
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    DH: tl.constexpr = TILE[2]
    UNIT: tl.constexpr = TILE[3]
    GROUP: tl.constexpr = TILE[4]
    MASK_UNIT: tl.constexpr = CONFIG[3]
    WIDE: tl.constexpr = CONFIG[4]
    PRECISION: tl.constexpr = CONFIG[5]
    X_DTYPE: tl.constexpr = k.dtype
    DTYPE: tl.constexpr = accumulator(X_DTYPE)
    BASE_2: tl.constexpr = base_2(X_DTYPE)
    for step in range(first, last):
        if SEGMENT == PREFIX:
            block = step % blocks
            batch = step // blocks
        else:
            block = step
            batch = z
        i, h = query_rows(block, kv_head, GROUP, BLOCK_M)
        valid = i < S
        rows = (batch * H_KV * GROUP + h) * S + i
        batch = batch.to(tl.int64)
        at = batch * (H_KV * GROUP * S) + h * S + i
        mask = (mask_ptr, stride_mh, stride_ms, stride_mt)
        if mask_ptr is not None:
            mask = (mask_ptr + offsets(batch, stride_mz, MASK_UNIT, WIDE), stride_mh, stride_ms, stride_mt)
        q_offs = offsets(h, stride_qh, UNIT, WIDE) + offsets(i, stride_qs, UNIT, WIDE)
        q = features(q_ptr + batch * stride_qz, q_offs, valid, X_DTYPE, DH, BLOCK_D)
        dy_offs = offsets(h, stride_dyh, UNIT, WIDE) + offsets(i, stride_dys, UNIT, WIDE)
        dy = features(dy_ptr + batch * stride_dyz, dy_offs, valid, X_DTYPE, DH, BLOCK_D)

        x, slope = logits(q, k, i, h, col, sizes, factors, mask, SEGMENT, CONFIG, BORDER)
        # Rows beyond the last one have weights of 0: theirs would be exp(attn_mask), and infinite times 0 is no number.
        lse = tl.load(lse_ptr + at, mask=valid, other=float("inf"))
        if log_total_ptr is None:
            w = _weights(x, in_units(lse, BASE_2), None, BASE_2)
        else:
            w = _weights(x, lse, tl.load(log_total_ptr + at, mask=valid, other=0.0), BASE_2)
        if gate_ptr is not None and SEGMENT == PREFIX:
            w *= head_gate(gate_ptr, h, DTYPE)[:, None]
        if dv is not None:
            # dv = c · (mask∘w)ᵀ dy
            kept = cast(dropped(w, seed_ptr, threshold, rows, col, SEGMENT), X_DTYPE)
            dv = dot(tl.trans(kept), dy, dv, PRECISION)
        if dk is not None:
            dw = products(dy, v, DTYPE, True, PRECISION)
            dw = dropped(dw, seed_ptr, threshold, rows, col, SEGMENT)
            delta = tl.load(delta_ptr + at, mask=valid, other=0.0)
            # dk = scale · dlᵀ q
            dk = dot(tl.trans(_logit_grad(w, dw, delta, slope, X_DTYPE)), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["threshold"])
def attention_dkv_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    gate_ptr,
    lse_ptr,
    log_total_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    inner: tl.float64,
    outer: tl.float64,
    scale: tl.float64,
    seed_ptr,
    threshold,
    Z,
    S,
    T,
    P,
    H_KV,
    window,
    steps,
    stride_dyz,
    stride_dyh,
    stride_dys,
    stride_qz,
    stride_qh,
    stride_qs,
    stride_kz,
    stride_kh,
    stride_kn,
    stride_vz,
    stride_vh,
    stride_vn,
    stride_mz,
    stride_mh,
    stride_ms,
    stride_mt,
    stride_dp,
    stride_dz,
    stride_dh,
    stride_dn,
    SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_BY_ROW: tl.constexpr,
    DH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a block of keys of one segment: sums over the queries of all heads that share a key head.

    Of the own keys `steps` blocks of rows of one sequence make a part, of the prefix as many of the whole batch; parts
    lie stride_dp apart. dk and dv have the same strides. With a log_total lse is the largest logit, in units of the
    logits: the own keys' beside a gate.
    """
    X_DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    DTYPE: tl.constexpr = accumulator(X_DTYPE)
    CONFIG: tl.constexpr = (CAUSAL, SOFTCAP, MASK_BY_ROW, MASK_UNIT, WIDE, PRECISION, True)
    N = T if SEGMENT == OWN else P
    blocks = tl.cdiv(S * GROUP, BLOCK_M)
    block_n, kv_head, part = place(tl.program_id(0), tl.cdiv(N, BLOCK_N), H_KV)
    col = block_n * BLOCK_N
    n = col + tl.arange(0, BLOCK_N)
    inside = n < N
    sizes = (S, T, P, window)
    z = part
    if SEGMENT == OWN:
        z = part % Z
        part = part // Z
        last_key = min(col + BLOCK_N, T) - 1
        start, end = queries_seeing(col, last_key, sizes, CAUSAL)
        first = max(part * steps, start * GROUP // BLOCK_M)
        last = min((part + 1) * steps, tl.cdiv(end * GROUP, BLOCK_M))
        k_ptr += z.to(tl.int64) * stride_kz
        v_ptr += z.to(tl.int64) * stride_vz
    else:
        first = part * steps
        last = min(first + steps, Z * blocks)
    k_ptr += offsets(kv_head, stride_kh, UNIT, True)
    v_ptr += offsets(kv_head, stride_vh, UNIT, True)
    k = features(k_ptr, offsets(n, stride_kn, UNIT, WIDE), inside, X_DTYPE, DH, BLOCK_D)
    if dk_ptr is not None:
        v = features(v_ptr, offsets(n, stride_vn, UNIT, WIDE), inside, X_DTYPE, DH, BLOCK_D)
        dk = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    if dv_ptr is not None:
        dv = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)

    # In a tuple only the None of an argument is a constant.
    grads = (dk_ptr if dk_ptr is None else dk, dv_ptr if dv_ptr is None else dv)
    keys = (k, dk_ptr if dk_ptr is None else v, kv_head, col)
    rows = (z, S, H_KV, blocks, gate_ptr)
    queries = (q_ptr, stride_qz, stride_qh, stride_qs, dy_ptr, stride_dyz, stride_dyh, stride_dys)
    stats = (lse_ptr, log_total_ptr, delta_ptr)
    call = (sizes, (inner, outer), (mask_ptr, stride_mz, stride_mh, stride_ms, stride_mt), seed_ptr, threshold)
    TILE: tl.constexpr = (BLOCK_M, BLOCK_D, DH, UNIT, GROUP)
    border = last
    if SEGMENT == OWN and window is None and X_DTYPE != DTYPE and BLOCK_D <= NARROW:
        # The last block of keys, which may go beyond them, has all of its rows at the border.
        seeing = queries_seeing_all(last_key, start, end, sizes, CAUSAL) if col + BLOCK_N <= T else end
        border = min(last, max(first, tl.cdiv(seeing * GROUP, BLOCK_M)))
    grads = _add_rows(grads, keys, rows, queries, stats, first, border, call, TILE, CONFIG, SEGMENT, True)
    if SEGMENT == OWN and window is None and X_DTYPE != DTYPE and BLOCK_D <= NARROW:
        grads = _add_rows(grads, keys, rows, queries, stats, border, last, call, TILE, CONFIG, SEGMENT, False)
    dk, dv = grads

    keep = tl.full((), 1.0, DTYPE)
    if seed_ptr is not None:
        keep = keep_scale(threshold, DTYPE)
    out = part.to(tl.int64) * stride_dp + offsets(kv_head, stride_dh, UNIT, True)
    if SEGMENT == OWN:
        out += z.to(tl.int64) * stride_dz
    out_offs = offsets(n, stride_dn, UNIT, WIDE)
    if dk_ptr is not None:
        factor = keep * tl.full((), scale, DTYPE)
        store_features(dk_ptr + out, out_offs, inside, dk * factor, DH, BLOCK_D)
    if dv_ptr is not None:
        store_features(dv_ptr + out, out_offs, inside, dv * keep, DH, BLOCK_D)

"""What forward and backward of prefix attention share: where rows lie, a tile of logits, who sees whom."""

import triton
import triton.language as tl

from ._activation import _tanh
from ._tl import LN2, LOG2E, accumulator, cast, dot, exp, keep_rows, offsets

# Beside 16-bit inputs logits are held in units of log 2, so that a weight is one exp2. In fp32 and fp64 the roundings
# of a lse that goes from one unit to the other and back would show: there all are natural.


@triton.constexpr_function
def base_2(dtype):
    return dtype.primitive_bitwidth == 16


@triton.jit
def exponential(x, BASE_2: tl.constexpr):
    return tl.exp2(x) if BASE_2 else exp(x)


@triton.jit
def logarithm(x, BASE_2: tl.constexpr):
    if BASE_2:
        result = tl.log2(x)
    else:
        # tl.log is as rough in fp32 as a row's weights would all be; by a step of Newton's it is as exact as exp.
        result = tl.log(x)
        result += tl.where(x > 0, x * exp(-result) - 1, 0.0)
    return result


@triton.jit
def in_units(x, BASE_2: tl.constexpr):
    return x * LOG2E if BASE_2 else x


@triton.jit
def natural(x, BASE_2: tl.constexpr):
    return x * LN2 if BASE_2 else x


# Streams of the dropout mask: columns count from 0 in each, so that blocks of keys need no alignment to P.
PREFIX = tl.constexpr(0)
OWN = tl.constexpr(1)


@triton.jit
def place(pid, inner, middle):
    """(index, index, index) of program `pid`, the first one fastest, over extents `inner` and `middle`."""
    return pid % inner, pid // inner % middle, pid // inner // middle


@triton.jit
def query_rows(block, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(query, head) of each row of a block: the rows of a key head are the queries of its GROUP heads, heads fastest.

    A tile of keys then meets all of its heads at once, also where there is only one query.
    """
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows // GROUP, kv_head * GROUP + rows % GROUP


@triton.jit
def features(ptr, offs, valid, DTYPE: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The DH features at each of `offs`, (rows, BLOCK_D) in DTYPE, zero where not valid."""
    return cast(tl.load(_pointers(ptr, offs, BLOCK_D), mask=_inside(valid, DH, BLOCK_D), other=0.0), DTYPE)


@triton.jit
def store_features(ptr, offs, valid, x, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    tl.store(_pointers(ptr, offs, BLOCK_D), cast(x, ptr.dtype.element_ty), mask=_inside(valid, DH, BLOCK_D))


@triton.jit
def _pointers(ptr, offs, BLOCK_D: tl.constexpr):
    return ptr + (offs[:, None] + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _inside(valid, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = valid[:, None]
    if DH != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < DH)[None, :]
    return mask


@triton.jit
def keys_seen(first, last, sizes, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """The range [start, end) of keys, whole blocks from start on, that one of the queries first..last may see."""
    S, T, _, window = sizes
    start = 0
    end = T
    if CAUSAL:
        end = min(T, last + T - S + 1)
    if window is not None:
        start = max(0, first + T - S - window + 1) // BLOCK_N * BLOCK_N
    return start, end


@triton.jit
def keys_seen_by_all(first, start, end, sizes, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where in start..end the whole blocks of keys end that, without a window, each query from `first` on sees."""
    S, T, _, _ = sizes
    full = min(end, first + T - S + 1) if CAUSAL else end
    return start + max(0, full - start) // BLOCK_N * BLOCK_N


@triton.jit
def queries_seeing(first, last, sizes, CAUSAL: tl.constexpr):
    """The range [start, end) of queries that may see one of the keys first..last."""
    S, T, _, window = sizes
    start = 0
    end = S
    if CAUSAL:
        start = max(0, first - (T - S))
    if window is not None:
        end = max(start, min(S, last - (T - S) + window))
    return start, end


@triton.jit
def queries_seeing_all(last_key, start, end, sizes, CAUSAL: tl.constexpr):
    """From which query in start..end on, without a window, each sees the keys up to `last_key`."""
    S, T, _, _ = sizes
    return min(end, max(start, last_key - (T - S))) if CAUSAL else start


@triton.jit
def _add_bias(x, bias, BASE_2: tl.constexpr):
    """x + an additive mask. -inf stays; finfo.min stays finite: a row of nothing else has a uniform softmax."""
    bias = bias.to(x.dtype)
    if BASE_2:
        bias = tl.where(bias == float("-inf"), bias, in_units(tl.maximum(bias, -2e38), True))
    return x + bias


# SOFTCAP is 0 where there is none.
SMALL_CAP = tl.constexpr(1)
LARGE_CAP = tl.constexpr(2)


@triton.jit
def _capped(u, ABSOLUTE: tl.constexpr):
    """tanh u; ABSOLUTE to 1.2e-7, which `softcap` multiplies: the whole forward loop then has half the instructions."""
    return 1 - 2 / (1 + tl.exp2(u * (2 * LOG2E))) if ABSOLUTE else _tanh(u)


@triton.jit
def products(a, b, DTYPE: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ, rows by keys.

    With KEYS_FIRST it is the transpose of b aᵀ: what is then transposed back to meet rows, as in dv and dk, is a first
    operand as it lies in registers.
    """
    if KEYS_FIRST:
        x = tl.trans(dot(b, tl.trans(a), tl.zeros((b.shape[0], a.shape[0]), DTYPE), PRECISION))
    else:
        x = dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), DTYPE), PRECISION)
    return x


@triton.jit
def logits(
    q, k, i, h, col, sizes, factors, mask, SEGMENT: tl.constexpr, CONFIG: tl.constexpr, BORDER: tl.constexpr = True
):
    """(logits of queries i of heads h for the keys from col on, derivative of the cap); -inf where unseen.

    factors are (scale / softcap, softcap), or (any, scale) without a cap. A tile of own keys that is no BORDER is seen
    as a whole, but for what attn_mask hides: three quarters of the instructions.
    """
    CAUSAL: tl.constexpr = CONFIG[0]
    SOFTCAP: tl.constexpr = CONFIG[1]
    MASK_BY_ROW: tl.constexpr = CONFIG[2]
    MASK_UNIT: tl.constexpr = CONFIG[3]
    WIDE: tl.constexpr = CONFIG[4]
    PRECISION: tl.constexpr = CONFIG[5]
    KEYS_FIRST: tl.constexpr = CONFIG[6]
    DTYPE: tl.constexpr = accumulator(q.dtype)
    S, T, P, window = sizes
    inner, outer = factors
    mask_ptr, stride_mh, stride_ms, stride_mt = mask

    x = products(q, k, DTYPE, KEYS_FIRST, PRECISION)
    slope = 1.0
    if SOFTCAP:
        x = _capped(x * tl.full((), inner, DTYPE), base_2(q.dtype) and SOFTCAP == SMALL_CAP)
        slope = 1 - x * x
    x *= in_units(tl.full((), outer, DTYPE), base_2(q.dtype))

    j = col + tl.arange(0, k.shape[0])
    visible = (j < (P if SEGMENT == PREFIX else T))[None, :]
    if SEGMENT == OWN and BORDER:
        if CAUSAL:
            visible = visible & (j[None, :] <= (i + (T - S))[:, None])
        if window is not None:
            visible = visible & (j[None, :] > (i + (T - S - window))[:, None])
    if SEGMENT == OWN and mask_ptr is not None:
        ptrs = mask_ptr + offsets(j, stride_mt, MASK_UNIT, WIDE)[None, :]
        inside = (j < T // MASK_UNIT * MASK_UNIT)[None, :]
        if MASK_BY_ROW:
            rows = offsets(h, stride_mh, MASK_UNIT, WIDE) + offsets(i, stride_ms, MASK_UNIT, WIDE)
            ptrs += rows[:, None]
            inside = inside & (i < S)[:, None]
        if mask_ptr.dtype.element_ty == tl.int1:
            visible = visible & (tl.load(ptrs, mask=inside, other=0) != 0)
            x = tl.where(visible, x, float("-inf"))
        else:
            x = _add_bias(x, tl.load(ptrs, mask=inside, other=0.0), base_2(q.dtype))
    if SEGMENT == PREFIX or BORDER:
        x = tl.where(visible, x, float("-inf"))
    return x, slope


@triton.jit
def dropped(x, seed_ptr, threshold, rows, col, SEGMENT: tl.constexpr):
    """mask∘x, without the factor 1 / (1 - p), for the tile of `rows` from `col` on."""
    if seed_ptr is not None:
        x = tl.where(keep_rows(seed_ptr, threshold, rows, col, x.shape[0], x.shape[1], SEGMENT), x, 0.0)
    return x


@triton.jit
def head_gate(gate_ptr, h, DTYPE: tl.constexpr):
    return tl.load(gate_ptr + h).to(DTYPE)

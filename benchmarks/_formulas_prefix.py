"""Closed forms of the kernels of prefix attention, without a gate; `formulas` says of what."""

from typing import Any

from benchmarks._formulas_shared import Cost, cdiv, seed_bytes, size


def _union(ranges: list[tuple[int, int]]) -> int:
    """How many numbers lie in at least one of the ranges, which come in the order of their starts."""
    total, reached = 0, 0
    for start, end in ranges:
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _key_ranges(a: Any) -> list[tuple[int, int]]:
    """Which own keys each block of rows loads: those that one of its queries may see, rounded up to whole blocks."""
    ranges = []
    for block in range(cdiv(a.S * a.GROUP, a.BLOCK_M)):
        first, last = block * a.BLOCK_M // a.GROUP, min(a.S - 1, ((block + 1) * a.BLOCK_M - 1) // a.GROUP)
        start = 0 if a.window is None else max(0, first + a.T - a.S - a.window + 1) // a.BLOCK_N * a.BLOCK_N
        end = min(a.T, last + a.T - a.S + 1) if a.CAUSAL else a.T
        ranges.append((start, max(start, min(a.T, start + cdiv(end - start, a.BLOCK_N) * a.BLOCK_N))))
    return ranges


def _row_ranges(a: Any) -> list[tuple[int, int]]:
    """Which blocks of rows each block of own keys loads."""
    ranges = []
    for col in range(0, a.T, a.BLOCK_N):
        last = min(col + a.BLOCK_N, a.T) - 1
        start = max(0, col - (a.T - a.S)) if a.CAUSAL else 0
        end = a.S if a.window is None else max(start, min(a.S, last - (a.T - a.S) + a.window))
        ranges.append((start * a.GROUP // a.BLOCK_M, cdiv(end * a.GROUP, a.BLOCK_M)))
    return ranges


def _mask(a: Any, row_keys: int, keys: int) -> tuple[int, int]:
    """(different bytes, bytes asked for) of a mask, of whose rows `row_keys` and of whose keys `keys` are asked for."""
    if a.mask_ptr is None:
        return 0, 0
    assert (a.CAUSAL, a.window) == (False, None), "no closed form with both a mask and a range"
    shape = ((a.Z, a.stride_mz), (a.H_KV * a.GROUP, a.stride_mh), (a.S, a.stride_ms), (a.T, a.stride_mt))
    different = 1
    for length, stride in shape:
        different *= length if stride else 1
    return different * size(a.mask_ptr), (row_keys if a.MASK_BY_ROW else keys) * size(a.mask_ptr)


def _over_rows(a: Any, products: int) -> tuple[int, int, int]:
    """(bytes read, bytes asked for, operations) of a walk over all keys for each row: keys, values, mask and seed."""
    assert a.gate_ptr is None, "no closed form with a gate"
    e, f, programs = size(a.k_ptr), size(a.pk_ptr), a.Z * a.H_KV
    ranges = _key_ranges(a)
    loaded = [end - start for start, end in ranges]
    tiles = [cdiv(length, a.BLOCK_N) for length in loaded]
    tiles_p = cdiv(a.P, a.BLOCK_P) * len(ranges)
    rows = [min(a.BLOCK_M, a.S * a.GROUP - block * a.BLOCK_M) for block in range(len(ranges))]
    row_keys = programs * sum(n * length for n, length in zip(rows, loaded, strict=True))
    mask, mask_asked = _mask(a, row_keys, programs * sum(loaded))
    read = 2 * a.H_KV * a.DH * (a.P * f + a.Z * _union(ranges) * e) + mask + seed_bytes(a)
    asked = 2 * programs * a.DH * (len(ranges) * a.P * f + sum(loaded) * e) + mask_asked
    asked += programs * (sum(tiles) + tiles_p) * seed_bytes(a)
    keys = sum(tiles) * a.BLOCK_N + tiles_p * a.BLOCK_P
    return read, asked, 2 * products * programs * a.BLOCK_M * a.BLOCK_D * keys


def _forward(a: Any) -> Cost:
    assert not a.IN_PARTS, "no closed form in parts"
    queries = a.Z * a.H_KV * a.GROUP * a.S
    q = queries * a.DH * size(a.q_ptr)
    read, asked, flops = _over_rows(a, products=2)
    written = queries * (a.DH * size(a.y_ptr) + size(a.lse_ptr))
    return read + q, written, asked + q + written, flops


def _dq(a: Any) -> Cost:
    assert a.dq_ptr is not None, "no closed form without dq"
    queries = a.Z * a.H_KV * a.GROUP * a.S
    own = queries * (3 * a.DH * size(a.q_ptr) + size(a.lse_ptr))  # q, y, dy
    read, asked, flops = _over_rows(a, products=3)
    written = queries * (a.DH * size(a.dq_ptr) + size(a.delta_ptr))
    return read + own, written, asked + own + written, flops


def _dkv(a: Any) -> Cost:
    assert None not in (a.dk_ptr, a.dv_ptr), "no closed form for one of dk and dv"
    length = a.Z * a.H_KV * a.GROUP * a.S
    row = 2 * a.DH * size(a.q_ptr) + 2 * size(a.lse_ptr)  # q, dy, lse, delta
    if a.SEGMENT == 1:  # own keys
        ranges, N, programs = _row_ranges(a), a.T, a.Z * a.H_KV
        clipped = [(start * a.BLOCK_M, min(end * a.BLOCK_M, a.S * a.GROUP)) for start, end in ranges]
        rows, steps = [end - start for start, end in clipped], sum(end - start for start, end in ranges)
        keys = [min(a.BLOCK_N, a.T - col) for col in range(0, a.T, a.BLOCK_N)]
        row_keys = programs * sum(n * k for n, k in zip(rows, keys, strict=True))
        step_keys = programs * sum((end - start) * k for (start, end), k in zip(ranges, keys, strict=True))
        mask, mask_asked = _mask(a, row_keys, step_keys)
        read, asked = programs * _union(clipped) * row + mask, programs * sum(rows) * row + mask_asked
        steps, held = programs * steps, a.Z
    else:
        blocks = cdiv(a.P, a.BLOCK_N)
        N, held = a.P, 1
        read, asked = length * row, blocks * length * row
        steps = blocks * a.H_KV * a.Z * cdiv(a.S * a.GROUP, a.BLOCK_M)
    parts = a.grid[0] // (cdiv(N, a.BLOCK_N) * a.H_KV)  # of the own keys, of all sequences
    keys_and_values = 2 * a.H_KV * N * a.DH * size(a.k_ptr)
    read += held * keys_and_values + seed_bytes(a)
    asked += parts * keys_and_values + 2 * steps * seed_bytes(a)
    written = 2 * parts * a.H_KV * N * a.DH * size(a.dk_ptr)
    return read, written, asked + written, 2 * 4 * steps * a.BLOCK_M * a.BLOCK_N * a.BLOCK_D


KERNELS = {
    "attention_fwd_kernel": _forward,
    "attention_dq_kernel": _dq,
    "attention_dkv_kernel": _dkv,
}

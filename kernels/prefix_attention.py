"""Attention over a trained prefix and the sequence itself (Li & Liang 2021), forward and backward.

Shapes: query q, y and dy (Z, H, S, DH), key k and value v (Z, H_KV, T, DH), prefix_key kp and prefix_value vp
(H_KV, P, DH), the same for every sequence. Query head h reads key head h // (H / H_KV).

    a = cap(scale · q kpᵀ)                           (Z, H, S, P)
    b = cap(scale · q kᵀ) + attn_mask                (Z, H, S, T), -inf where a query may not see a key
    w = softmax([a, b])                              one softmax over both, lse its log Σ exp
    y = drop(w) [vp; v]
    w = [gate · softmax(a), softmax(b)]              with a gate (H,) (Zhang et al. 2023), a lse each

cap(l) = softcap · tanh(l / softcap), or l. With c = 1 / (1 - p) and δ = Σ_DH dy∘y (for own and prefix apart where there
is a gate: δp = c · Σ_P softmax(a)∘mask∘dy vpᵀ and δ = Σ_DH dy∘y - gate · δp, in fp32 and fp64 not this difference but
c · Σ_T softmax(b)∘mask∘dy vᵀ):

    dv = c · (mask∘w)ᵀ dy,  dl = w∘(c · mask∘(dy vᵀ) - δ)∘cap'
    dq = scale · dl [kp; k],  dk = scale · dlᵀ q,  dgate = Σ δp

Saved: the inputs, y and lse; never a probability or a mask. A tile of keys meets the queries of all heads that share
it. Everything accumulates in fp32 (fp64 for fp64); a fp32 prefix beside 16 bits is rounded to 16 bits, as peft does,
and its gradient is summed and stored in fp32. In backward one kernel gives δ and dq, one dk and dv, and one the
prefix's. Where keys give few programs, both walk the queries (the prefix's, of the whole batch) in parts, whose sums
a second pass adds in order: no atomics. Forward of few queries walks the own keys in parts, and merges those.

Of long plain calls the vendor's kernels compute the own keys' part (`vendor_attention`), and these kernels add the
prefix's. Both ways give and take the same y and lse, and forward and backward choose apart. The vendor's backward uses
atomics: under torch.use_deterministic_algorithms backward stays here.
"""

from typing import Any

import torch
from torch import Tensor

from . import vendor_attention
from ._launch import Plan, Tile, by_layout, cdiv, chip, needs_int64, next_power_of_2, precision, unit
from .partial_sums import accumulator_dtype, chunks, sums
from .prefix_backward import attention_dkv_kernel, attention_dq_kernel
from .prefix_forward import attention_fwd_kernel, attention_mask_kernel, attention_merge_kernel
from .prefix_tile import LARGE_CAP, OWN, PREFIX, SMALL_CAP


def _features_first(x: Tensor) -> Tensor:
    """x, copied only where the features of a row do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _empty_heads(like: Tensor) -> Tensor:
    """Fresh memory laid out (Z, S, H, DH), seen as (Z, H, S, DH): what projections before and after take as a view."""
    Z, H, S, DH = like.shape
    strides = (S * H * DH, DH, H * DH, 1)  # no view in autograd's eyes
    return torch.empty_strided((Z, H, S, DH), strides, dtype=like.dtype, device=like.device)


def _in_heads(x: Tensor) -> Tensor:
    """x in that layout, copied only where it has another one."""
    return x if x.transpose(1, 2).is_contiguous() else _empty_heads(x).copy_(x)


# Of the own keys, in one of the parts that calls of few queries take, so that there are programs enough; a multiple of
# every block of keys. No device has timed it.
_LEAST_KEYS = 256
_MERGED_PARTS = 32  # at a time
# Of blocks of rows, in a part of dk and dv of the own keys.
_LEAST_STEPS = 8
_DENSE = torch.contiguous_format
# The largest cap at which an error of 1.2e-7 of it is far below the rounding of 16-bit queries and keys.
_SMALL_CAP = 100.0


def _block(length: int, most: int, least: int) -> int:
    return max(least, min(most, next_power_of_2(length)))


# As in `_launch` tiles that ptxas compiles without stack or spills, which tests/test_codegen.py and, for every call,
# `python -m benchmarks.codegen` hold them to. (rows, keys, warps, stages) by the padded head size: those of sm90 for 64
# and 128 timed on an H100, the others read off compiled code.
_TILES = {
    "fwd": {
        "sm90": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
        "sm100": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "sm80": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
        # Two stages of 64 keys of 256 features do not fit 100 KiB.
        "sm86": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)},
        "gfx9": {64: (128, 32, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)},
    },
    "dq": {
        "sm90": {64: (64, 32, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
        "sm100": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "sm80": {64: (128, 32, 8, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
        "sm86": {64: (128, 32, 8, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
        "gfx9": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
    },
    "dkv": {
        "sm90": {64: (32, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 2)},
        "sm100": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
        "sm80": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "sm86": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "gfx9": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1)},
    },
}
# fp32: operands of IEEE products are registers. ptxas gives away a few bytes of stack for one block more, and where it
# does so differs from chip to chip; None stands for all others. "dq gate" walks the own keys twice. 256 runs only where
# a test asks for it.
_FP32_TILES: dict[str, dict[int, dict[str | None, tuple[int, int, int]]]] = {
    "fwd": {
        64: {None: (16, 64, 8), "sm80": (16, 32, 8), "sm90": (32, 64, 16), "gfx9": (32, 32, 8)},
        128: {None: (16, 32, 16), "sm80": (16, 64, 8), "sm100": (16, 64, 16), "gfx9": (16, 32, 8)},
        256: {None: (16, 32, 8)},
    },
    "dq": {
        64: {None: (32, 32, 4), "sm120": (16, 32, 8)},
        128: {None: (16, 64, 8), "gfx9": (16, 32, 8)},
        256: {None: (16, 32, 8)},
    },
    "dq gate": {
        64: {None: (16, 32, 8), "sm86": (16, 32, 16), "sm90": (32, 32, 4)},
        128: {None: (16, 32, 8), "sm80": (16, 32, 16), "sm86": (16, 32, 4), "sm120": (16, 32, 8)},
        256: {None: (16, 32, 8)},
    },
    "dkv": {
        64: {None: (16, 32, 8), "sm90": (32, 32, 16)},
        128: {None: (16, 32, 16), "sm90": (16, 32, 8), "sm120": (16, 32, 8), "gfx9": (16, 32, 8)},
        256: {None: (16, 32, 8)},
    },
    "dkv gate": {
        64: {None: (32, 32, 8), "sm100": (16, 32, 8)},
        128: {None: (16, 32, 16), "gfx9": (16, 32, 8)},
        256: {None: (16, 32, 8)},
    },
}


def _tile(kernel: str, query: Tensor, BLOCK_D: int, mask: bool, softcap: bool, gate: bool) -> Tile:
    """A block of rows and a block of keys. Calls with a mask, a cap or a gate hold more in registers."""
    found, size = chip(query.device), max(64, BLOCK_D)
    kind = "sm86" if found == "sm120" else found
    if kind == "interpreter":
        return Tile(64, 64, 0, 0, 4, 1)
    if query.element_size() > 2:
        tiles = _FP32_TILES[f"{kernel} gate" if gate and kernel != "fwd" else kernel][size]
        rows, keys, warps = tiles.get(found, tiles.get(kind, tiles[None]))
        if gate and (kernel, size, kind) in (("fwd", 128, "sm100"), ("fwd", 64, "sm90")):
            warps = 8
        if gate and size == 128 and precision(query.dtype) == "tf32":
            of_chip = {("dq", "sm90"): 16, ("dq", "sm120"): 4, ("fwd", "sm86"): 8, ("fwd", "sm120"): 8}
            warps = of_chip.get((kernel, found), warps)
        return Tile(rows, keys, 0, 0, warps, 1)
    rows, keys, warps, stages = _TILES[kernel][kind][size]
    if softcap or gate:
        if gate and kind in ("sm80", "gfx9") and (kernel, BLOCK_D) == ("dq", 256):
            rows = 16
        elif gate and kind == "gfx9" and (kernel, BLOCK_D) == ("dkv", 128):
            warps = 4
        elif kind in ("sm90", "sm100") and (kernel, BLOCK_D) in (("dq", 256), ("dkv", 128)):
            rows, keys, warps = 32, 32 if kind == "sm100" or (softcap and kernel == "dq") else 64, 8
        elif softcap and mask and kind in ("sm80", "sm86") and (kernel, BLOCK_D) == ("fwd", 64):
            rows = 64
        elif kind == "sm90" and (kernel, BLOCK_D) == ("dq", 128):
            rows, keys, warps = 128, 32, 8
    elif mask and kind == "sm90" and (kernel, BLOCK_D) == ("dkv", 128):
        keys, warps = 128, 8
    elif mask and kind == "sm100" and (kernel, BLOCK_D) == ("dq", 64) and query.shape[-1] < 64:
        keys = 32
    elif mask and kind == "sm100" and (kernel, BLOCK_D) == ("dkv", 128):
        rows = 32
    return Tile(rows, keys, 0, 0, warps, stages)


class _Layout:
    """What the plans of one call share. Made of tensors, of which only the layout counts."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        mask: Tensor | None,
        gate: bool,
        is_causal: bool,
        window: int | None,
        softcap: int,
    ) -> None:
        (self.Z, self.H, self.S, self.DH), (self.H_KV, self.P) = query.shape, prefix_key.shape[:2]
        self.T = key.shape[2]
        self.group = self.H // self.H_KV
        self.inputs, self.mask = (query, key, value, prefix_key, prefix_value), mask
        self.block_d = max(16, next_power_of_2(self.DH))
        # A window as long as both sequences hides nothing; neither does a longer one, which 32 bits may not hold.
        self.window = None if window is None else min(window, self.S + self.T)
        self.sizes: tuple[int | None, ...] = (self.Z, self.S, self.T, self.P, self.H_KV, self.window)
        self.mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.crowded = (mask is not None, bool(softcap), gate)
        self.constants: dict[str, Any] = {
            "CAUSAL": is_causal,
            "SOFTCAP": softcap,
            "MASK_BY_ROW": self.mask_strides[1:3] != (0, 0),
            "DH": self.DH,
            "GROUP": self.group,
            "BLOCK_D": self.block_d,
            "MASK_UNIT": 1 if mask is None else unit(self.T, *(s for s in self.mask_strides if s != 1), most=16),
            "PRECISION": precision(query.dtype),
        }

    def tile(self, kernel: str) -> Tile:
        return _tile(kernel, self.inputs[0], self.block_d, *self.crowded)

    def row_block(self, tile: Tile) -> int:
        return _block(self.S * self.group, tile.rows, 16)

    def programs(self, tile: Tile) -> int:
        """One for each block of queries, key head and sequence."""
        return cdiv(self.S * self.group, self.row_block(tile)) * self.H_KV * self.Z

    def by_rows(
        self, kernel: Any, tile: Tile, *numbers: int | None, parts: int = 1, tensors: tuple[Tensor, ...], **more: bool
    ) -> Plan:
        rows = self.row_block(tile)
        return Plan(
            kernel,
            (self.programs(tile), parts) if parts > 1 else (self.programs(tile),),
            *numbers,
            **self.constants,
            **more,
            BLOCK_M=rows,
            BLOCK_N=tile.cols,
            BLOCK_P=_block(self.P, tile.cols, 32),
            **self.addressing(*tensors),
            device=self.inputs[0].device,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def addressing(self, *tensors: Tensor) -> dict[str, Any]:
        """Batch and key head are 64-bit numbers everywhere: what counts is the distance inside one sequence."""
        tensors = (*self.inputs, *tensors)
        sequences = [tensor[:1] for tensor in tensors] + ([] if self.mask is None else [self.mask[:1]])
        return {"UNIT": unit(*_strides(*tensors)), "WIDE": needs_int64(*sequences)}


def _strides(*tensors: Tensor) -> list[int]:
    """Of all dimensions but the last."""
    return [stride for tensor in tensors for stride in tensor.stride()[:-1]]


@by_layout
def _fwd_plan(*layout: Any) -> tuple[Plan, int]:
    """A plan, and the number of parts that the own keys are split into: of one, `part_keys` counts for nothing.

    The last two of `layout` are whether they may be and y, the others are what `_Layout` takes.
    """
    *of_call, may_split, y = layout
    call, parts, part_keys = _Layout(*of_call), 1, 0
    tile, strides = call.tile("fwd"), _strides(y)
    if may_split:
        seen = call.T if call.window is None else min(call.T, call.window + call.S + tile.cols)
        parts, part_keys = chunks(seen, _LEAST_KEYS, call.programs(tile))
    if parts > 1:
        strides = [call.H * call.S * call.DH, call.S * call.DH, call.DH]
    numbers = (*call.sizes, part_keys, *_strides(*call.inputs), *call.mask_strides, *strides)
    return call.by_rows(attention_fwd_kernel, tile, *numbers, parts=parts, tensors=(y,), IN_PARTS=parts > 1), parts


@by_layout
def _merge_plan(part_y: Tensor, y: Tensor) -> Plan:
    parts, Z, H, S, DH = part_y.shape
    return Plan(
        attention_merge_kernel,
        (Z * H * S,),
        parts,
        Z * H * S,
        H,
        S,
        *_strides(y),
        DH=DH,
        BLOCK_N=min(_MERGED_PARTS, next_power_of_2(parts)),
        BLOCK_D=next_power_of_2(DH),
        device=y.device,
        num_warps=4,
        num_stages=1,
    )


@by_layout
def _dq_plan(*layout: Any) -> Plan:
    """The last three of `layout` are dy, y and dq, the others are what `_Layout` takes."""
    *of_call, dy, y, dq = layout
    call = _Layout(*of_call)
    numbers = (*call.sizes, *_strides(dy, *call.inputs), *call.mask_strides, *_strides(y))
    numbers += (0, 0, 0) if dq is None else tuple(_strides(dq))
    tensors = (dy, y) if dq is None else (dy, y, dq)
    return call.by_rows(attention_dq_kernel, call.tile("dq"), *numbers, tensors=tensors)


@by_layout
def _dkv_plan(*layout: Any) -> tuple[Plan, int]:
    """A plan, and the number of parts that its results come in, `numel` elements apart where there are several.

    The last four of `layout` are the segment, dy, and dk and dv of that segment; the others are what `_Layout` takes.
    """
    *of_call, segment, dy, dk, dv = layout
    call = _Layout(*of_call)
    query, key, value, prefix_key, prefix_value = call.inputs
    tile, out = call.tile("dkv"), dk if dv is None else dv
    rows = call.row_block(tile)
    blocks, numel = cdiv(call.S * call.group, rows), out.numel()
    if segment == OWN.value:
        keys, sequences, least = call.T, call.Z, _LEAST_STEPS
        strides, outs = _strides(key, value), _strides(out)
    else:
        keys, sequences, least, blocks = call.P, 1, 1, call.Z * blocks
        strides, outs = [0, *_strides(prefix_key), 0, *_strides(prefix_value)], [0, *_strides(out)]
    block_n = _block(keys, tile.cols, 32)
    programs = cdiv(keys, block_n) * call.H_KV * sequences
    parts, steps = chunks(blocks, least, programs)
    plan = Plan(
        attention_dkv_kernel,
        (programs * parts,),
        *call.sizes,
        steps,
        *_strides(dy, query),
        *strides,
        *call.mask_strides,
        numel,
        *outs,
        **call.constants,
        SEGMENT=segment,
        BLOCK_M=rows,
        BLOCK_N=block_n,
        **call.addressing(dy, out),
        device=query.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return plan, parts


class _Call:
    """The arguments that the kernels of one call share."""

    def __init__(self, query, key, value, prefix_key, prefix_value, attn_mask, gate, options):
        (Z, H, S, _), T = query.shape, key.shape[2]
        self.inputs = [_features_first(x) for x in (query, key, value, prefix_key, prefix_value)]
        if attn_mask is not None and attn_mask.dtype == torch.bool and query.dtype == torch.float64:
            # For sm_90 Triton 3.7 takes the width of a product's operands from the narrowest load behind them: beside
            # fp64 it does not compile.
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        self.mask = None if attn_mask is None else attn_mask.expand(Z, H, S, T)
        self.gate = None if gate is None else gate.contiguous()
        causal, window, softcap = (options[name] for name in ("is_causal", "sliding_window", "softcap"))
        self.scale = options["scale"]
        self.factors = (1.0 if softcap is None else self.scale / softcap, self.scale if softcap is None else softcap)
        cap = 0 if softcap is None else SMALL_CAP.value if softcap <= _SMALL_CAP else LARGE_CAP.value
        self.layout = (*self.inputs, self.mask, gate is not None, causal, window, cap)
        # What the vendor's kernels take besides dy, y and lse, and whether nothing is asked for that they do not know.
        self.own = (*self.inputs[:3], causal, self.scale)
        self.plain = attn_mask is None and window is None and softcap is None and gate is None

    def served_by_vendor(self, threshold: int) -> bool:
        """Whether the vendor's kernels compute the own keys' part."""
        return self.plain and not threshold and vendor_attention.serves(*self.own)


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None,
    gate: Tensor | None,
    threshold: int,
    seed: Tensor | None,
    *,
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(y, lse): y (Z, H, S, DH) in (Z, S, H, DH) memory, lse (1, Z, H, S), with a gate (3, Z, H, S): of the own
    keys the largest logit and the log of the sum below it (`attention_fwd_kernel`), and the prefix's lse.

    Drops where a 16-bit word is below `threshold`.
    """
    options = {"is_causal": is_causal, "sliding_window": sliding_window, "softcap": softcap, "scale": scale}
    call = _Call(query, key, value, prefix_key, prefix_value, attn_mask, gate, options)
    shape = (1 if gate is None else 3, *query.shape[:3])
    own: tuple[Tensor, Tensor] | tuple[None, None]
    if call.served_by_vendor(threshold):
        y, lse = vendor_attention.fwd(*call.own)
        own = y, lse = _in_heads(y), lse.view(shape)
    else:
        y, lse = _empty_heads(query), torch.empty(shape, dtype=accumulator_dtype(query.dtype), device=query.device)
        own = None, None
    plan, parts = _fwd_plan(*call.layout, gate is None and own[0] is None, y)
    outs = (y, lse) if parts == 1 else (lse.new_empty(parts, *query.shape), lse.new_empty(parts, *query.shape[:3]))
    plan(*call.inputs, call.mask, call.gate, *own, *outs, *call.factors, seed if threshold else None, threshold)
    if parts > 1:
        _merge_plan(outs[0], y)(*outs, y, lse)
    return y, lse


def attention_bwd(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None,
    gate: Tensor | None,
    threshold: int,
    seed: Tensor | None,
    y: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    scale: float,
    needs: set[str],
) -> dict[str, Tensor]:
    """The gradients that `needs` names, each in its input's dtype."""
    options = {"is_causal": is_causal, "sliding_window": sliding_window, "softcap": softcap, "scale": scale}
    call = _Call(query, key, value, prefix_key, prefix_value, attn_mask, gate, options)
    drop = (seed if threshold else None, threshold)
    dy, y = _features_first(dy), _features_first(y)
    grads: dict[str, Tensor] = {}
    delta = torch.empty_like(lse if gate is None else lse[:2])
    wants_own = bool(needs & {"query", "key", "value"})
    if wants_own and not torch.are_deterministic_algorithms_enabled() and call.served_by_vendor(threshold):
        own = zip(("query", "key", "value"), vendor_attention.bwd(dy, y, lse[0], *call.own), strict=True)
        grads = {name: _in_heads(grad) for name, grad in own if name in needs}
    own_dq, left = grads.get("query"), needs - grads.keys()
    if left - {"value", "prefix_value"} or own_dq is not None:
        dq = _empty_heads(query) if "query" in left else own_dq
        plan = _dq_plan(*call.layout, dy, y, dq)
        outs = (delta, own_dq, dq)
        plan(dy, *call.inputs, call.mask, call.gate, y, lse, *outs, *call.factors, scale, *drop)
        grads["query"] = dq
        if "gate" in needs:
            # In fp64, for of long sums the eager ones are the more exact: they add the terms of each row first.
            total = delta[1].sum((0, 2), dtype=torch.float64)
            grads["gate"] = (total * (65536 / (65536 - threshold))).to(gate.dtype)
    rest = (*call.factors, scale, *drop)
    parts: list[tuple[Tensor, Tensor]] = []
    if left & {"key", "value"}:
        outs = [_empty_heads(like) if name in left else None for name, like in (("key", key), ("value", value))]
        of_rows = (lse[0], None) if gate is None else lse[:2]
        first = (dy, *call.inputs[:3], call.mask, call.gate, *of_rows, delta[0])
        parts += _key_grads(call, OWN.value, outs, first, rest)
        grads["key"], grads["value"] = outs
    if left & {"prefix_key", "prefix_value"}:
        pairs = (("prefix_key", prefix_key), ("prefix_value", prefix_value))
        outs = [torch.empty_like(like, memory_format=_DENSE) if name in left else None for name, like in pairs]
        first = (dy, call.inputs[0], *call.inputs[3:], None, call.gate, lse[-1], None, delta[-1])
        parts += _key_grads(call, PREFIX.value, outs, first, rest)
        grads["prefix_key"], grads["prefix_value"] = outs
    if parts:
        sums(*parts)
    return {name: grads[name] for name in needs}


def _key_grads(
    call: _Call, segment: int, outs: list[Tensor | None], first: tuple, rest: tuple
) -> list[tuple[Tensor, Tensor]]:
    """dk and dv of a segment, in `outs`, or the parts of them and where their sums go."""
    plan, parts = _dkv_plan(*call.layout, segment, first[0], *outs)
    if parts == 1:
        plan(*first, *outs, *rest)
        return []
    like = {"dtype": accumulator_dtype(call.inputs[0].dtype), "device": first[0].device}
    partials = [None if out is None else torch.empty(parts, out.numel(), **like) for out in outs]
    plan(*first, *partials, *rest)
    return [(part, out) for part, out in zip(partials, outs, strict=True) if part is not None and out is not None]


def attention_dropout_mask(seed: Tensor, shape: tuple[int, int, int, int, int], threshold: int) -> Tensor:
    """The mask of the attention weights, True where one is kept, (Z, H, S, P + T) for `shape` (Z, H, S, P, T)."""
    Z, H, S, P, T = shape
    out = torch.empty((Z, H, S, P + T), dtype=torch.bool, device=seed.device)
    for segment, cols, part in ((PREFIX, P, out), (OWN, T, out[..., P:])):
        plan = Plan(
            attention_mask_kernel,
            (cdiv(Z * H * S, 64), cdiv(cols, 128)),
            Z * H * S,
            cols,
            P + T,
            SEGMENT=segment.value,
            BLOCK_M=64,
            BLOCK_N=128,
            WIDE=needs_int64(out),
            device=out.device,
            num_warps=4,
            num_stages=1,
        )
        plan(part, seed, threshold)
    return out

"""The bottleneck adapter from ordinary torch calls: what runs on the CPU.

    z  = LN_before(x) Wdᵀ + bd                         (M, R)
    t  = mask ∘ (act(z) Wuᵀ + bu) / (1-p)              (M, N)
    v  = residual + scaling · t                        y = LN_after(v), or v = scaling · t, y = residual + LN_after(v)
    dv = LN_after's gradient, or dy                    dt = mask ∘ dv
    dz = act'(z) ∘ (scaling / (1-p) · dt Wu)           dx = LN_before's gradient of dz Wd, and the residual's
    dWu = scaling / (1-p) · dtᵀ act(z)   dbu = scaling / (1-p) · Σ_M dt   dWd = dzᵀ LN_before(x)   dbd = Σ_M dz

Kept from forward are x, z and the rows' statistics. With dropout v is made again for LN_after's gradient, unless its
residual is a tensor of its own, which would have to be kept instead. Without dropout v is kept, as the usual modules
keep it: there the matmul would cost what nothing else makes up for. Where x is the residual and LN_after the only norm,
`norm_of_sum` serves in its place and as a rule keeps v instead of x.
LN_before(x) is neither kept nor, where x is about centred, made again: its product with dz comes from that of x, the
rows' means taken off afterwards, and what the norm's own parameters get is made of that small product too.
What else has x's size is made in blocks of rows that stay in the cache, and again in backward. Without dropout,
LN_before and casts there is no such tensor: the residual is where the matmul accumulates, all rows are one block.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.eager.dropout import Dropped, Mask, block_rows, blocks_of
from peft_fast.eager.matmul import WIDE, cast, narrow_mm, tall_mm, wide_dtype
from peft_fast.reference import ACTIVATIONS, keep_scale

Norm = tuple[Tensor, Tensor]

# How far the means may be: sums then round at most 1.12 times as much.
CENTRED = 0.5

_ALL = slice(None)
_aten = torch.ops.aten

# act'(z) ∘ da
ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda da, z: _aten.threshold_backward(da, z, 0),
    "gelu": _aten.gelu_backward,
    "gelu_new": lambda da, z: _aten.gelu_backward(da, z, approximate="tanh"),
    "silu": _aten.silu_backward,
    "tanh": lambda da, z: _aten.tanh_backward(da, torch.tanh(z)),
    "leaky_relu": lambda da, z: _aten.leaky_relu_backward(da, z, 0.01, False),
    "identity": lambda da, z: da,
}


def adapter_fwd(
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scaling: float | Tensor,
    norm_before: Norm | None,
    norm_after: Norm | None,
    threshold: int,
    seed: Tensor | None,
    *,
    activation: str,
    residual_after_norm: bool,
    eps: float,
    traced: str = "",
) -> tuple[Tensor | None, ...]:
    """y (M, N) of x (M, K), and what `adapter_bwd` wants of it: z (M, R), mean and rstd (M, 1) of each norm, v (M, N).

    Where calls are being recorded, `traced` names the plan whose mask op they take; elsewhere it is empty.
    """
    wide, (M, K), N = wide_dtype(down_weight), x.shape, up_weight.shape[0]
    scale, act = _number(scaling, traced), ACTIVATIONS[activation]
    down, down_bias, up, up_bias = (_cast(p, wide) for p in (down_weight, down_bias, up_weight, up_bias))
    norm_before, norm_after = _cast_norm(norm_before, wide), _cast_norm(norm_after, wide)
    whole = bool(traced) or (x.dtype is wide and not (norm_before or threshold))
    height = M if whole else _height(M, N, threshold)
    y, z, mean_before, rstd_before, mean_after, rstd_after, v = results = [_Rows(M, height) for _ in range(7)]
    for rows, dropped in _blocks(M, N, height, threshold, seed, wide, traced):
        h = cast(_of(x, rows), wide)
        r = None if residual is None else cast(_of(residual, rows), wide)
        if norm_before:
            h, mean, rstd = torch.native_layer_norm(h, (K,), *norm_before, eps)
            mean_before.put(rows, mean)
            rstd_before.put(rows, rstd)
        z_rows = F.linear(h, down, down_bias)
        z.put(rows, z_rows)
        inside = None if residual_after_norm else r
        direct = y.rows(rows, x, N) if not norm_after and x.dtype is wide else None
        out = _expand(act(z_rows), up, up_bias, scale, inside, dropped, threshold, traced, direct)
        if norm_after:
            if not (threshold and _has_sources(residual, x, residual_after_norm)):
                v.put(rows, out)
            out, mean, rstd = torch.native_layer_norm(out, (N,), *norm_after, eps)
            mean_after.put(rows, mean)
            rstd_after.put(rows, rstd)
        if residual_after_norm and r is not None:
            out = _add(out, r, traced)
        y.put(rows, cast(out, x.dtype))
    return tuple(result.value for result in results)


def adapter_bwd(
    dy: Tensor,
    saved: Sequence[Tensor | None],
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scaling: float | Tensor,
    norm_before: Norm | None,
    norm_after: Norm | None,
    threshold: int,
    seed: Tensor | None,
    *,
    activation: str,
    residual_after_norm: bool,
    needs: set[str],
    eps: float,
    traced: str = "",
) -> dict[str, Any]:
    """The gradients that `needs` names; those of a norm are a (weight, bias) pair.

    Where `residual` is x itself its gradient is part of x's.
    """
    wide, (M, K), N = wide_dtype(down_weight), x.shape, up_weight.shape[0]
    number, keep = _number(scaling, traced), keep_scale(threshold)
    down, up, up_bias = (_cast(p, wide) for p in (down_weight, up_weight, up_bias))
    norm_before, norm_after = _cast_norm(norm_before, wide), _cast_norm(norm_after, wide)
    z, mean_before, rstd_before, mean_after, rstd_after, v = saved
    of_norm = needs & {"down_weight", "norm_before"} if norm_before and x.is_cpu and not traced else set()
    centred = bool(of_norm) and _is_centred(x, norm_before, mean_before, rstd_before)
    whole = bool(traced) or (x.dtype is wide and not (norm_before or threshold))
    height = M if whole else _height(M, N, threshold)
    dx, d_residual = _Rows(M, height), _Rows(M, height)
    sums: dict[str, Any] = {}

    def add_sum(name: str, value: Tensor) -> None:
        sums[name] = value if name not in sums else sums[name].add_(value)

    def add_product(name: str, s: Tensor, tall: Tensor) -> None:
        add_sum(name, tall_mm(s, tall, traced))

    for rows, dropped in _blocks(M, N, height, threshold, seed, wide, traced):
        z_rows, dv = _of(z, rows), cast(_of(dy, rows), wide)
        a = ACTIVATIONS[activation](z_rows)
        skip = dv
        if norm_after:
            if v is None:
                r = cast(_of(x, rows), wide) if residual is x and not residual_after_norm else None
                v_rows = _expand(a, up, up_bias, number, r, dropped, threshold, traced, None)
            else:
                v_rows = _of(v, rows)
            dv, *sides = _norm_grad(dv, v_rows, norm_after, _of(mean_after, rows), _of(rstd_after, rows))
            add_sum("norm_after_weight", sides[0])
            add_sum("norm_after_bias", sides[1])
            skip = skip if residual_after_norm else dv
        if "residual" in needs:
            d_residual.put(rows, cast(skip, dy.dtype))
        dt = dv if dropped is None else dropped.masked(dv)
        if "up_weight" in needs:
            if up.shape[1] >= WIDE and not traced:  # as it lies in memory in the end
                add_sum("up_weight", torch.mm(dt.t(), a).t())
            else:
                add_product("up_weight", a, dt)
        if "up_bias" in needs or ("scaling" in needs and up_bias is not None):
            add_sum("up_bias", dt.sum(0))
        if not needs & {"x", "down_weight", "down_bias", "scaling", "norm_before"}:
            continue
        if "scaling" in needs:
            da = narrow_mm(dt, up, keep, traced)
            add_sum("scaling", (a * da).sum())
            da = da * number
        else:
            da = narrow_mm(dt, up, number * keep, traced)
        dz = ACTIVATION_GRADS[activation](da, z_rows)
        if centred or "down_bias" in needs:
            add_sum("down_bias", dz.sum(0))
        h = cast(_of(x, rows), wide)
        if norm_before and needs & ({"x"} if centred else {"x", "norm_before"}):
            stats = _of(mean_before, rows), _of(rstd_before, rows)
            d, *sides = _norm_grad(torch.mm(dz, down), h, norm_before, *stats, parameters=not centred)
            if not centred:
                add_sum("norm_before_weight", sides[0])
                add_sum("norm_before_bias", sides[1])
            if residual is x:
                place = dx.rows(rows, dy, K) if dy.dtype is wide else None
                d = _add(d, skip, traced) if place is None else torch.add(d, skip, out=place)
            dx.put(rows, cast(d, dy.dtype))
        elif "x" in needs:
            if residual is not x:
                d = torch.mm(dz, down)
            elif norm_after and skip is dv and not traced:  # the norm's gradient is ours to write into
                d = dv.addmm_(dz, down)
            else:
                d = torch.addmm(skip, dz, down)
            dx.put(rows, cast(d, dy.dtype))
        if centred:  # dzᵀ (x - mean) rstd
            dz = dz * _of(rstd_before, rows)
            add_sum("normalized", tall_mm(dz, h, traced).sub_(torch.mm(dz.t(), _of(mean_before, rows))))
        elif "down_weight" in needs:
            if norm_before:
                h = torch.native_layer_norm(h, (K,), *norm_before, eps)[0]
            add_product("down_weight", dz, h)

    if norm_before and "normalized" in sums:
        weight, bias = norm_before
        sums["norm_before_weight"] = (sums["normalized"] * down).sum(0)
        sums["norm_before_bias"] = torch.mv(down.t(), sums["down_bias"])
        sums["down_weight"] = sums["normalized"].mul_(weight).addr_(sums["down_bias"], bias)
    grads: dict[str, Any] = {"x": dx.value, "residual": d_residual.value}
    if "scaling" in needs:
        grads["scaling"] = (
            sums["scaling"] if up_bias is None else sums["scaling"] + (up_bias * sums["up_bias"]).sum() * keep
        )
    for name in ("up_weight", "up_bias"):
        if name in needs:
            grad = sums[name].t().contiguous() if name == "up_weight" else sums[name]
            grads[name] = grad if isinstance(number, float) and number * keep == 1 else grad * (number * keep)
    for name in ("norm_before", "norm_after"):
        grads[name] = sums.get(f"{name}_weight"), sums.get(f"{name}_bias")
    return {name: grads[name] if name in grads else sums[name] for name in needs}


def _height(M: int, N: int, threshold: int) -> int:
    """Of blocks of rows: with dropout those of the mask, else four times as high, which saves calls."""
    return block_rows(M, N if threshold else -(-N // 4))


def _has_sources(residual: Tensor | None, x: Tensor, residual_after_norm: bool) -> bool:
    """Whether backward has all that v is made from."""
    return residual is None or residual is x or residual_after_norm


class _Rows:
    """A tensor of M rows that is put together from blocks of `height` rows."""

    def __init__(self, M: int, height: int) -> None:
        self.M, self.whole = M, height >= M
        self.value: Any = None

    def rows(self, rows: slice, like: Tensor, width: int) -> Tensor | None:
        """Where a block may be written, a tensor of `like`'s dtype; None where the block will be the whole."""
        if self.whole:
            return None
        if self.value is None:
            self.value = like.new_empty(self.M, width)
        return self.value[rows]

    def put(self, rows: slice, block: Tensor) -> None:
        """Take a block, unless it was written where `rows` said."""
        if self.whole:
            self.value = block
        elif self.value is None or self.value[rows].data_ptr() != block.data_ptr():
            place: Any = self.rows(rows, block, block.shape[1])
            place.copy_(block)


def _blocks(
    M: int, N: int, height: int, threshold: int, seed: Tensor | None, wide: torch.dtype, traced: str
) -> Iterable[tuple[slice, Dropped | Mask | None]]:
    if threshold:
        return blocks_of(seed, (M, N), threshold, wide, traced)
    if height >= M:
        return [(_ALL, None)]
    return [(slice(start, start + height), None) for start in range(0, M, height)]


def _of(tensor: Any, rows: slice) -> Tensor:
    """To slice a tensor takes microseconds even where that is all of it."""
    return tensor if rows is _ALL else tensor[rows]


def _expand(
    a: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Any,
    residual: Tensor | None,
    dropped: Dropped | Mask | None,
    threshold: int,
    traced: str,
    out: Tensor | None,
) -> Tensor:
    """residual + scale · mask ∘ (a Wuᵀ + bu) / (1-p), in `out` where that is given."""
    if dropped is None and residual is not None and not traced:
        if up_bias is None:
            return torch.addmm(residual, a, up.t(), alpha=scale, out=out)
        return torch.add(residual, up_bias, alpha=scale, out=out).addmm_(a, up.t(), alpha=scale)
    t = F.linear(a, up, up_bias)
    if isinstance(dropped, Dropped):
        dropped.mask_(t)
    elif dropped is not None:
        t = dropped.masked(t)
    scale = scale * keep_scale(threshold)
    if traced:
        return t * scale if residual is None else residual + t * scale
    return t.mul_(scale) if residual is None else torch.add(residual, t, alpha=scale, out=out)


def _norm_grad(
    dy: Tensor, x: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, *, parameters: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of the norm's weight and bias."""
    return _aten.native_layer_norm_backward(dy, x, (x.shape[1],), mean, rstd, *norm, (True, parameters, parameters))


def _is_centred(x: Tensor, norm: Any, mean: Tensor, rstd: Tensor) -> bool:
    """Whether the rows' means are so far below what the norm makes of x that x may be summed first, and the means be
    taken off the sum.

    A column's sum then rounds with sqrt(deviation² + mean²) instead of its deviation, both over the row's, and the
    norm's weight magnifies that: so the largest mean and weight are compared with what the norm makes of a few rows.
    """
    if x.numel() == 0:
        return False
    step, weight, norm_of = -(-len(x) // 8), norm[0], torch.linalg.vector_norm
    few = (x[::step] - mean[::step]) * rstd[::step] * weight
    far = float(norm_of(mean * rstd, torch.inf)) * float(norm_of(weight, torch.inf))
    return far <= CENTRED * float(norm_of(few)) / few.numel() ** 0.5  # not where one is no number


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Any:
    return None if parameter is None else cast(parameter, dtype)


def _cast_norm(norm: Norm | None, dtype: torch.dtype) -> Norm | None:
    return None if norm is None else (cast(norm[0], dtype), cast(norm[1], dtype))


def _add(a: Tensor, b: Tensor, traced: str) -> Tensor:
    return a + b if traced else a.add_(b)


def _number(scaling: Any, traced: str) -> Any:
    """A learned scaling on the CPU as a number, which a matmul takes as its alpha."""
    return scaling if traced or not isinstance(scaling, Tensor) else scaling.item()

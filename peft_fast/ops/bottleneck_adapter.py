"""The bottleneck adapter op: validate, schema, launch, fake, autograd, public function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast import eager, reference, support
from peft_fast.ops import _shared
from peft_fast.ops._bottleneck_call import (
    INPUTS,
    Norm,
    Options,
    by_reference,
    fits,
    grads_by_reference,
    is_usual_call,
    pair,
    under_autocast,
    validate,
)
from peft_fast.ops._shared import CODE, LIBRARY, as_tensor, resolve, rows

# In the order of INPUTS.
_TENSORS = (
    "Tensor x, Tensor? residual, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    "Tensor scaling, Tensor? norm_before_weight, Tensor? norm_before_bias, Tensor? norm_after_weight, "
    "Tensor? norm_after_bias"
)
_OPTIONS = "bool skip, int threshold, Tensor? seed, str activation, bool residual_after_norm, float eps"

LIBRARY.define(f"bottleneck_adapter({_TENSORS}, {_OPTIONS}, str backend, str code) -> Tensor")
LIBRARY.define(f"bottleneck_adapter_fwd({_TENSORS}, {_OPTIONS}) -> Tensor[]")
LIBRARY.define(
    f"bottleneck_adapter_bwd(Tensor dy, {_TENSORS}, {_OPTIONS}, Tensor z, Tensor? stats_before, Tensor? stats_after, "
    "str[] needs) -> Tensor[]"
)


def _arguments(tensors: Any, options: Options) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of the launchers: 2-D activations, each norm a pair."""
    x, residual, *parameters, before_weight, before_bias, after_weight, after_bias = tensors
    if options.skip:
        residual = x
    norm_before = None if before_weight is None else (before_weight, before_bias)
    norm_after = None if after_weight is None else (after_weight, after_bias)
    keywords: dict[str, Any] = {name: getattr(options, name) for name in ("activation", "residual_after_norm", "eps")}
    return [x, residual, *parameters, norm_before, norm_after], keywords


def _launch_fwd(tensors: Any, options: Options, plan: str, traced: bool = False) -> Any:
    """y (M, N), and what `_launch_bwd` wants as `saved`."""
    if traced and plan != "eager":
        y, z, *stats = torch.ops.peft_fast.bottleneck_adapter_fwd(*_with_scaling(tensors), *options)
        return y, z, *_optional(stats, tensors)
    if plan == "eager":
        args, keywords = _arguments(tensors, options)
        args += [options.threshold, options.seed]
        return eager.adapter_fwd(*args, **keywords, traced=plan if traced else "")
    args, keywords = _arguments(resolve(*tensors), options)
    return _shared.kernels("bottleneck_adapter").adapter_fwd(*args, options.threshold, options.seed, **keywords)


def _launch_bwd(
    dy: Tensor, tensors: Any, options: Options, saved: Any, needs: set[str], plan: str, traced: bool = False
) -> dict[str, Tensor]:
    """The gradients that `needs` names among INPUTS; x's has that of the residual in it where `skip`."""
    batched = support.is_batched(dy)
    if plan != "eager" and traced and not batched:
        named = sorted(needs)
        grads = torch.ops.peft_fast.bottleneck_adapter_bwd(dy, *_with_scaling(tensors), *options, *saved, named)
        return dict(zip(named, grads, strict=True))
    pairs = {name.rsplit("_", 1)[0] if name.startswith("norm") else name for name in needs}
    if plan == "eager" or batched:
        args, keywords = _arguments(tensors, options)
        args, keywords = [*args, options.threshold, options.seed], keywords | {"traced": plan if traced else ""}
        if plan != "eager":
            _, *saved = eager.adapter_fwd(*args, **keywords)
        grads = eager.adapter_bwd(dy, saved, *args, **keywords, needs=pairs)
    else:
        dy, *tensors = resolve(dy, *tensors)
        args, keywords = _arguments(tensors, options)
        del keywords["eps"]
        args += [*saved, options.threshold, options.seed]
        grads = _shared.kernels("bottleneck_adapter").adapter_bwd(dy, *args, **keywords, needs=pairs)
    for name in ("norm_before", "norm_after"):
        if name in grads:
            grads[f"{name}_weight"], grads[f"{name}_bias"] = grads.pop(name)
    return {name: grads[name] for name in needs}


def _with_scaling(tensors: Any) -> list[Any]:
    named = dict(zip(INPUTS, tensors, strict=True))
    return list((named | {"scaling": as_tensor(named["scaling"], named["x"])}).values())


def _optional(stats: Any, tensors: Any) -> list[Tensor | None]:
    """Statistics for the norms that there are, None for the others."""
    left = iter(stats)
    return [
        None if tensors[INPUTS.index(f"{name}_weight")] is None else next(left)
        for name in ("norm_before", "norm_after")
    ]


@torch.library.impl(LIBRARY, "bottleneck_adapter_fwd", "CompositeExplicitAutograd")
def _fwd(*args):
    n = len(INPUTS)
    results = _launch_fwd(args[:n], Options(*args[n:]), "split")
    return [result for result in results if result is not None]


@torch.library.impl(LIBRARY, "bottleneck_adapter_bwd", "CompositeExplicitAutograd")
def _bwd(dy, *args):
    n, m = len(INPUTS), len(INPUTS) + len(Options._fields)
    *saved, needs = args[m:]
    grads = _launch_bwd(dy, args[:n], Options(*args[n:m]), saved, set(needs), "split")
    # The residual's gradient may be dy itself, and an op may not return its argument.
    return [grads[name].clone() if grads[name] is dy else grads[name] for name in needs]


@torch.library.register_fake("peft_fast::bottleneck_adapter_fwd", lib=LIBRARY)
def _fake_fwd(x, residual, down_weight, down_bias, up_weight, *args):
    M, wide = x.shape[0], torch.promote_types(down_weight.dtype, torch.float32)
    norms = args[2], args[4]
    stats = [x.new_empty(2, M, dtype=wide) for norm in norms if norm is not None]
    return [x.new_empty(M, up_weight.shape[0]), x.new_empty(M, down_weight.shape[0], dtype=wide), *stats]


@torch.library.register_fake("peft_fast::bottleneck_adapter_bwd", lib=LIBRARY)
def _fake_bwd(dy, *args):
    needs, tensors = args[-1], dict(zip(INPUTS, args, strict=False)) | {"residual": dy}
    return [torch.empty_like(tensors[name], memory_format=torch.contiguous_format) for name in needs]


class _BottleneckAdapter(torch.autograd.Function):
    """Saves x, the caller's own tensor, z (M, R), statistics of the rows, the seed and the parameters."""

    @staticmethod
    def forward(ctx, options, plan, traced, *tensors):
        shape = tensors[0].shape
        activations = [tensor if tensor is None else rows(tensor) for tensor in tensors[:2]]
        y, *saved = _launch_fwd((*activations, *tensors[2:]), options, plan, traced)
        ctx.needs = {name for name, need in zip(INPUTS, ctx.needs_input_grad[3:], strict=True) if need}
        kept = list(tensors)
        has_norm_after = tensors[INPUTS.index("norm_after_weight")] is not None
        if options.skip or not has_norm_after or options.residual_after_norm:
            kept[1] = None  # the residual is not read in backward
        ctx.scaling = kept[INPUTS.index("scaling")]
        if not isinstance(ctx.scaling, Tensor):
            kept[INPUTS.index("scaling")] = None
        ctx.save_for_backward(*kept, options.seed, *saved)
        ctx.options, ctx.plan = options._replace(seed=None), plan
        # Not a view in autograd's eyes: the caller may change y in place.
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        return _grads(ctx, dy, list(_shared.saved_tensors(ctx, "bottleneck_adapter")))


class _NormOfSum(_BottleneckAdapter):
    """The eager form of the calls that `_is_norm_of_sum` names: saves the same, but as a rule not x.

    A repetition by checkpointing that takes the other function is then an error, since the order of what is saved tells
    them apart; it happens where only one of the two is watched.
    """

    @staticmethod
    def forward(ctx, options, plan, traced, x, residual, *others):
        down_weight, down_bias, up_weight, up_bias, scaling, _, _, *norm = others
        number = scaling.item() if isinstance(scaling, Tensor) else scaling
        act = options.activation
        v_for_x, y, z, mean, rstd, v = eager.norm_of_sum_fwd(
            rows(x), down_weight, down_bias, up_weight, up_bias, number, norm, activation=act, eps=options.eps
        )
        place = _place(x) if v_for_x else None
        kept = [None if v_for_x else x, None, *(t if isinstance(t, Tensor) else None for t in others)]
        ctx.save_for_backward(*kept, options.seed, z, None, None, mean, rstd, v, place)
        ctx.needs = {name for name, need in zip(INPUTS, ctx.needs_input_grad[3:], strict=True) if need}
        ctx.scaling, ctx.options, ctx.plan = number, options._replace(seed=None), plan
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, x.shape)

    @staticmethod
    def backward(ctx, dy):
        *kept, place = _shared.saved_tensors(ctx, "bottleneck_adapter")
        x, _, down_weight, _, up_weight, up_bias, scaling, _, _, *norm, _, z, _, _, mean, rstd, v = kept
        if torch.is_grad_enabled() or not support.runs_plainly(dy):
            if x is None:
                kept[0] = place + _value_of_x(place, z, v, up_weight, up_bias, ctx)
            return _grads(ctx, dy, kept)
        _, _, _, need_x, _, *need_parameters, _, _, need_weight, need_bias = ctx.needs_input_grad
        needs = (need_x, *need_parameters, need_weight, need_bias)
        arguments = (None if x is None else rows(x), down_weight, up_weight, up_bias, ctx.scaling, norm)
        with _shared.without_autocast(dy.device.type):
            of_x, *of_parameters, of_scaling, of_weight, of_bias = eager.norm_of_sum_bwd(
                rows(dy), z, mean, rstd, v, *arguments, activation=ctx.options.activation, needs=needs
            )
        if need_x and dy.dim() != 2:
            of_x = of_x.view(dy.shape)
        if of_scaling is not None:
            of_scaling = of_scaling.to(scaling.dtype).view(scaling.shape)
        return None, None, None, of_x, None, *of_parameters, of_scaling, None, None, of_weight, of_bias


def _place(x: Tensor) -> Tensor:
    """x's place in the graph, of x's shape, without x's memory."""
    with torch.enable_grad():
        place = torch.ops.aten._unsafe_view.default(x, x.shape)  # no view in autograd's eyes, which would hold x
    place.data = x.new_zeros(()).expand(x.shape)
    return place


def _is_norm_of_sum(tensors: Any, options: Options) -> bool:
    """Whether a call on the CPU has no dropout and one LayerNorm, which is on the sum with x."""
    x, *_, norm_before, _, norm_after, _ = tensors
    return (
        options.skip
        and norm_before is None
        and norm_after is not None
        and not (options.threshold or options.residual_after_norm)
        and x.is_cpu
    )


@torch.no_grad()
def _value_of_x(place: Tensor, z: Tensor, v: Tensor, up: Tensor, up_bias: Tensor | None, ctx: Any) -> Tensor:
    """x = v - scaling · (act(z) Wuᵀ + bu), of place's shape and dtype."""
    bias = None if up_bias is None else up_bias.to(v.dtype)
    term = F.linear(reference.ACTIVATIONS[ctx.options.activation](z), up.to(v.dtype), bias)
    return (v - ctx.scaling * term).to(place.dtype).view(place.shape)


def _grads(ctx, dy, kept):
    """The gradients of all inputs of `_BottleneckAdapter.forward` from what it saved."""
    tensors, (seed, *saved) = kept[: len(INPUTS)], kept[len(INPUTS) :]
    scaling = INPUTS.index("scaling")
    if tensors[scaling] is None:
        tensors[scaling] = ctx.scaling
    options = ctx.options._replace(seed=seed)
    with _shared.without_autocast(dy.device.type):
        if torch.is_grad_enabled():  # create_graph=True
            grads = grads_by_reference(dy, tensors, options, ctx.plan, ctx.needs)
        else:
            grads = _backward(ctx, dy, tensors, options, saved)
    return None, None, None, *(grads.get(name) for name in INPUTS)


def _backward(ctx, dy, tensors, options, saved):
    like = dict(zip(INPUTS, tensors, strict=True)) | {"residual": dy}
    activations = [tensor if tensor is None else rows(tensor) for tensor in tensors[:2]]
    grads = _launch_bwd(
        rows(dy),
        (*activations, *tensors[2:]),
        options,
        saved,
        ctx.needs,
        ctx.plan,
        traced=not support.runs_plainly(dy),
    )
    for name, grad in grads.items():
        if grad.dtype is not like[name].dtype:
            grad = grad.to(like[name].dtype)
        grads[name] = grad if grad.shape == like[name].shape else grad.view(like[name].shape)
    skip = grads.get("residual")
    if skip is not None and support.runs_plainly(dy) and skip.data_ptr() == dy.data_ptr():
        grads["residual"] = dy  # not a view of it, into which autograd would accumulate
    return grads


@torch.library.impl(LIBRARY, "bottleneck_adapter", "Autograd")
def _autograd(*args):
    n = len(INPUTS)
    *values, backend, _ = args[n:]
    options, plan = Options(*values), support.choose_plan(args[0], backend)
    if support.in_transform():  # one inside of what is being compiled
        return by_reference(args[:n], options, plan)
    return _BottleneckAdapter.apply(options, plan, True, *args[:n])


@torch.library.impl(LIBRARY, "bottleneck_adapter", "CompositeExplicitAutograd")
def _inference(*args):
    n = len(INPUTS)
    *options, backend, _ = args[n:]
    x, residual, *others = args[:n]
    activations = [tensor if tensor is None else rows(tensor) for tensor in (x, residual)]
    y, *_ = _launch_fwd((*activations, *others), Options(*options), support.choose_plan(x, backend))
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


@torch.library.register_fake("peft_fast::bottleneck_adapter", lib=LIBRARY)
def _fake(x, residual, down_weight, down_bias, up_weight, *args):
    return x.new_empty(*x.shape[:-1], up_weight.shape[0])


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "relu",
    scaling: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    norm_before: Norm | None = None,
    norm_after: Norm | None = None,
    residual_after_norm: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """y = residual + scaling · drop(act(x Wdᵀ + bd) Wuᵀ + bu), the bottleneck adapter (Houlsby et al. 2019, section 2).

    Args:
        x: (..., K), of float64, float32, float16 or bfloat16.
        down_weight: Wd (R, K), any R >= 1; x's dtype, or float32 beside a 16-bit x. So are all parameters.
        up_weight: Wu (N, R).
        down_bias, up_bias: bd (R,), bu (N,).
        activation: "relu", "gelu" (erf), "gelu_new" (tanh), "silu", "tanh", "leaky_relu" (slope 0.01) or "identity".
        scaling: a number, or a tensor of one element that is learned.
        residual: (..., N), x's dtype: x itself in a sequential adapter; None adds nothing.
        dropout_p: the probability, in [0, 1), with which an element of the adapter's output is dropped, quantised to
            2^-16. Pass 0 outside training.
        seed: one int64 on x's device that the mask is made from; drawn from torch's generator where not given.
        norm_before: weight and bias (K,) of a LayerNorm on x.
        norm_after: weight and bias (N,) of a LayerNorm on the sum y, or where `residual_after_norm` on the scaled
            term before the residual is added.
        eps: of both LayerNorms.

    Returns y (..., N) in x's dtype. Autocast changes nothing but the dtypes that may meet: parameters follow x, and the
    wider of x and residual is that of y. The mask is made again in backward, never stored; but small calls,
    and on the CPU some without dropout, are the usual torch calls, which cost the host less, and keep what they keep.

    Raises ValueError where shapes, dtypes or devices do not fit, for an unknown activation or a dropout_p out of range,
    NotImplementedError where an explicit `backend` cannot serve.
    """
    norms = (*pair("norm_before", norm_before), *pair("norm_after", norm_after))
    parameters = [down_weight, down_bias, up_weight, up_bias, *norms]
    options = (scaling, activation, dropout_p, seed, residual_after_norm, eps)
    return apply_bottleneck_adapter(x, residual, parameters, *options, support.current_backend(down_weight))


def apply_bottleneck_adapter(
    x: Tensor,
    residual: Tensor | None,
    parameters: list[Any],
    scaling: float | Tensor,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    residual_after_norm: bool,
    eps: float,
    backend: str,
) -> Tensor:
    """`bottleneck_adapter` by a backend that the caller has asked for, since only it knows what stays the same.

    The parameters are weight and bias of down and up projection, of the LayerNorm before and of that after.
    """
    fit = seed is None and fits(x, residual, parameters, scaling, activation, dropout_p, eps)
    call = (x, residual, parameters, scaling, activation, dropout_p)
    if fit and backend == "auto" and is_usual_call(*call, residual_after_norm):
        keep_mask = None
        if dropout_p:
            keep_mask = x.new_empty(*x.shape[:-1], parameters[2].shape[0]).bernoulli_(1 - dropout_p)
        down_weight, down_bias, up_weight, up_bias, *norms = parameters
        return reference.bottleneck_adapter(
            x,
            down_weight,
            up_weight,
            down_bias=down_bias,
            up_bias=up_bias,
            activation=activation,
            scaling=scaling,
            residual=residual,
            dropout_p=dropout_p,
            keep_mask=keep_mask,
            norm_before=None if norms[0] is None else (norms[0], norms[1]),
            norm_after=None if norms[2] is None else (norms[2], norms[3]),
            residual_after_norm=residual_after_norm,
            eps=eps,
        )
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, residual, parameters = under_autocast(x, residual, parameters)
        call = (x, residual, parameters, scaling, activation, dropout_p)
    with _shared.without_autocast(x.device.type):
        return _apply(*call, seed, residual_after_norm, eps, backend, fit)


def _apply(x, residual, parameters, scaling, activation, dropout_p, seed, residual_after_norm, eps, backend, fit):
    skip = residual is x
    tensors = (x, None if skip else residual, *parameters[:4], scaling, *parameters[4:])
    if not fit:
        validate(tensors, activation, dropout_p, seed, residual, eps)
    threshold = reference.drop_threshold(dropout_p) if dropout_p else 0
    options = Options(skip, threshold, seed, activation, residual_after_norm, eps)
    if threshold and seed is None:
        options = options._replace(seed=eager.draw_seed(x.device))
    if support.runs_plainly(x):
        plan = support.choose_plan(x, backend)
        function = _NormOfSum if plan == "eager" and _is_norm_of_sum(tensors, options) else _BottleneckAdapter
        return function.apply(options, plan, False, *tensors)
    if not torch.compiler.is_compiling() and support.in_transform():
        return by_reference(tensors, options, support.choose_plan(x, backend))
    return torch.ops.peft_fast.bottleneck_adapter(*_with_scaling(tensors), *options, backend, CODE)

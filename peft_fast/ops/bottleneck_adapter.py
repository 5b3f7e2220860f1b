"""The bottleneck adapter op: validate, schema, launch, fake, autograd, public function."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_fast import eager, reference, support
from peft_fast.ops import _shared
from peft_fast.ops._shared import LIBRARY, as_tensor, resolve, rows

Norm = tuple[Tensor, Tensor]
_NO_NORM = (None, None)

# The tensors of a call in the order of every schema. A norm is two of them; x is its own residual where `skip`.
INPUTS = (
    "x",
    "residual",
    "down_weight",
    "down_bias",
    "up_weight",
    "up_bias",
    "scaling",
    "norm_before_weight",
    "norm_before_bias",
    "norm_after_weight",
    "norm_after_bias",
)
_TENSORS = (
    "Tensor x, Tensor? residual, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    "Tensor scaling, Tensor? norm_before_weight, Tensor? norm_before_bias, Tensor? norm_after_weight, "
    "Tensor? norm_after_bias"
)
_OPTIONS = "bool skip, int threshold, Tensor? seed, str activation, bool residual_after_norm, float eps"

LIBRARY.define(f"bottleneck_adapter({_TENSORS}, {_OPTIONS}, str backend) -> Tensor")
LIBRARY.define(f"bottleneck_adapter_fwd({_TENSORS}, {_OPTIONS}) -> Tensor[]")
LIBRARY.define(
    f"bottleneck_adapter_bwd(Tensor dy, {_TENSORS}, {_OPTIONS}, Tensor z, Tensor? stats_before, Tensor? stats_after, "
    "str[] needs) -> Tensor[]"
)


class Options(NamedTuple):
    """What is not a tensor in a call, and its seed."""

    skip: bool
    threshold: int
    seed: Tensor | None
    activation: str
    residual_after_norm: bool
    eps: float


def _validate(
    tensors: Any, activation: str, dropout_p: float, seed: Tensor | None, residual: Tensor | None, eps: float
) -> None:
    named = {name: tensor for name, tensor in zip(INPUTS, tensors, strict=True) if isinstance(tensor, Tensor)}
    scaling = named.pop("scaling", None)
    if residual is not None:
        named["residual"] = residual
    x, down_weight, up_weight = named["x"], named["down_weight"], named["up_weight"]

    def misfit(what: str) -> ValueError:
        expected = (
            "x (..., K), residual (..., N), down_weight (R, K), down_bias (R,), up_weight (N, R), up_bias (N,), "
            "norm_before (K,), norm_after (N,)"
        )
        return ValueError(_shared.misfit("bottleneck_adapter", what, expected, named))

    if x.dim() == 0 or down_weight.dim() != 2 or up_weight.dim() != 2:
        raise misfit("the number of dimensions")
    (R, K), N = down_weight.shape, up_weight.shape[0]
    # Weights first: a transposed one would put the blame on the residual.
    shapes = {"x": (*x.shape[:-1], K), "down_bias": (R,), "up_weight": (N, R), "up_bias": (N,)}
    shapes |= {"residual": (*x.shape[:-1], N), "norm_before_weight": (K,), "norm_before_bias": (K,)}
    shapes |= {"norm_after_weight": (N,), "norm_after_bias": (N,)}
    for name, shape in shapes.items():
        if name in named and named[name].shape != shape:
            transposed = name == "x" and x.shape[-1] == R
            raise misfit("down_weight" if transposed else name)
    if R == 0:
        raise misfit("a bottleneck of size 0")
    for name, tensor in named.items():
        if tensor.dtype not in support.FLOATING:
            raise ValueError(f"bottleneck_adapter: {name} has dtype {tensor.dtype}, expected a floating-point one")
        if tensor.device != x.device:
            raise ValueError(
                f"bottleneck_adapter: x is on {x.device} and {name} on {tensor.device}; move them together"
            )
        if name == "residual" and tensor.dtype != x.dtype:
            raise ValueError(_shared.dtypes("bottleneck_adapter", "residual must have x's dtype", named))
        if name not in ("x", "residual") and tensor.dtype != down_weight.dtype:
            raise ValueError(_shared.dtypes("bottleneck_adapter", "all parameters must have one dtype", named))
    if down_weight.dtype != x.dtype and (down_weight.dtype != torch.float32 or x.dtype == torch.float64):
        rule = "the parameters must have x's dtype, or float32 beside a 16-bit x"
        raise ValueError(_shared.dtypes("bottleneck_adapter", rule, named))
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"bottleneck_adapter: activation must be one of {known}, got {activation!r}")
    if scaling is not None and (scaling.numel() != 1 or scaling.device != x.device):
        raise ValueError(
            "bottleneck_adapter: scaling must be a number or a tensor of one element on x's device, "
            f"got {tuple(scaling.shape)} on {scaling.device}"
        )
    if scaling is None and not isinstance(tensors[INPUTS.index("scaling")], (int, float)):
        raise ValueError(f"bottleneck_adapter: scaling must be a number or a tensor, got {type(tensors[6]).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"bottleneck_adapter: dropout_p must lie in [0, 1), got {dropout_p}")
    if eps < 0:
        raise ValueError(f"bottleneck_adapter: eps must not be negative, got {eps}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(
            f"bottleneck_adapter: seed must be one int64 on {x.device}, got {tuple(seed.shape)} {seed.dtype} "
            f"on {seed.device}"
        )


def _autocast(x: Tensor, residual: Tensor | None, parameters: Any) -> tuple[Tensor, Tensor | None, list[Any]]:
    """x and residual in the wider of their dtypes, parameters in that dtype or in float32."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide_x = x if x.dtype == dtype else x.to(dtype)
    wide_residual = wide_x if residual is x else residual if residual is None else residual.to(dtype)
    widths = {parameter.dtype for parameter in parameters if isinstance(parameter, Tensor)}
    if widths <= {torch.float32} and dtype != torch.float64:
        return wide_x, wide_residual, list(parameters)
    return wide_x, wide_residual, [p.to(dtype) if isinstance(p, Tensor) else p for p in parameters]


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
        ctx.x_shape, ctx.options, ctx.plan = shape, options._replace(seed=None), plan
        # Not a view in autograd's eyes: the caller may change y in place.
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        kept = _shared.saved_tensors(ctx, "bottleneck_adapter")
        tensors, (seed, *saved) = list(kept[: len(INPUTS)]), kept[len(INPUTS) :]
        scaling = INPUTS.index("scaling")
        if tensors[scaling] is None:
            tensors[scaling] = ctx.scaling
        options = ctx.options._replace(seed=seed)
        backward = _backward
        if torch.is_grad_enabled():  # create_graph=True
            backward = _differentiable_bwd
        # Backward may be called inside an autocast region.
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                grads = backward(ctx, dy, tensors, options, saved)
        else:
            grads = backward(ctx, dy, tensors, options, saved)
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


def _differentiable_bwd(ctx, dy, tensors, options, saved):
    """The gradients of the reference, themselves differentiable."""
    named = dict(zip(INPUTS, tensors, strict=True))
    if named["residual"] is None and not options.skip and "residual" in ctx.needs:
        named["residual"] = dy.new_zeros(dy.shape, requires_grad=True)  # its value is not read
    # Nodes of their own: where one input is a function of another, the reference must not run on through its history.
    named = {name: t.view_as(t) if isinstance(t, Tensor) else t for name, t in named.items()}
    y = _differentiable(list(named.values()), options, ctx.plan)
    inputs = [named[name] for name in INPUTS if name in ctx.needs]
    grads = torch.autograd.grad(y, inputs, dy, create_graph=True)
    return dict(zip([name for name in INPUTS if name in ctx.needs], grads, strict=True))


def _differentiable(tensors, options, plan):
    """The reference with the mask of `plan`: right under every transform of torch, fast under none."""
    x, residual, down_weight, down_bias, up_weight, up_bias, scaling, *norms = tensors
    keep_mask = None
    if options.threshold:
        shape = (x.shape[:-1].numel(), up_weight.shape[0])
        mask = torch.ops.peft_fast.dropout_mask(options.seed, shape, options.threshold, plan)
        keep_mask = mask.view(*x.shape[:-1], up_weight.shape[0])
    return reference.bottleneck_adapter(
        x,
        down_weight,
        up_weight,
        down_bias=down_bias,
        up_bias=up_bias,
        activation=options.activation,
        scaling=scaling,
        residual=x if options.skip else residual,
        dropout_p=options.threshold / reference.DROPOUT_LEVELS,
        keep_mask=keep_mask,
        norm_before=None if norms[0] is None else (norms[0], norms[1]),
        norm_after=None if norms[2] is None else (norms[2], norms[3]),
        residual_after_norm=options.residual_after_norm,
        eps=options.eps,
    )


@torch.library.impl(LIBRARY, "bottleneck_adapter", "Autograd")
def _autograd(*args):
    n = len(INPUTS)
    *options, backend = args[n:]
    return _BottleneckAdapter.apply(Options(*options), support.choose_plan(args[0], backend), True, *args[:n])


@torch.library.impl(LIBRARY, "bottleneck_adapter", "CompositeExplicitAutograd")
def _inference(*args):
    n = len(INPUTS)
    *options, backend = args[n:]
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
    parameters = [down_weight, down_bias, up_weight, up_bias, *(norm_before or _NO_NORM), *(norm_after or _NO_NORM)]
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
    usual = backend == "auto" and seed is None
    if usual and _is_usual_call(x, residual, parameters, scaling, activation, dropout_p, eps):
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
        x, residual, parameters = _autocast(x, residual, parameters)
        with torch.autocast(x.device.type, enabled=False):
            return _apply(
                x, residual, parameters, scaling, activation, dropout_p, seed, residual_after_norm, eps, backend
            )
    return _apply(x, residual, parameters, scaling, activation, dropout_p, seed, residual_after_norm, eps, backend)


def _is_usual_call(
    x: Tensor, residual: Any, parameters: list[Any], scaling: Any, activation: str, dropout_p: float, eps: float
) -> bool:
    """Whether all fits and the usual torch calls are as fast as they get: a small x, where each microsecond of the host
    counts, or on the CPU no dropout and a compiler, or nothing that a function of ours would save.

    That is where there is no LayerNorm on x, the scaling is 1 and the gradient of the activation needs but its result:
    such a function keeps as much as the usual calls, and on an Intel Emerald Rapids took 0.98 to 1.08 of their time.
    """
    if x.is_cpu:
        bare = parameters[4] is None and not isinstance(scaling, Tensor) and scaling == 1
        bare = bare and activation in ("relu", "tanh", "identity")
        usual = not dropout_p and (bare or torch.compiler.is_compiling())
        usual = usual or x.numel() < support.MIN_CPU_ADAPTER_ELEMENTS
    else:
        usual = x.is_cuda and x.numel() < support.MIN_GPU_ELEMENTS
    if not usual:
        return False
    down_weight, _, up_weight, *_ = parameters
    if torch._C._is_any_autocast_enabled():
        return False
    dtype, shape = x.dtype, x.shape
    if dtype not in support.FLOATING or not shape or down_weight.dim() != 2 or up_weight.dim() != 2:
        return False
    (R, K), N = down_weight.shape, up_weight.shape[0]
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1 or scaling.device != x.device or (scaling.dim() and scaling.dtype is not dtype):
            return False
    elif not isinstance(scaling, (float, int)):
        return False
    of_x = residual is None or (residual is x and N == K)
    if shape[-1] != K or R == 0:
        return False
    if not of_x and (residual.dtype is not dtype or residual.shape != (*shape[:-1], N) or residual.device != x.device):
        return False
    for tensor, expected in zip(parameters, ((R, K), (R,), (N, R), (N,), (K,), (K,), (N,), (N,)), strict=True):
        if tensor is None:
            continue
        if tensor.dtype is not dtype or tensor.shape != expected or tensor.device != x.device:
            return False
    return activation in reference.ACTIVATIONS and 0.0 <= dropout_p < 1.0 and eps >= 0


def _apply(x, residual, parameters, scaling, activation, dropout_p, seed, residual_after_norm, eps, backend):
    skip = residual is x
    tensors = (x, None if skip else residual, *parameters[:4], scaling, *parameters[4:])
    _validate(tensors, activation, dropout_p, seed, residual, eps)
    threshold = reference.drop_threshold(dropout_p) if dropout_p else 0
    options = Options(skip, threshold, seed, activation, residual_after_norm, eps)
    if threshold and seed is None:
        options = options._replace(seed=eager.draw_seed(x.device))
    if support.runs_plainly(x):
        plan = support.choose_plan(x, backend)
        return _BottleneckAdapter.apply(options, plan, False, *tensors)
    if not torch.compiler.is_compiling() and support.in_transform():
        return _differentiable(tensors, options, support.choose_plan(x, backend))
    return torch.ops.peft_fast.bottleneck_adapter(*_with_scaling(tensors), *options, backend)

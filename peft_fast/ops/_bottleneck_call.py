"""A call of the bottleneck adapter: its arguments, whether they fit, and whether the usual torch calls serve it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_fast import reference, support
from peft_fast.ops import _shared

Norm = tuple[Tensor, Tensor]

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


class Options(NamedTuple):
    """What is not a tensor in a call, and its seed."""

    skip: bool
    threshold: int
    seed: Tensor | None
    activation: str
    residual_after_norm: bool
    eps: float


def pair(name: str, norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a norm, None where there is none."""
    if norm is None:
        return None, None
    if not (isinstance(norm, tuple | list) and len(norm) == 2 and all(isinstance(part, Tensor) for part in norm)):
        found = [type(part).__name__ for part in norm] if isinstance(norm, tuple | list) else type(norm).__name__
        raise ValueError(
            f"bottleneck_adapter: {name} must be a pair of tensors, weight and bias, got {found}; a LayerNorm without "
            "bias has zeros"
        )
    return norm[0], norm[1]


def validate(
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


def under_autocast(x: Tensor, residual: Tensor | None, parameters: Any) -> tuple[Tensor, Tensor | None, list[Any]]:
    """x and residual in the wider of their dtypes, parameters in that dtype or in float32."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide_x = x if x.dtype == dtype else x.to(dtype)
    wide_residual = wide_x if residual is x else residual if residual is None else residual.to(dtype)
    widths = {parameter.dtype for parameter in parameters if isinstance(parameter, Tensor)}
    if widths <= {torch.float32} and dtype != torch.float64:
        return wide_x, wide_residual, list(parameters)
    return wide_x, wide_residual, [p.to(dtype) if isinstance(p, Tensor) else p for p in parameters]


def fits(
    x: Tensor, residual: Any, parameters: list[Any], scaling: Any, activation: str, dropout_p: float, eps: float
) -> bool:
    """What `validate` asks, in a few microseconds, of a call without a seed whose tensors all have x's dtype.

    Where the answer is False, `validate` says what does not fit, if anything.
    """
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


def is_usual_call(
    x: Tensor,
    residual: Any,
    parameters: list[Any],
    scaling: Any,
    activation: str,
    dropout_p: float,
    residual_after_norm: bool,
) -> bool:
    """Whether the usual torch calls are as fast as they get: a small x, where each microsecond of the host counts, or
    on the CPU no dropout and a compiler, or nothing that a function of ours would save.

    That is where there is no LayerNorm on x nor on a sum with it, the scaling is 1 and the gradient of the activation
    needs but its result: such a function keeps as much as the usual calls, and on an Intel Emerald Rapids took 0.98 to
    1.08 of their time.
    """
    if not x.is_cpu:
        return x.is_cuda and x.numel() < support.MIN_GPU_ELEMENTS
    if x.numel() < support.MIN_CPU_ADAPTER_ELEMENTS:
        return True
    if dropout_p:
        return False
    bare = parameters[4] is None and (parameters[6] is None or residual is not x or residual_after_norm)
    bare = bare and not isinstance(scaling, Tensor) and scaling == 1 and activation in ("relu", "tanh", "identity")
    return bare or torch.compiler.is_compiling()


def by_reference(tensors: Any, options: Options, plan: str) -> Tensor:
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


def grads_by_reference(dy: Tensor, tensors: Any, options: Options, plan: str, needs: set[str]) -> dict[str, Tensor]:
    """The gradients that `needs` names among INPUTS, of the reference: themselves differentiable."""
    named = dict(zip(INPUTS, tensors, strict=True))
    if named["residual"] is None and not options.skip and "residual" in needs:
        named["residual"] = dy.new_zeros(dy.shape, requires_grad=True)  # its value is not read
    with torch.enable_grad():
        # Nodes of their own: where one input is a function of another, the reference must not run through its history.
        named = {name: t.view_as(t) if isinstance(t, Tensor) else t for name, t in named.items()}
        y = by_reference(list(named.values()), options, plan)
        wanted = [name for name in INPUTS if name in needs]
        grads = torch.autograd.grad(y, [named[name] for name in wanted], dy, create_graph=True)
    return dict(zip(wanted, grads, strict=True))

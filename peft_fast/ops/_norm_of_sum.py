"""The autograd function of the adapter with a LayerNorm on its sum with x, without dropout, on the eager backend."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast import eager, reference, support
from peft_fast.ops import _shared
from peft_fast.ops._bottleneck_call import INPUTS, Options, grads_by_reference
from peft_fast.ops._shared import rows


def is_norm_of_sum(tensors: Any, options: Options) -> bool:
    """Whether a call, its tensors as in INPUTS, has no dropout and one norm, which is on the sum with x."""
    *_, norm_before, _, norm_after, _ = tensors
    return (
        options.skip
        and norm_before is None
        and norm_after is not None
        and not options.threshold
        and not options.residual_after_norm
    )


_TAKEN = [name for name in INPUTS if name != "residual" and not name.startswith("norm_before")]


class _Place(torch.autograd.Function):
    """x's place in the graph, of x's shape, without x's memory."""

    @staticmethod
    def forward(ctx, x):
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx, dx):
        return dx


class NormOfSum(torch.autograd.Function):
    """Saves v (M, K), which enters the norm, z (M, R), statistics of the rows and the parameters; x only where v does
    not stand for it.
    """

    @staticmethod
    def forward(ctx, options, x, down_weight, down_bias, up_weight, up_bias, scaling, *norm):
        number = scaling.item() if isinstance(scaling, Tensor) else scaling
        settings = {"activation": options.activation, "eps": options.eps}
        flat = rows(x)
        y, *saved = eager.norm_of_sum_fwd(flat, down_weight, down_bias, up_weight, up_bias, number, norm, **settings)
        ctx.without_x = eager.takes_the_place(saved[0], flat)
        place = x
        if ctx.without_x:
            with torch.enable_grad():  # for create_graph=True
                place = _Place.apply(x)
        ctx.options, ctx.number = options, number
        of_scaling = scaling if isinstance(scaling, Tensor) else None
        ctx.save_for_backward(place, down_weight, down_bias, up_weight, up_bias, of_scaling, *norm, *saved)
        # Not a view in autograd's eyes: the caller may change y in place.
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, *parameters, weight, bias, v, z, mean, rstd = _shared.saved_tensors(ctx, "bottleneck_adapter")
        options, number, needs = ctx.options, ctx.number, ctx.needs_input_grad[1:]
        with _shared.without_autocast(dy.device.type):
            if torch.is_grad_enabled() or not support.runs_plainly(dy):
                of_scaling = number if parameters[4] is None else parameters[4]
                if ctx.without_x:
                    x = x + _value_of_x(v, z, parameters[2], parameters[3], number, options).view(x.shape).to(x.dtype)
                tensors = (x, None, *parameters[:4], of_scaling, None, None, weight, bias)
                named = {name for name, need in zip(_TAKEN, needs, strict=True) if need}
                by_name = grads_by_reference(dy, tensors, options, "eager", named)
                return None, *(by_name.get(name) for name in _TAKEN)
            down_weight, _, up_weight, up_bias, _ = parameters
            flat = None if ctx.without_x else rows(x)
            arguments = (v, z, mean, rstd, flat, down_weight, up_weight, up_bias, number, (weight, bias))
            grads = eager.norm_of_sum_bwd(rows(dy), *arguments, activation=options.activation, needs=needs)
        return None, *map(_like, grads, (x, *parameters, weight, bias))


def _like(grad: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    if grad is None or tensor is None or (grad.dtype is tensor.dtype and grad.shape == tensor.shape):
        return grad
    return grad.to(tensor.dtype).view(tensor.shape)


@torch.no_grad()
def _value_of_x(
    v: Tensor, z: Tensor, up_weight: Tensor, up_bias: Tensor | None, scaling: float, options: Options
) -> Tensor:
    """x = v - scaling · (act(z) Wuᵀ + bu)."""
    up, bias = up_weight.to(v.dtype), None if up_bias is None else up_bias.to(v.dtype)
    return v - scaling * F.linear(reference.ACTIVATIONS[options.activation](z), up, bias)

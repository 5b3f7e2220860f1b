"""The LoRA linear op: validate, schema, launch, fake, autograd, public function."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peft_fast import eager, reference, support, tuning
from peft_fast.ops import _shared
from peft_fast.ops._shared import CODE, LIBRARY, as_tensor, resolve


def _validate(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    if bias is not None:
        tensors["bias"] = bias
    if x.dim() == 0 or any(tensor.dim() != 2 for tensor in (weight, lora_a, lora_b)):
        raise ValueError(_misfit("the number of dimensions", tensors))
    (N, K), R = weight.shape, lora_a.shape[0]
    expected = {"x": (*x.shape[:-1], K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,)}
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(_misfit(name, tensors))
    if R == 0:
        raise ValueError(_misfit("rank 0", tensors))
    for name, tensor in tensors.items():
        if tensor.dtype not in support.FLOATING:
            raise ValueError(f"lora_linear: {name} has dtype {tensor.dtype}, expected a floating-point one")
        if tensor.device != x.device:
            raise ValueError(f"lora_linear: x is on {x.device} and {name} on {tensor.device}; move them together")
    if not torch.is_autocast_enabled(x.device.type):
        if any(tensor.dtype != x.dtype for name, tensor in tensors.items() if name in ("weight", "bias")):
            raise ValueError(_dtypes("weight and bias must have x's dtype", tensors))
        if lora_a.dtype != lora_b.dtype or lora_a.dtype not in (x.dtype, torch.float32):
            raise ValueError(_dtypes("lora_a and lora_b must both have x's dtype or float32", tensors))
        if x.dtype == torch.float64 != lora_a.dtype:
            raise ValueError(_dtypes("float64 x needs float64 factors", tensors))
    if weight.requires_grad:
        raise ValueError("lora_linear: weight requires grad, but the op keeps it frozen; pass weight.detach()")
    if not isinstance(scaling, (float, int)):
        raise ValueError(f"lora_linear: scaling must be a number, got {type(scaling).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"lora_linear: dropout_p must lie in [0, 1), got {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(
            f"lora_linear: seed must be one int64 on {x.device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )


def _misfit(what: str, tensors: dict[str, Tensor]) -> str:
    expected = "x (..., K), weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,)"
    return _shared.misfit("lora_linear", what, expected, tensors)


def _dtypes(rule: str, tensors: dict[str, Tensor]) -> str:
    return _shared.dtypes("lora_linear", rule, tensors)


LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor scaling, "
    "int threshold, Tensor? seed, str backend, str code) -> Tensor"
)
LIBRARY.define(
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor scaling, "
    "int threshold, Tensor? seed, str plan) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "lora_linear_bwd(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? s, Tensor scaling, "
    "int threshold, Tensor? seed, bool[] needs, str plan) -> Tensor[]"
)
LIBRARY.define("dropout_mask(Tensor seed, SymInt[] shape, int threshold, str plan) -> Tensor")


def _choose_plan(
    x: Tensor, weight: Tensor, lora_a: Tensor, threshold: int, backend: str, *, measure: bool = False
) -> str:
    plan = support.choose_plan(x, backend)
    if plan == "split" and tuning.serves(x):
        return tuning.choose(x, weight, lora_a, threshold > 0, measure=measure).plan
    return plan


def _launch_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
    seed: Tensor | None,
    plan: str,
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    if plan == "eager":
        traced_plan = plan if traced else ""
        return eager.lora_fwd(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, traced=traced_plan)
    if traced:
        scale = as_tensor(scaling, x)
        return torch.ops.peft_fast.lora_linear_fwd(x, weight, lora_a, lora_b, bias, scale, threshold, seed, plan)
    tensors = resolve(x, weight, lora_a, lora_b, bias)
    return _shared.kernels("lora_linear").lora_fwd(*tensors, scaling, threshold, seed, plan=plan)


def _launch_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    plan: str,
    traced: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    args = (dy, x, weight, lora_a, lora_b, s, scaling, threshold, seed)
    if plan == "eager" or support.is_batched(dy):
        return eager.lora_bwd(*args, needs=needs, traced=plan if traced else "")
    if traced:
        args = (dy, x, weight, lora_a, lora_b, s, as_tensor(scaling, dy), threshold, seed)
        needed = iter(torch.ops.peft_fast.lora_linear_bwd(*args, needs, plan))
        dx, da, db, dbias = (next(needed) if need else None for need in needs)
        return dx, da, db, dbias
    tensors = resolve(dy, x, weight, lora_a, lora_b)
    return _shared.kernels("lora_linear").lora_bwd(*tensors, s, scaling, threshold, seed, needs=needs, plan=plan)


@torch.library.impl(LIBRARY, "lora_linear_fwd", "CompositeExplicitAutograd")
def _lora_linear_fwd(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan):
    return _launch_fwd(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan)


@torch.library.impl(LIBRARY, "lora_linear_bwd", "CompositeExplicitAutograd")
def _lora_linear_bwd(dy, x, weight, lora_a, lora_b, s, scaling, threshold, seed, needs, plan):
    grads = _launch_bwd(dy, x, weight, lora_a, lora_b, s, scaling, threshold, seed, tuple(needs), plan)
    return [grad for grad in grads if grad is not None]


@torch.library.impl(LIBRARY, "dropout_mask", "CompositeExplicitAutograd")
def _dropout_mask(seed, shape, threshold, plan):
    backend = eager if plan == "eager" else _shared.kernels("dropout")
    return backend.dropout_mask(seed, shape, threshold)


@torch.library.register_fake("peft_fast::lora_linear_fwd", lib=LIBRARY)
def _fake_fwd(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan):
    M, wide = x.shape[0], torch.promote_types(lora_a.dtype, torch.float32)
    return x.new_empty(M, weight.shape[0]), x.new_empty(M, lora_a.shape[0], dtype=wide)


@torch.library.register_fake("peft_fast::lora_linear_bwd", lib=LIBRARY)
def _fake_bwd(dy, x, weight, lora_a, lora_b, s, scaling, threshold, seed, needs, plan):
    (M, N), K = dy.shape, lora_a.shape[1]
    grads = (
        dy.new_empty(M, K),
        torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format),
        dy.new_empty(N),
    )
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


@torch.library.register_fake("peft_fast::dropout_mask", lib=LIBRARY)
def _fake_mask(seed, shape, threshold, plan):
    return seed.new_empty(shape, dtype=torch.bool)


class _LoraLinear(torch.autograd.Function):
    """Saves x, the caller's own tensor, s (M, R), the seed and the parameters."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan, traced):
        shape = x.shape
        y, s = _launch_fwd(_shared.rows(x), weight, lora_a, lora_b, bias, scaling, threshold, seed, plan, traced)
        need_x, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_a else None, weight if need_x else None, lora_a, lora_b, s if need_b else None, seed
        )
        ctx.x_shape, ctx.scaling, ctx.threshold, ctx.plan = shape, scaling, threshold, plan
        # Not a view in autograd's eyes: the caller may change y in place.
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx, dy):
        need_x, _, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
        needs = (need_x, need_a, need_b, need_bias)
        x, weight, lora_a, lora_b, s, seed = _shared.saved_tensors(ctx, "lora_linear")
        with _shared.without_autocast(dy.device.type):
            dx, da, db, dbias = _backward(ctx, dy, x, weight, lora_a, lora_b, s, seed, needs)
        return dx, None, da, db, dbias, None, None, None, None, None


def _backward(ctx, dy, x, weight, lora_a, lora_b, s, seed, needs):
    if torch.is_grad_enabled():  # create_graph=True
        return _differentiable_bwd(ctx, dy, x, weight, lora_a, lora_b, seed, needs)
    shape, traced = ctx.x_shape, not support.runs_plainly(dy)
    x = x if x is None else _shared.rows(x)
    dx, *others = _launch_bwd(
        _shared.rows(dy), x, weight, lora_a, lora_b, s, ctx.scaling, ctx.threshold, seed, needs, ctx.plan, traced
    )
    return dx if dx is None or len(shape) == 2 else dx.view(shape), *others


def _differentiable_bwd(ctx, dy, x, weight, lora_a, lora_b, seed, needs):
    """The gradients of the reference, themselves differentiable."""
    need_x, need_a, need_b, need_bias = needs
    if x is None:
        if need_b:
            raise RuntimeError(
                "lora_linear: second derivatives with lora_a frozen need the layer's input, which is not kept then; "
                "let lora_a require grad, or take this model back with peft_fast.unpatch(model)"
            )
        x = dy.new_zeros(ctx.x_shape, requires_grad=True)  # dx does not depend on x
    if weight is None:
        weight = dy.new_zeros(lora_b.shape[0], lora_a.shape[1])  # nor do dA and dB on the weight
    # Nodes of their own: where one input is a function of another, the reference must not run on through its history.
    x, lora_a, lora_b = (tensor.view_as(tensor) for tensor in (x, lora_a, lora_b))
    inputs = [tensor for tensor, need in ((x, need_x), (lora_a, need_a), (lora_b, need_b)) if need]
    y = _differentiable(x, weight, lora_a, lora_b, None, ctx.scaling, ctx.threshold, seed, ctx.plan)
    grads = iter(torch.autograd.grad(y, inputs, dy, create_graph=True) if inputs else ())
    dx, da, db = (next(grads) if need else None for need in (need_x, need_a, need_b))
    return dx, da, db, _shared.rows(dy).sum(0) if need_bias else None


def _differentiable(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan):
    """The reference with the mask of `plan`: right under every transform of torch, fast under none."""
    keep_mask = None
    if threshold:
        rows = (x.shape[:-1].numel(), x.shape[-1])
        keep_mask = torch.ops.peft_fast.dropout_mask(seed, rows, threshold, plan).view(x.shape)
    return reference.lora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        bias=bias,
        scaling=scaling,
        dropout_p=threshold / reference.DROPOUT_LEVELS,
        keep_mask=keep_mask,
    )


@torch.library.impl(LIBRARY, "lora_linear", "Autograd")
def _lora_linear_autograd(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, backend, code):
    plan = _choose_plan(x, weight, lora_a, threshold, backend)
    if support.in_transform():  # one inside of what is being compiled, which only here can be asked for
        return _differentiable(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan)
    return _LoraLinear.apply(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan, True)


@torch.library.impl(LIBRARY, "lora_linear", "CompositeExplicitAutograd")
def _lora_linear_inference(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, backend, code):
    plan = _choose_plan(x, weight, lora_a, threshold, backend)
    y, _ = _launch_fwd(_shared.rows(x), weight, lora_a, lora_b, bias, scaling, threshold, seed, plan)
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


@torch.library.register_fake("peft_fast::lora_linear", lib=LIBRARY)
def _fake(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, backend, code):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ, the LoRA linear layer (Hu et al. 2021, equation 3).

    Args:
        x: (..., K), of float64, float32, float16 or bfloat16.
        weight: (N, K), x's dtype, frozen; any strides.
        lora_a: (R, K), any rank R >= 1; x's dtype, or float32 beside a 16-bit x.
        lora_b: (N, R), lora_a's dtype.
        bias: (N,), x's dtype.
        scaling: the factor of the low-rank path, usually alpha / R.
        dropout_p: the probability, in [0, 1), with which an element of x is dropped on the low-rank path,
            quantised to 2^-16. Pass 0 outside training.
        seed: one int64 on x's device that the mask is made from; drawn from torch's generator where not given.

    Returns y (..., N) in x's dtype. Under autocast everything but float64 is cast to autocast's dtype first, as in a
    linear layer. The mask is made again in backward, never stored. Gradients flow to x, lora_a, lora_b and bias.

    Raises ValueError where shapes, dtypes or devices do not fit, where weight requires grad or dropout_p is out of
    range, NotImplementedError where an explicit `backend` cannot serve.
    """
    _validate(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
    return apply_lora_linear(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)


def apply_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`lora_linear` for arguments that are known to fit: what patched layers call."""
    backend = backend or support.current_backend(lora_a)
    if x.is_cpu and seed is None and backend == "auto" and _is_small(x, weight, dropout_p):
        return _as_usual(x, weight, lora_a, lora_b, bias, scaling, dropout_p)
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype is not torch.float64:  # which autocast leaves as it is
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, lora_a, lora_b = (tensor.to(dtype) for tensor in (x, weight, lora_a, lora_b))
        bias = bias if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return apply_lora_linear(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
    threshold = reference.drop_threshold(dropout_p) if dropout_p else 0
    if threshold and seed is None:
        seed = eager.draw_seed(x.device)
    if support.runs_plainly(x):
        plan = _choose_plan(x, weight, lora_a, threshold, backend, measure=True)
        return _LoraLinear.apply(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan, False)
    if not torch.compiler.is_compiling() and support.in_transform():
        plan = support.choose_plan(x, backend)
        return _differentiable(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan)
    return torch.ops.peft_fast.lora_linear(
        x, weight, lora_a, lora_b, bias, as_tensor(scaling, x), threshold, seed, backend, CODE
    )


def _is_small(x: Tensor, weight: Tensor, dropout_p: float) -> bool:
    """Whether the usual torch calls are as fast on the CPU: each call of a function of ours costs it microseconds.

    A compiled graph is guarded by a size that is not fixed only with dropout, whose mask is an op of ours that no
    compiler fuses.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not support.is_ordinary(x):
        return False
    elements = x.numel()
    if dropout_p:
        return not support.gains_by_dropout(elements, support.MIN_CPU_DROPOUT_ELEMENTS)
    N, K = weight.shape
    small = elements * max(N, K) < support.MIN_CPU_ELEMENTS * K
    return statically_known_true(small) if compiling else small


def _as_usual(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """What peft's layer computes, to the bit, without the calls of its modules."""
    y = F.linear(x, weight, bias)
    h = x if x.dtype is lora_a.dtype else x.to(lora_a.dtype)
    if dropout_p:
        h = F.dropout(h, dropout_p)
    h = F.linear(F.linear(h, lora_a), lora_b)
    out = y + (h if scaling == 1 else h * scaling)
    return out if out.dtype is y.dtype else out.to(y.dtype)


def lora_linear_by(
    plan: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """`apply_lora_linear` by a plan of the kernels that is given: what is timed to choose one."""
    threshold = reference.drop_threshold(dropout_p) if dropout_p else 0
    return _LoraLinear.apply(x, weight, lora_a, lora_b, bias, scaling, threshold, seed, plan, False)

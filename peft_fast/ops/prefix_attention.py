"""The prefix attention op: validate, schema, launch, fake, autograd, public function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast import eager, reference, support
from peft_fast.eager import flash_attention as flash
from peft_fast.eager.prefix_attention import Options, empty_y, four_sizes, seen_keys
from peft_fast.ops import _shared
from peft_fast.ops._shared import CODE, LIBRARY, resolve

# The tensors of a call in the order of every schema.
INPUTS = ("query", "key", "value", "prefix_key", "prefix_value", "attn_mask", "gate")
_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? attn_mask, Tensor? gate"
)
_OPTIONS = "int threshold, Tensor? seed, bool is_causal, int? sliding_window, float? softcap, float scale"

# What blocks of rows attend to at most, of all keys: they copy y and the gradients, and make the joint keys twice,
# which is more beside a short call: on an Intel Emerald Rapids, 128 tokens with 0.81 of the keys took 1.04 to 1.07 of
# the usual call's time, with 0.60 of them 0.80. From so many logits on, a look at the mask, 0.1 ms, costs little beside
# the call.
MOST_ATTENDED, SHORT_MOST_ATTENDED = 0.85, 0.7
LOOK_LOGITS = 1 << 21

LIBRARY.define(f"prefix_attention({_TENSORS}, {_OPTIONS}, str backend, str code) -> Tensor")
LIBRARY.define(f"prefix_attention_fwd({_TENSORS}, {_OPTIONS}, str plan) -> Tensor[]")
LIBRARY.define(
    f"prefix_attention_bwd(Tensor dy, {_TENSORS}, {_OPTIONS}, Tensor[] saved, str[] needs, str plan) -> Tensor[]"
)
LIBRARY.define(f"attention_dropout_mask({_TENSORS}, {_OPTIONS}, str plan) -> Tensor")


def _validate(
    tensors: Any, sliding_window: int | None, softcap: float | None, dropout_p: float, seed: Tensor | None
) -> None:
    named = {name: tensor for name, tensor in zip(INPUTS, tensors, strict=True) if tensor is not None}
    query, key, prefix_key, mask = named["query"], named["key"], named["prefix_key"], named.get("attn_mask")

    def misfit(what: str) -> ValueError:
        expected = (
            "query (Z, H, S, DH), key and value (Z, H_KV, T, DH), prefix_key and prefix_value (H_KV, P, DH), "
            "P >= 1, H a multiple of H_KV, attn_mask broadcastable to (Z, H, S, T), gate (H,)"
        )
        return ValueError(_shared.misfit("prefix_attention", what, expected, named))

    for name, dims in (("query", 4), ("key", 4), ("value", 4), ("prefix_key", 3), ("prefix_value", 3)):
        if named[name].dim() != dims:
            raise misfit(name)
    (Z, H, S, DH), (_, H_KV, T, _), P = query.shape, key.shape, prefix_key.shape[1]
    if H_KV == 0 or H % H_KV or P == 0 or DH == 0:
        raise misfit("the number of heads" if H_KV == 0 or H % H_KV else "prefix_key" if P == 0 else "query")
    shapes = {"key": (Z, H_KV, T, DH), "value": (Z, H_KV, T, DH), "gate": (H,)}
    shapes |= {"prefix_key": (H_KV, P, DH), "prefix_value": (H_KV, P, DH)}
    for name, shape in shapes.items():
        if name in named and named[name].shape != shape:
            raise misfit(name)
    if mask is not None:
        sizes = (1,) * (4 - mask.dim()) + mask.shape
        if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, (Z, H, S, T), strict=True)):
            raise misfit("attn_mask")
    for name, tensor in named.items():
        if tensor.device != query.device:
            raise ValueError(
                f"prefix_attention: query is on {query.device} and {name} on {tensor.device}; move them together"
            )
        if tensor.dtype not in support.FLOATING and not (name == "attn_mask" and tensor.dtype == torch.bool):
            raise ValueError(f"prefix_attention: {name} has dtype {tensor.dtype}, expected a floating-point one")
        if name in ("key", "value") and tensor.dtype != query.dtype:
            raise ValueError(_shared.dtypes("prefix_attention", "query, key and value must have one dtype", named))
        if name in ("prefix_value", "gate") and tensor.dtype != prefix_key.dtype:
            raise ValueError(_shared.dtypes("prefix_attention", "prefix and gate must have one dtype", named))
    beside = prefix_key.dtype == torch.float32 and query.dtype != torch.float64
    if prefix_key.dtype != query.dtype and not beside:
        rule = "the prefix must have query's dtype, or float32 beside a 16-bit query"
        raise ValueError(_shared.dtypes("prefix_attention", rule, named))
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"prefix_attention: sliding_window must be at least 1, got {sliding_window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"prefix_attention: softcap must be above 0, got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"prefix_attention: dropout_p must lie in [0, 1), got {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != query.device):
        raise ValueError(
            f"prefix_attention: seed must be one int64 on {query.device}, got {tuple(seed.shape)} {seed.dtype} "
            f"on {seed.device}"
        )


def _choose_plan(tensors: Any, options: Options, backend: str) -> str:
    """ "eager", "split" (the kernels) or, which only "auto" takes, "flash": torch's fused attention for CPUs."""
    query, attn_mask = tensors[0], tensors[INPUTS.index("attn_mask")]
    plan = support.choose_plan(query, backend)
    reason = None
    if attn_mask is not None and attn_mask.requires_grad:
        reason = "attn_mask requires grad, which the Triton kernels do not give"
    elif query.shape[-1] > (most := support.MAX_KERNEL_HEAD_SIZE[query.element_size()]):
        reason = f"the head size {query.shape[-1]} is above {most} in {query.dtype}"
    if plan != "eager" and reason:
        if backend == "triton":
            raise NotImplementedError(f'backend("triton") cannot serve this call of prefix_attention: {reason}')
        return "eager"
    if plan == "eager" and backend == "auto" and flash.serves(tensors, options):
        return "flash"
    return plan


def _launch_fwd(tensors: Any, options: Options, plan: str, traced: bool = False) -> list[Tensor]:
    """y (Z, H, S, DH), and what the plan's backward wants beside the inputs."""
    if traced:
        return torch.ops.peft_fast.prefix_attention_fwd(*tensors, *options, plan)
    if plan == "eager":
        return [eager.attention_fwd(tensors, options)]
    if plan == "flash":
        return list(flash.attention_fwd(tensors, options))
    launch = _shared.kernels("prefix_attention").attention_fwd
    return list(launch(*resolve(*tensors), options.threshold, options.seed, **options.keywords()))


def _launch_bwd(
    dy: Tensor, tensors: Any, options: Options, saved: Any, needs: set[str], plan: str, traced: bool = False
) -> dict[str, Tensor]:
    """The gradients that `needs` names among INPUTS."""
    if traced:
        named = sorted(needs)
        grads = torch.ops.peft_fast.prefix_attention_bwd(dy, *tensors, *options, list(saved), named, plan)
        return dict(zip(named, grads, strict=True))
    if plan == "eager":
        return eager.attention_bwd(dy, tensors, options, needs)
    if plan == "flash":
        return flash.attention_bwd(dy, tensors, options, saved, needs)
    launch = _shared.kernels("prefix_attention").attention_bwd
    dy, *tensors = resolve(dy, *tensors)
    return launch(dy, *tensors, options.threshold, options.seed, *saved, **options.keywords(), needs=needs)


@torch.library.impl(LIBRARY, "prefix_attention_fwd", "CompositeExplicitAutograd")
@torch.no_grad()  # traces may keep recording here
def _fwd(*args):
    n = len(INPUTS)
    *options, plan = args[n:]
    return _launch_fwd(args[:n], Options(*options), plan)


@torch.library.impl(LIBRARY, "prefix_attention_bwd", "CompositeExplicitAutograd")
@torch.no_grad()  # traces may keep recording here
def _bwd(dy, *args):
    n = len(INPUTS)
    *options, saved, needs, plan = args[n:]
    grads = _launch_bwd(dy, args[:n], Options(*options), saved, set(needs), plan)
    if plan == "flash":  # of keys and values it gives parts of larger tensors
        grads = {name: torch.empty_like(args[INPUTS.index(name)]).copy_(grad) for name, grad in grads.items()}
    return [grads[name] for name in needs]


@torch.library.impl(LIBRARY, "attention_dropout_mask", "CompositeExplicitAutograd")
def _dropout_mask(*args):
    query, key, _, prefix_key, *_ = args
    n = len(INPUTS)
    *options, plan = args[n:]
    if plan == "eager":
        return eager.attention_dropout_mask(args[:n], Options(*options))
    shape = (*query.shape[:3], prefix_key.shape[1], key.shape[2])
    mask = _shared.kernels("prefix_attention").attention_dropout_mask
    return mask(options[1], shape, options[0])


@torch.library.register_fake("peft_fast::prefix_attention_fwd", lib=LIBRARY)
def _fake_fwd(query, key, value, prefix_key, prefix_value, attn_mask, gate, *args):
    if args[-1] == "eager":
        return [empty_y(query)]
    wide = torch.promote_types(query.dtype, torch.float32)
    if args[-1] == "flash":
        return [empty_y(query), query.new_empty(query.shape[:3], dtype=wide)]
    return [empty_y(query), query.new_empty(1 if gate is None else 3, *query.shape[:3], dtype=wide)]


@torch.library.register_fake("peft_fast::prefix_attention_bwd", lib=LIBRARY)
def _fake_bwd(dy, *args):
    tensors, (needs, plan) = dict(zip(INPUTS, args, strict=False)), args[-2:]
    if plan != "split":
        return [torch.empty_like(tensors[name]) for name in needs]
    # The kernels lay gradients out as they lay y out, those of the prefix densely, whatever the inputs' layout is.
    laid_out = dict.fromkeys(("query", "key", "value"), empty_y) | dict.fromkeys(
        ("prefix_key", "prefix_value"), lambda prefix: prefix.new_empty(prefix.shape)
    )
    return [laid_out.get(name, torch.empty_like)(tensors[name]) for name in needs]


@torch.library.register_fake("peft_fast::attention_dropout_mask", lib=LIBRARY)
def _fake_dropout_mask(query, key, value, prefix_key, *args):
    return query.new_empty(*query.shape[:3], prefix_key.shape[1] + key.shape[2], dtype=torch.bool)


class _PrefixAttention(torch.autograd.Function):
    """Saves the caller's own tensors and the seed, and but for the eager plan y and the log-sum-exp of its rows."""

    @staticmethod
    def forward(ctx, options, plan, traced, *tensors):
        y, *lse = _launch_fwd(tensors, options, plan, traced)
        ctx.needs = {name for name, need in zip(INPUTS, ctx.needs_input_grad[3:], strict=True) if need}
        ctx.save_for_backward(*tensors, options.seed, *([y, *lse] if lse else []))
        ctx.options, ctx.plan = options._replace(seed=None), plan
        return y

    @staticmethod
    def backward(ctx, dy):
        kept = _shared.saved_tensors(ctx, "prefix_attention")
        tensors, (seed, *saved) = kept[: len(INPUTS)], kept[len(INPUTS) :]
        options = ctx.options._replace(seed=seed)
        with _shared.without_autocast(dy.device.type):
            if torch.is_grad_enabled() or support.is_batched(dy):  # create_graph=True, is_grads_batched=True
                grads = _differentiable_bwd(ctx, dy, tensors, options)
            else:
                traced = not support.runs_plainly(dy)
                grads = _launch_bwd(dy, tensors, options, saved, ctx.needs, ctx.plan, traced)
        return None, None, None, *(grads.get(name) for name in INPUTS)


def _differentiable_bwd(ctx, dy, tensors, options):
    """The gradients of the reference, themselves differentiable."""
    create_graph = torch.is_grad_enabled()
    if not create_graph:
        tensors = [
            tensor.detach().requires_grad_(name in ctx.needs) if tensor is not None else None
            for name, tensor in zip(INPUTS, tensors, strict=True)
        ]
    else:
        # Nodes of their own: where one input is a function of another, the reference must not run on through its past.
        tensors = [tensor if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    with torch.enable_grad():
        y = _differentiable(tensors, options, ctx.plan)
    inputs = {name: tensor for name, tensor in zip(INPUTS, tensors, strict=True) if name in ctx.needs}
    grads = torch.autograd.grad(y, list(inputs.values()), dy, create_graph=create_graph)
    return dict(zip(inputs, grads, strict=True))


def _differentiable(tensors, options, plan):
    """The reference with the mask of `plan`: right under every transform of torch, fast under none."""
    keep_mask = None
    if options.threshold:
        with torch.no_grad():
            keep_mask = torch.ops.peft_fast.attention_dropout_mask(*tensors, *options, plan)
    *attended, attn_mask, gate = tensors
    return reference.prefix_attention(
        *attended,
        attn_mask=attn_mask,
        gate=gate,
        dropout_p=options.threshold / reference.DROPOUT_LEVELS,
        keep_mask=keep_mask,
        **options.keywords(),
    )


@torch.library.impl(LIBRARY, "prefix_attention", "Autograd")
def _autograd(*args):
    n = len(INPUTS)
    *values, backend, _ = args[n:]
    options = Options(*values)
    plan = _choose_plan(args[:n], options, backend)
    if support.in_transform():  # one inside of what is being compiled
        return _differentiable(args[:n], options, plan)
    return _PrefixAttention.apply(options, plan, True, *args[:n])


@torch.library.impl(LIBRARY, "prefix_attention", "CompositeExplicitAutograd")
def _inference(*args):
    n = len(INPUTS)
    *values, backend, _ = args[n:]
    options = Options(*values)
    return _launch_fwd(args[:n], options, _choose_plan(args[:n], options, backend))[0]


@torch.library.register_fake("peft_fast::prefix_attention", lib=LIBRARY)
def _fake(query, *args):
    return empty_y(query)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = drop(softmax(scale · q [Kp; K]ᵀ + mask)) [Vp; V], attention over a prefix (Li & Liang 2021, section 4.3).

    Args:
        query: (Z, H, S, DH), of float64, float32, float16 or bfloat16.
        key, value: (Z, H_KV, T, DH), query's dtype; H a multiple of H_KV, query head h reads kv head h // (H / H_KV).
        prefix_key, prefix_value: (H_KV, P, DH), P >= 1, the same for every sequence of the batch, seen by every
            query; query's dtype, or float32 beside 16 bits, which is rounded to query's dtype before it is multiplied.
        attn_mask: broadcastable to (Z, H, S, T): bool, True where a query may attend, or added to the logits. It
            concerns the sequence alone, and gets a gradient where it requires one.
        is_causal: query i sees key j of the sequence where j <= i + T - S.
        scale: of the logits, DH^-0.5 where not given.
        sliding_window: and where j > i + T - S - sliding_window.
        softcap: c, logits are c · tanh(logits / c).
        gate: (H,), prefix_key's dtype. Prefix and sequence then have a softmax each, and the prefix's is multiplied by
            the gate (Zhang et al. 2023, LLaMA-Adapter, equation 4); 0 leaves attention as it is without a prefix.
        dropout_p: the probability, in [0, 1), with which a weight of the softmax is dropped, quantised to 2^-16. Pass
            0 outside training.
        seed: one int64 on query's device that the mask is made from; drawn from torch's generator where not given.

    Returns y (Z, H, S, DH) in query's dtype, a transposed (Z, S, H, DH). Under autocast query, key and value are cast
    to autocast's dtype first. Neither logits nor masks of dropout are kept for backward, nor copies of the prefix;
    but torch's own attention runs where it is as fast, in small calls and often on the CPU, and keeps what it keeps;
    its fused kernels have no second derivatives, which `backend("eager")` has everywhere.

    Raises ValueError where shapes, dtypes or devices do not fit or a number is out of range, NotImplementedError where
    an explicit `backend` cannot serve.
    """
    options = (is_causal, scale, sliding_window, softcap, dropout_p, seed)
    tensors = (query, key, value, prefix_key, prefix_value, attn_mask, gate)
    return apply_prefix_attention(tensors, *options, support.current_backend(prefix_key))


def apply_prefix_attention(
    tensors: tuple[Any, ...],
    is_causal: bool,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    """`prefix_attention` by a backend that the caller has asked for, since only it knows what stays the same."""
    query, key, value, prefix_key, prefix_value, attn_mask, gate = tensors
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(query.device.type):
        if query.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if prefix_key.dtype not in (dtype, torch.float32):
                prefix_key, prefix_value = prefix_key.to(dtype), prefix_value.to(dtype)
                gate = None if gate is None else gate.to(dtype)
        tensors = (query, key, value, prefix_key, prefix_value, attn_mask, gate)
        with torch.autocast(query.device.type, enabled=False):
            return apply_prefix_attention(tensors, is_causal, scale, sliding_window, softcap, dropout_p, seed, backend)
    _validate(tensors, sliding_window, softcap, dropout_p, seed)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    plain = backend == "auto" and seed is None and gate is None and softcap is None
    if attn_mask is not None:  # torch's own attention would round a wider one
        plain = plain and torch.promote_types(attn_mask.dtype, query.dtype) is query.dtype
    if (
        plain
        and (
            _is_small(query, key, prefix_key, dropout_p)
            or (
                query.is_cpu
                and not dropout_p
                and _leaves_nothing_out(
                    query, key, prefix_key.shape[1], attn_mask, is_causal or sliding_window is not None
                )
            )
        )
        and (torch.compiler.is_compiling() or not support.in_transform())
    ):
        restricts = (is_causal and query.shape[2] > 1, sliding_window)
        return _as_usual(query, key, value, prefix_key, prefix_value, attn_mask, *restricts, scale, dropout_p)
    threshold = reference.drop_threshold(dropout_p) if dropout_p else 0
    if threshold and seed is None:
        seed = eager.draw_seed(query.device)
    options = Options(threshold, seed if threshold else None, is_causal, sliding_window, softcap, scale)
    if support.runs_plainly(query):
        return _PrefixAttention.apply(options, _choose_plan(tensors, options, backend), False, *tensors)
    if not torch.compiler.is_compiling() and support.in_transform():
        return _differentiable(tensors, options, _choose_plan(tensors, options, backend))
    return torch.ops.peft_fast.prefix_attention(*tensors, *options, backend, CODE)


def _is_small(query: Tensor, key: Tensor, prefix_key: Tensor, dropout_p: float) -> bool:
    """Whether torch's own attention over copies is as fast: each call costs the host microseconds."""
    logits = query.shape[:3].numel() * (prefix_key.shape[1] + key.shape[2])
    if not query.is_cpu:
        # Copies of a long cache for each new token are no small matter.
        few = query.numel() < support.MIN_GPU_ELEMENTS and key.numel() <= max(query.numel(), 1 << 20)
        return query.is_cuda and few and logits < support.MIN_GPU_ATTENTION_LOGITS
    return logits * (4 if dropout_p else 1) < support.MIN_CPU_ATTENTION_LOGITS


def _leaves_nothing_out(query: Tensor, key: Tensor, P: int, attn_mask: Tensor | None, restricted: bool) -> bool:
    """Whether blocks of rows would gain nothing, as far as a look at the first and the last row tells.

    Keys that can be left out are how ours gets ahead of torch's fused attention on the CPU.
    """
    (Z, H, S, _), T = query.shape, key.shape[2]
    is_short = flash.block_count(query, key) == 1
    if is_short and Z * H * S * (P + T) < LOOK_LOGITS:
        return True
    if restricted:
        return is_short
    mask = None if attn_mask is None else four_sizes(attn_mask)
    if mask is None:
        return True
    if not support.is_ordinary(query):
        return is_short or mask.shape[2] == 1 or mask.stride(2) == 0
    seen = seen_keys(mask[:, :, [0, -1]], T)
    if seen is None or seen.rows is not None:
        return is_short
    groups = flash.sequence_groups(query, T, seen)
    attended = sum((batch.stop - batch.start) * (P + keys.stop - keys.start) for batch, keys in groups)
    return attended > (SHORT_MOST_ATTENDED if is_short else MOST_ATTENDED) * Z * (P + T)


def _as_usual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    sliding_window: int | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The prefix copied in front of every sequence, and torch's own attention."""
    Z, H, S, _ = query.shape
    P, T, mask = prefix_key.shape[1], key.shape[2], attn_mask
    if is_causal or sliding_window is not None:
        distance = torch.arange(T - S, T, device=query.device)[:, None] - torch.arange(T, device=query.device)
        seen = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
        if sliding_window is not None:
            seen = seen & (distance < sliding_window)
        if mask is None:
            mask = seen
        else:
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], T) if mask.dim() > 1 else mask.expand(1, T)
        mask = F.pad(mask, (P, 0), value=mask.dtype == torch.bool)
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    keys, values = (
        torch.cat([prefix.expand(Z, -1, -1, -1).to(query.dtype), own], dim=2)  # its gradient is summed in its dtype
        for prefix, own in ((prefix_key, key), (prefix_value, value))
    )
    grouped = bool(key.shape[1] != H)  # of symbols, torch takes no other
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=grouped
    )

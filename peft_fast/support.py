"""May this call be fused? Yes, with which plan, or no, and the reason why not."""

import functools
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.modules.module as _module
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from peft_fast import tuning
from peft_fast.eager import dropout_native
from peft_fast.eager.dropout import draws_one_by_one
from peft_fast.reference import drop_threshold

PLAIN_TENSORS = (Tensor, nn.Parameter)
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "triton", "eager")

# Below this many elements of the larger activation a GPU waits for the host, and our launches take it longer than
# torch's calls: on an H100, at 2^23 an adapter's kernels ran 0.85 of the usual modules' time and its step took twice as
# long. For LoRA it holds where no measurement of the call's shape does (`tuning`).
MIN_GPU_ELEMENTS = 1 << 24

# Below this many elements of the larger activation, a LoRA layer without dropout saves the CPU less than a function of
# ours costs.
MIN_CPU_ELEMENTS = 1 << 17

# Below this many elements of x, a LoRA layer with dropout saves the CPU less than a function of ours costs.
MIN_CPU_DROPOUT_ELEMENTS = 1 << 15

# The same for a dropout module, which has no matmul beside it, and for the weights of an attention.
MIN_CPU_MODULE_ELEMENTS = 1 << 14

# The same for all of these where numpy draws the masks, having no C compiler.
MIN_CPU_NUMPY_ELEMENTS = 1 << 16

# Below this many elements of x the usual torch calls are as fast as the bottleneck adapter's own function.
MIN_CPU_ADAPTER_ELEMENTS = 1 << 17

# Below this many logits, copies of the prefix and torch's fused attention cost less than the calls of a function of
# ours; a quarter of it with dropout, which torch's fused attention does not serve.
MIN_CPU_ATTENTION_LOGITS = 1 << 20

# The same on a GPU: on an H100 torch's way was faster with 2^26 logits, causal or not, and with 2^28 ours, if causal.
MIN_GPU_ATTENTION_LOGITS = 1 << 27

# The widest heads that the kernels serve, by bytes of an element: wider ones do not fit registers, and fp32 heads of
# 256 with a cap, or in TF32, not the shared memory of compute capability 8.6, 8.9 and 12.x either, nor does backward
# with fp64 heads of 128.
MAX_KERNEL_HEAD_SIZE = {2: 256, 4: 128, 8: 64}

# The attribute of a patched layer that says why its last call ran stock; `unpatch` removes it.
STOCK_CALL = "_peft_fast_stock_call"
_GLOBAL_HOOKS = "global module hooks are registered"

_backend = "auto"


_choices: list[list[str]] = []  # of the `with` blocks that are open, the newest last
_forwards: WeakIdKeyDictionary = WeakIdKeyDictionary()  # owner -> the choice of its last forward, once one was made


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose what computes the ops called inside the `with`: "auto", "triton" or "eager".

    "auto" takes Triton on CUDA devices of compute capability 8.0 and above and torch calls elsewhere. An explicit
    choice never falls back: where it cannot serve, the op raises NotImplementedError. It holds for every thread of
    the process. Backward keeps the choice of forward, wherever it runs, and so does a forward that gradient
    checkpointing repeats in backward.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    choice = [name]
    _choices.append(choice)
    _backend = name
    try:
        yield
    finally:
        _choices[:] = [other for other in _choices if other is not choice]
        _backend = _choices[-1][0] if _choices else "auto"


def current_backend(owner: Any) -> str:
    """The backend for a call: that of its owner's last forward where one is repeated inside backward.

    The owner is the module that calls or a parameter, something that is still the same when the call is repeated.
    """
    if torch.compiler.is_compiling() or (not _choices and not _forwards):
        return _backend
    if torch._C._current_graph_task_id() != -1:
        return _forwards.get(owner, _backend)
    _forwards[owner] = _backend
    return _backend


def choose_plan(x: Tensor, backend: str) -> str:
    """The plan of a call on x: "eager" (torch calls) or "split" (Triton beside the vendor's matmul).

    For LoRA on a GPU a measurement of the shape may put another plan of the kernels in its place (`tuning`). Raises
    NotImplementedError where an explicit backend cannot serve.
    """
    if x.is_cpu and backend != "triton":
        return "eager"
    if backend == "eager" or (backend == "auto" and not _runs_triton(x.device)):
        return "eager"
    if backend == "triton" and not _runs_triton(x.device) and not _interprets_triton():
        raise NotImplementedError(
            f'backend("triton") cannot serve a tensor on {x.device}: it needs Triton and a CUDA device of compute '
            "capability 8.0 or above, or TRITON_INTERPRET=1 set before Triton is imported"
        )
    return "split"


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and _HAS_TRITON
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a stand-in for it, without a specification
        return False


_HAS_TRITON = _find_triton()  # once, at import: torch 2.11 cannot trace the question


def _interprets_triton() -> bool:
    if not _HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def runs_plainly(x: Tensor) -> bool:
    """Whether nothing watches or transforms torch calls, so that an autograd Function may be called directly.

    `is_compiling` alone does not tell: it is False under `FakeTensorMode` and `make_fx`.
    """
    return is_ordinary(x) and torch._C._len_torch_dispatch_stack() == 0 and not is_batched(x)


def is_ordinary(x: Tensor) -> bool:
    """Whether nothing compiles or transforms torch calls on x, whoever watches them.

    What depends on it is the same in a forward and in its repetition by checkpointing, which nobody may watch.
    """
    return not torch.compiler.is_compiling() and type(x) in PLAIN_TENSORS and not in_transform()


def in_transform() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether x stands for a batch, as `torch.autograd.grad(..., is_grads_batched=True)` makes dy do."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def wraps(forward: Any, ours: Any) -> bool:
    """Whether a `forward` that is set on an instance ends in `ours`, as the wrappers of accelerate do."""
    inner = inspect.unwrap(forward)
    return getattr(inner, "__func__", inner) is ours


# What `fusable_lora` returns where a call may be fused: base weight (N, K), lora_a, lora_b, bias, scaling, dropout_p.
LoraCall = tuple[Tensor, Tensor, Tensor, Tensor | None, float, float]


def fusable_lora(layer: lora.Linear, x: Tensor | None = None) -> LoraCall | str:
    """The arguments of `lora_linear` for a call of a peft LoRA layer on x, or the reason why stock peft must run.

    Without x, only what the layer itself tells is looked at; what x tells begins with "last call". Asked at every
    call, so every line is cheap: modules are read from the dictionaries in which `nn.Module` keeps them.
    """
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "adapters are merged"
    modules = layer._modules
    layers_a, active = modules["lora_A"]._modules, layer._active_adapter
    if not isinstance(active, str):
        present = [name for name in active if name in layers_a]
        if len(present) != 1:
            return f"{len(present)} adapters are active"
        active = present[0]
    elif active not in layers_a:
        return "0 adapters are active"
    if active in layer.lora_variant:
        return f"the variant {type(layer.lora_variant[active]).__name__} is not fused"
    base, lora_a, lora_b = modules["base_layer"], layers_a[active], modules["lora_B"]._modules[active]
    dropout = modules["lora_dropout"]._modules[active]
    if type(base) not in (nn.Linear, Conv1D):
        return f"the base layer is {type(base).__name__}, not Linear or Conv1D"
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"lora_A and lora_B are {type(lora_a).__name__} and {type(lora_b).__name__}, not Linear"
    if type(dropout) is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    elif type(dropout) is nn.Identity:
        dropout_p = 0.0
    else:
        return f"the dropout is {type(dropout).__name__}, not Dropout"
    for module in (base, lora_a, lora_b, dropout):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{type(module).__name__} inside the layer has hooks"
        if "forward" in module.__dict__:
            return f"forward is set on the instance of {type(module).__name__} inside the layer"
    if _has_global_hooks(layer):
        return _GLOBAL_HOOKS
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    a, b, b_bias = (
        lora_a._parameters.get("weight"),
        lora_b._parameters.get("weight"),
        lora_b._parameters.get("bias"),
    )
    if weight is None:  # a replica of `nn.DataParallel` has tensors among its attributes
        weight, bias = base.__dict__.get("weight"), base.__dict__.get("bias")
        a, b, b_bias = lora_a.__dict__.get("weight"), lora_b.__dict__.get("weight"), lora_b.__dict__.get("bias")
    if b_bias is not None:
        return "lora_bias is not fused"
    for tensor in (weight, a, b, weight if bias is None else bias):
        if type(tensor) not in PLAIN_TENSORS:
            reason = f"a parameter is {type(tensor).__name__}, not a plain Parameter"
            if type(tensor).__name__ != "DTensor":
                return reason
            if x is not None:  # FSDP2's are plain ones while the layer runs
                return f"last call: {reason}"
    if weight.requires_grad:
        return "the base weight requires grad"
    if dropout_p >= 1.0:
        return "dropout drops everything"
    backend = current_backend(a)
    dtype, factor_dtype = weight.dtype, a.dtype
    if b.dtype is not factor_dtype or dtype not in FLOATING or factor_dtype not in FLOATING:
        return f"the dtypes {dtype}, {factor_dtype} and {b.dtype} are not fused"
    if weight.is_cpu:
        if not (a.is_cpu and b.is_cpu):
            return "base layer and adapter are on different devices"
    elif reason := _why_not_on_device(weight, a, b, backend):
        return reason
    scaling = layer.scaling[active]
    if not isinstance(scaling, (float, int)):
        return f"the scaling is a {type(scaling).__name__}, not a number"
    matrix = weight.t() if type(base) is Conv1D else weight
    if x is not None and (reason := _why_not_input(layer, x, matrix, a, dropout_p, backend)):
        return f"last call: {reason}"
    return matrix, a, b, bias, scaling, dropout_p


def _why_not_on_device(weight: Tensor, a: Tensor, b: Tensor, backend: str) -> str | None:
    device = weight.device
    if a.device != device or b.device != device:
        return "base layer and adapter are on different devices"
    if backend == "auto" and not _runs_triton(device):
        return f"no Triton kernels for {device}"
    return None


def _why_not_input(
    layer: lora.Linear, x: Tensor, weight: Tensor, lora_a: Tensor, dropout_p: float, backend: str
) -> str | None:
    if type(x) not in PLAIN_TENSORS and not torch.compiler.is_compiling():
        return f"the input is {type(x).__name__}, not a plain Tensor"
    if x.is_nested or x.layout is not torch.strided:
        return "the input is not a dense tensor"
    if not torch.compiler.is_compiling() and x.is_inference() and torch.is_grad_enabled():
        return "the input was made in inference mode and cannot be saved"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch.compiler.is_compiling() and torch.compiler.is_exporting():
        return "torch.export is tracing"
    dtype, factor_dtype, shape = x.dtype, lora_a.dtype, x.shape
    if dtype not in FLOATING or not shape or weight.dim() != 2 or shape[-1] != weight.shape[1]:
        return "the input does not fit the layer"
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if autocast:
        if torch.float64 in (dtype, weight.dtype, factor_dtype):
            return "float64 under autocast"
    elif weight.dtype is not dtype:
        return f"the input is {dtype}, the base weight {weight.dtype}"
    elif factor_dtype is not dtype and (factor_dtype is not torch.float32 or dtype is torch.float64):
        return f"the input is {dtype}, the adapter {factor_dtype}"
    if factor_dtype is not dtype and not layer.cast_input_dtype_enabled:
        return "casting of the input is switched off"
    if x.is_cpu and weight.is_cpu:
        meets = torch.get_autocast_dtype("cpu") if autocast else factor_dtype
        if meets is torch.bfloat16 and not dropout_p and backend == "auto":
            return "bfloat16 factors without dropout gain nothing on the CPU"
        return None
    if x.device != weight.device:
        return f"the input is on {x.device}, the layer on {weight.device}"
    if backend != "auto":
        return None
    # Stock's calls are measured as they are, one by one: compiled, or with autocast's casts between them, they take
    # another time.
    if not autocast and runs_plainly(x):
        stock = tuning.choose(x, weight, lora_a, dropout_p > 0, measure=True).stock
        if stock is not None:
            return "stock is faster at this shape on this device" if stock else None
    if shape[:-1].numel() * max(weight.shape) < MIN_GPU_ELEMENTS:
        return f"too small to gain on this device, which takes activations of {MIN_GPU_ELEMENTS} elements"
    return None


def gains_by_dropout(elements: int, least: int) -> bool:
    """Whether the CPU gains where so many elements are dropped, `least` being the fewest by compiled C."""
    if elements < least:
        return False
    return elements >= MIN_CPU_NUMPY_ELEMENTS or torch.compiler.is_compiling() or dropout_native.library() is not None


def fusable_dropout(module: nn.Dropout, x: Tensor) -> int:
    """How many of 2^16 values drop an element of x, where a call of a dropout module gains by `ops.dropout`; else 0.

    The answer must not depend on who watches the call: where checkpointing repeats one, nobody may.
    """
    served = (
        module.training
        and 0 < module.p < 1
        and not module.inplace
        and type(x) in PLAIN_TENSORS
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_nested
        and x.dtype in FLOATING
    )
    if not served:
        return 0
    if torch.compiler.is_compiling():
        return 0 if torch.compiler.is_exporting() else drop_threshold(module.p)
    fusable = (
        torch._C._get_tracing_state() is None
        and not in_transform()
        and gains_by_dropout(x.numel(), MIN_CPU_MODULE_ELEMENTS)
        and draws_one_by_one()
    )
    return drop_threshold(module.p) if fusable else 0


def fusable_attention_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool
) -> int:
    """How many of 2^16 values drop a probability, where attention gains by `ops.attention_dropout`; else 0.

    As with `fusable_dropout`, who watches the call must not count.
    """
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    served = (
        0 < dropout_p < 1
        and all(type(tensor) in PLAIN_TENSORS and tensor.is_cpu and not tensor.is_nested for tensor in tensors)
        and query.dtype in (torch.float32, torch.float64)
        and query.dtype is key.dtype is value.dtype
        and not torch.is_autocast_enabled("cpu")
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3]
        and key.shape == value.shape
        and (query.shape[2] == key.shape[2] or not is_causal)
        and (mask is None or (mask.dtype is torch.bool and mask.dim() == 4))
    )
    if not served:
        return 0
    if torch.compiler.is_compiling():
        return 0 if torch.compiler.is_exporting() else drop_threshold(dropout_p)
    fusable = (
        torch._C._get_tracing_state() is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
        and not in_transform()
        and gains_by_dropout(query.shape[:3].numel() * key.shape[2], MIN_CPU_MODULE_ELEMENTS)
        and draws_one_by_one()
    )
    if not fusable or (mask is not None and not bool(mask.any(-1).all())):  # of a query that sees no key torch makes 0
        return 0
    return drop_threshold(dropout_p)


def _has_global_hooks(layer: nn.Module) -> bool:
    """Whether global module hooks are there, or were at the forward that checkpointing repeats inside backward."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return layer.__dict__.get(STOCK_CALL) == _GLOBAL_HOOKS
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )

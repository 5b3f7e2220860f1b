"""What is counted: a layer or a model, forward and backward, stock and ours, on any device (the meta device too)."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

from benchmarks._counting import Launch, as_on_gpu, count, saved_bytes
from benchmarks._inductor import compiled_launches
from benchmarks.bench_prefix_attention import peft_way
from benchmarks.formulas import count_for
from peft_fast.kernels._launch import recording
from peft_fast.ops import bottleneck_adapter, prefix_attention
from peft_fast.ops.lora_linear import apply_lora_linear


@dataclass
class Variant:
    """One way to compute a step: the gradients of `forward()` for `inputs`; ours by `plan`."""

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    dy: Tensor
    plan: str | None = None
    parameters: list[Tensor] = field(default_factory=list)
    replaced: Callable[[], Any] = contextlib.nullcontext

    @property
    def counted_by(self) -> str:
        return "aten calls" if self.plan is None else "closed form"

    def step(self) -> None:
        torch.autograd.grad(self.forward(), self.inputs, self.dy)

    def launches(self, target: GPUTarget) -> list[Launch]:
        with self.replaced():
            return count(self.step) if self.plan is None else count_for(target, self.step, plan=self.plan)

    def saved(self, target: GPUTarget) -> int:
        """Bytes kept for backward, parameters apart."""
        with self.replaced(), as_on_gpu(self.plan), recording(target):
            return saved_bytes(self.forward, self.parameters)


@dataclass
class Compiled:
    """Stock calls as torch.compile would run them; see `compiled_launches` of what `make` gives."""

    make: Callable[[], tuple[Callable[..., Tensor], list[Tensor], Tensor]]
    plan = None
    counted_by = "Inductor's schedule"

    @functools.cached_property
    def _launches(self) -> list[Launch]:
        return compiled_launches(self.make)

    def launches(self, target: GPUTarget) -> list[Launch]:
        return self._launches

    def saved(self, target: GPUTarget) -> None:
        return None


def tensor(*shape: int, dtype: torch.dtype, device: str = "meta", grad: bool = True) -> Tensor:
    if device == "meta" or not dtype.is_floating_point:
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=grad and dtype.is_floating_point)
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_(grad)


class _OneLinear(nn.Module):
    def __init__(self, K: int, N: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N, bias=bias, dtype=dtype, device="meta")


def lora(
    M: int,
    K: int,
    N: int,
    R: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    factors: torch.dtype = torch.float32,
    dropout: float = 0.0,
    bias: bool = False,
    device: str = "meta",
) -> dict[str, Variant | Compiled]:
    """A LoRA layer; `bias` is trained. `floor` is the frozen layer alone. Stock, real peft, only on the meta device."""

    def make(*shape: int, grad: bool = True, of: torch.dtype = dtype) -> Tensor:
        return tensor(*shape, dtype=of, device=device, grad=grad)

    x, dy, weight = make(M, K), make(M, N, grad=False), make(N, K, grad=False)
    lora_a, lora_b, vector = make(R, K, of=factors), make(N, R, of=factors), make(N) if bias else None
    trained = [lora_a, lora_b, *([vector] if bias else [])]

    def ours() -> Tensor:
        return apply_lora_linear(x, weight, lora_a, lora_b, vector, 2.0, dropout)

    variants = {plan: Variant(ours, [x, *trained], dy, plan, [weight, *trained]) for plan in ("fused", "split")}
    if device != "meta":
        return variants
    config = LoraConfig(
        r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=["linear"], bias="lora_only" if bias else "none"
    )
    layer = get_peft_model(_OneLinear(K, N, bias, dtype), config).train().base_model.model.linear.to("meta")
    layer.lora_A.to(factors)
    layer.lora_B.to(factors)
    own = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    floor = layer.base_layer
    frozen = [x, *([floor.bias] if bias else [])]

    def compiled() -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
        fake = [
            torch.empty(shape, dtype=of, requires_grad=True)
            for shape, of in (((M, K), dtype), ((R, K), factors), ((N, R), factors))
        ]
        weight = fake[0].new_empty(N, K)

        def stock(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
            low = F.linear(F.linear(F.dropout(x.to(factors), dropout), lora_a), lora_b)
            return (F.linear(x, weight) + low * 2.0).to(dtype)

        return stock, fake, fake[0].new_empty(M, N)

    return {
        "floor": Variant(lambda: floor(x), frozen, dy, parameters=list(floor.parameters())),
        "stock": Variant(lambda: layer(x), [x, *own], dy, parameters=list(layer.parameters())),
        "stock compiled": Compiled(compiled),
    } | variants


def usual_adapter(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "relu",
    scaling: Any = 1.0,
    residual: Tensor,
    dropout_p: float = 0.0,
    **norms: Any,
) -> Tensor:
    """The adapter from the modules it is usually made of; in the dtype of x, as in a model cast as a whole."""
    assert activation == "relu"
    assert not any(isinstance(option, tuple) for option in norms.values())
    y = F.linear(F.relu(F.linear(x, down_weight, down_bias)), up_weight, up_bias)
    y = F.dropout(y, dropout_p)
    return residual + (y if scaling == 1.0 else y * scaling)


def adapter(
    M: int,
    K: int,
    R: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    parameters: torch.dtype = torch.bfloat16,
    dropout: float = 0.0,
    device: str = "meta",
) -> dict[str, Variant | Compiled]:
    """A bottleneck adapter with its input as residual, ReLU, no LayerNorm."""
    x, dy = tensor(M, K, dtype=dtype, device=device), tensor(M, K, dtype=dtype, device=device, grad=False)
    shapes = {"down_weight": (R, K), "up_weight": (K, R), "down_bias": (R,), "up_bias": (K,)}
    own = {name: tensor(*shape, dtype=parameters, device=device) for name, shape in shapes.items()}

    def step(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(x, **own, residual=x, dropout_p=dropout)

    def compiled() -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
        fake = [torch.empty((M, K), dtype=dtype, requires_grad=True)]
        fake += [torch.empty(shape, dtype=parameters, requires_grad=True) for shape in shapes.values()]

        def usual(x: Tensor, *own: Tensor) -> Tensor:
            return usual_adapter(x, **dict(zip(shapes, own, strict=True)), residual=x, dropout_p=dropout)

        return usual, fake, torch.empty((M, K), dtype=dtype)

    inputs = [x, *own.values()]
    return {
        "usual": Variant(step(usual_adapter), inputs, dy, parameters=list(own.values())),
        "usual compiled": Compiled(compiled),
        "ours": Variant(step(bottleneck_adapter), inputs, dy, "split", list(own.values())),
    }


def copied_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """peft's way: the prefix is expanded, and keys and values are concatenated behind it; a dense mask where causal.

    That mask is made once a model, so that making it is not counted here.
    """
    assert not any(option is not None for option in others.values())
    Z, _, S, _ = query.shape
    mask = query.new_empty(Z, 1, S, prefix_key.shape[1] + S, dtype=torch.bool) if is_causal else None
    attend = mock.patch.object(F, "scaled_dot_product_attention", _with(dropout_p=dropout_p, scale=scale))
    with attend:
        return peft_way((query, key, value, prefix_key, prefix_value), mask)


def _with(**options: Any) -> Callable[..., Tensor]:
    attention = F.scaled_dot_product_attention
    return lambda *args, **kwargs: attention(*args, **kwargs, **options)


def prefix(
    Z: int,
    H: int,
    H_KV: int,
    S: int,
    P: int,
    DH: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    parameters: torch.dtype = torch.bfloat16,
    causal: bool = False,
    dropout: float = 0.0,
    device: str = "meta",
) -> dict[str, Variant]:
    """Attention over a prefix."""

    def heads(n: int, grad: bool = True) -> Tensor:
        rows = tensor(Z, S, n, DH, dtype=dtype, device=device, grad=False).transpose(1, 2)
        return rows.requires_grad_(grad)

    own = [tensor(H_KV, P, DH, dtype=parameters, device=device) for _ in range(2)]
    inputs, dy = [heads(H), heads(H_KV), heads(H_KV), *own], heads(H, grad=False)

    def step(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*inputs, is_causal=causal, dropout_p=dropout)

    return {
        "peft's way": Variant(step(copied_prefix_attention), inputs, dy, parameters=own),
        "ours": Variant(step(prefix_attention), inputs, dy, "split", own),
    }


def _usual_adapter_op(
    x: Tensor,
    residual: Tensor,
    parameters: list[Tensor | None],
    scaling: Any,
    activation: str,
    dropout_p: float,
    *others: Any,
) -> Tensor:
    down_weight, down_bias, up_weight, up_bias, *norms = parameters
    assert not any(parameter is not None for parameter in norms)
    assert down_weight is not None
    assert up_weight is not None
    biases = {"down_bias": down_bias, "up_bias": up_bias}
    options = {"activation": activation, "scaling": scaling, "residual": residual, "dropout_p": dropout_p}
    return usual_adapter(x, down_weight, up_weight, **biases, **options)


def _copied_prefix_op(
    tensors: tuple[Any, ...],
    is_causal: bool,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    dropout_p: float,
    *others: Any,
) -> Tensor:
    *inputs, attn_mask, gate = tensors
    rest = {"attn_mask": attn_mask, "gate": gate, "sliding_window": sliding_window, "softcap": softcap}
    return copied_prefix_attention(*inputs, is_causal=is_causal, scale=scale, dropout_p=dropout_p, **rest)


@contextlib.contextmanager
def stock_ops() -> Iterator[None]:
    """The usual calls in place of our ops in the methods that are ours."""
    with (
        mock.patch("peft_fast.methods.bottleneck.apply_bottleneck_adapter", _usual_adapter_op),
        mock.patch("peft_fast.methods.prefix_interface.apply_prefix_attention", _copied_prefix_op),
    ):
        yield

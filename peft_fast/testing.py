"""What the tests of this package, and of code built on it, share: input factories and the one error budget."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, truth: Tensor, eager: Tensor, *, length: int, name: str = "result") -> None:
    """Hold `actual` to the error budget that eager torch's own error sets.

    Args:
        actual: what the op under test gave.
        truth: `reference` in float64 on the same inputs.
        eager: `reference` in the dtypes under test.
        length: the length L of the longest reduction behind one element, for the float64 bound.
        name: what the message calls `actual`.

    The budget is `error_budget`. The result must be finite, of eager's shape and dtype.
    """
    assert actual.shape == eager.shape == truth.shape, (
        f"{name}: shape {tuple(actual.shape)}, eager's is {tuple(eager.shape)}, the truth's {tuple(truth.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager's is {eager.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error, budget = largest_error(actual, truth), error_budget(truth, eager, length)
    assert error <= budget, (
        f"{name}: error {error:.3e} exceeds the budget {budget:.3e} (largest value {truth.abs().max().item():.3e})"
    )


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """max|y - y64|."""
    return (actual.double() - truth.double()).abs().max().item()


def error_budget(truth: Tensor, eager: Tensor, length: int = 1) -> float:
    """The error that is allowed where the truth is y64 and eager torch gives y_eager.

    fp32, fp16, bf16: max|y - y64| <= 2 (max|y_eager - y64| + eps max|y64|).
    float64: max|y - y64| <= 4 eps sqrt(L) max|y64|.
    """
    eps, scale = torch.finfo(eager.dtype).eps, truth.abs().max().item()
    if eager.dtype == torch.float64:
        return 4 * eps * math.sqrt(length) * scale
    return 2 * (largest_error(eager, truth) + eps * scale)


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd holds from `forward()` to its backward, each storage once, those of `known` not counted."""
    others = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result  # it kept every saved tensor alive, so that no two of them shared an address
    return sum(saved.values())


@dataclass
class LoraLinearInputs:
    """Tensors for one call of `lora_linear` and the gradient `dy` that flows into it."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scaling: float
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "LoraLinearInputs":
        """The same values in another dtype, detached."""
        tensors: dict[str, Any] = {
            name: None if value is None else value.detach().to(dtype)
            for name, value in vars(self).items()
            if name != "scaling"
        }
        return LoraLinearInputs(scaling=self.scaling, **tensors)


def lora_linear_inputs(
    M: int,
    K: int,
    N: int,
    R: int,
    *,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    scaling: float = 2.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> LoraLinearInputs:
    """Random inputs whose low-rank term is about as large as the base product, so that neither hides the other.

    x (M, K), weight (N, K), bias (N,) and dy (M, N) have `dtype`; lora_a (R, K) and lora_b (N, R) have
    `factor_dtype`, `dtype` where it is not given. The values depend on `seed` alone, not on the device.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
        return values.to(device=device, dtype=dtype)

    factor_dtype = factor_dtype or dtype
    return LoraLinearInputs(
        x=normal(M, K),
        weight=normal(N, K, std=K**-0.5),
        lora_a=normal(R, K, std=K**-0.5, dtype=factor_dtype),
        lora_b=normal(N, R, std=R**-0.5 / scaling, dtype=factor_dtype),
        bias=normal(N) if bias else None,
        scaling=scaling,
        dy=normal(M, N),
    )


@dataclass
class BottleneckAdapterInputs:
    """Tensors for one call of `bottleneck_adapter` and the gradient `dy` that flows into it.

    `residual` may be `x` itself. `parameters` has the names of the op's arguments; a norm is a (weight, bias) pair.
    """

    x: Tensor
    residual: Tensor | None
    parameters: dict[str, Any]
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "BottleneckAdapterInputs":
        """The same values in another dtype, detached."""
        x, dy = self.x.detach().to(dtype), self.dy.to(dtype)
        residual = x if self.residual is self.x else None if self.residual is None else self.residual.detach().to(dtype)
        return BottleneckAdapterInputs(x, residual, {n: _to(p, dtype) for n, p in self.parameters.items()}, dy)

    def leaves(self) -> dict[str, Tensor]:
        """Every different tensor of the call but `dy`, by name."""
        tensors = {"x": self.x}
        if self.residual is not None and self.residual is not self.x:
            tensors["residual"] = self.residual
        for name, parameter in self.parameters.items():
            if isinstance(parameter, tuple):
                tensors |= {f"{name}_weight": parameter[0], f"{name}_bias": parameter[1]}
            elif isinstance(parameter, Tensor):
                tensors[name] = parameter
        return tensors


def _to(parameter: Any, dtype: torch.dtype) -> Any:
    if isinstance(parameter, tuple):
        return tuple(_to(tensor, dtype) for tensor in parameter)
    return parameter.detach().to(dtype) if isinstance(parameter, Tensor) else parameter


def bottleneck_adapter_inputs(
    M: int,
    K: int,
    R: int,
    N: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    residual: str | None = "x",
    bias: bool = True,
    norm_before: bool = False,
    norm_after: bool = False,
    learned_scaling: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> BottleneckAdapterInputs:
    """Random inputs whose adapter term is about as large as the residual, so that neither hides the other.

    x (M, K), residual and dy (M, N) have `dtype`, the parameters `factor_dtype`. `residual` is "x" for x itself,
    "other" for a tensor of its own, or None; N is K where not given.
    """
    generator = torch.Generator().manual_seed(seed)
    N, factor_dtype = N or K, factor_dtype or dtype

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype = factor_dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std + mean
        return values.to(device=device, dtype=dtype)

    x = normal(M, K, dtype=dtype)
    parameters: dict[str, Any] = {"down_weight": normal(R, K, std=K**-0.5), "up_weight": normal(N, R, std=R**-0.5)}
    if bias:
        parameters |= {"down_bias": normal(R), "up_bias": normal(N)}
    for name, wanted, width in (("norm_before", norm_before, K), ("norm_after", norm_after, N)):
        if wanted:
            parameters[name] = (normal(width, std=0.2, mean=1.0), normal(width, std=0.2))
    parameters["scaling"] = normal(1, std=0.1, mean=0.7) if learned_scaling else 0.7
    other = normal(M, N, dtype=dtype) if residual == "other" else None
    return BottleneckAdapterInputs(x, x if residual == "x" else other, parameters, normal(M, N, dtype=dtype))


@dataclass
class PrefixAttentionInputs:
    """Tensors for one call of `prefix_attention` and the gradient `dy` that flows into it."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    gate: Tensor | None
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "PrefixAttentionInputs":
        """The same values in another dtype, detached."""
        return PrefixAttentionInputs(**{name: _to(tensor, dtype) for name, tensor in vars(self).items()})

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor of the call but `dy`, by the name of the op's argument."""
        return {name: tensor for name, tensor in vars(self).items() if name != "dy" and tensor is not None}


def prefix_attention_inputs(
    Z: int,
    H: int,
    H_KV: int,
    S: int,
    T: int,
    P: int,
    DH: int,
    *,
    dtype: torch.dtype = torch.float32,
    prefix_dtype: torch.dtype | None = None,
    gate: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> PrefixAttentionInputs:
    """Random inputs whose prefix gets about half of the attention, so that neither segment hides the other.

    query and dy (Z, H, S, DH), key and value (Z, H_KV, T, DH), all views of (Z, S, H, DH) memory as models make them,
    have `dtype`; prefix_key and prefix_value (H_KV, P, DH) and gate (H,) have `prefix_dtype`.
    """
    generator = torch.Generator().manual_seed(seed)
    prefix_dtype = prefix_dtype or dtype

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    query, key, value = normal(Z, S, H, DH), normal(Z, T, H_KV, DH), normal(Z, T, H_KV, DH)
    prefix_key, prefix_value = normal(H_KV, P, DH, dtype=prefix_dtype), normal(H_KV, P, DH, dtype=prefix_dtype)
    # The first feature is the same for all queries: through it the prefix's logits are log(T / P) higher on average.
    query[..., 0], key[..., 0] = 1, 0
    prefix_key[..., 0] = math.log(max(T, 1) / P) * DH**0.5
    return PrefixAttentionInputs(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        prefix_key,
        prefix_value,
        normal(H, dtype=prefix_dtype) if gate else None,
        normal(Z, S, H, DH).transpose(1, 2),
    )

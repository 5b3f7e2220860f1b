"""Counts what a training step launches and moves: aten calls by a dispatch mode, Triton kernels in the interpreter.

Each call that is not a view is one launch, as on a GPU. Of a launch are counted

    read, written  bytes of global memory at different addresses: what an ideal cache would move
    asked          bytes that all programs together ask for; of an aten call no more than `read + written` is known
    flops          of its matrix products, padding of tiles and terms of a split operand included

An aten call reads its tensors and writes its results, and those of its arguments that its schema marks. An interpreted
kernel is watched: each address that its loads and stores touch is marked, so that its figures are measured.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from peft_fast import support

aten = torch.ops.aten


@dataclass(frozen=True)
class Launch:
    """One launch; sizes in bytes, `bits` the width of what its products multiply."""

    name: str
    read: int
    written: int
    asked: int
    flops: int
    bits: int = 16

    @property
    def moved(self) -> int:
        return self.read + self.written


def totals(launches: Iterable[Launch]) -> dict[str, int]:
    """Their number and the sums of what they move, ask for and compute."""
    launches = list(launches)
    sums = {name: sum(getattr(launch, name) for launch in launches) for name in ("moved", "asked", "flops")}
    return {"launches": len(launches), **sums}


_NOTHING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_NOTHING |= {aten.detach, aten._unsafe_view, aten.lift_fresh, aten.is_same_size, aten.set_, aten._local_scalar_dense}
# In-place calls that do not read what they overwrite.
_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.random_, aten.bernoulli_, aten.normal_, aten.uniform_}


def nbytes(tensor: Tensor) -> int:
    """Bytes at different addresses."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
    return math.prod(sizes) * tensor.element_size()


class AtenCounter(TorchDispatchMode):
    """Appends a Launch for every aten call that runs a kernel to `launches`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema, packet = func._schema, func._overloadpacket
        aliases = [item.alias_info for item in schema.returns if item.alias_info is not None]
        if packet in _NOTHING or any(not alias.is_write for alias in aliases):
            return result
        given = dict(zip((item.name for item in schema.arguments), args, strict=False)) | kwargs
        changed = {item.name for item in schema.arguments if item.alias_info is not None and item.alias_info.is_write}
        skipped = changed if packet in _OVERWRITES or func._overloadname.endswith("out") else set()
        inputs = _tensors(value for name, value in given.items() if name not in skipped)
        outputs = _tensors([*(given[name] for name in changed if name in given), result])
        flops = 0
        if packet in flop_registry:
            # torch's formulas do not know that half of the products of causal attention are left out.
            flops = flop_registry[packet](*args, **kwargs, out_val=result) // (1 + bool(given.get("is_causal")))
        read, written = (sum(map(nbytes, tensors)) for tensors in (inputs, outputs))
        bits = next((8 * tensor.element_size() for tensor in inputs if tensor.is_floating_point()), 16)
        if read + written:
            self.launches.append(Launch(str(packet), read, written, read + written, flops, bits))
        return result


def _tensors(values: Any) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)}.values())


class _Watch:
    """Marks the addresses of one interpreted launch, element by element."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.asked = self.flops = 0
        self.bits = max((8 * t.element_size() for t in tensors[:1]), default=16)
        storages = {t.untyped_storage().data_ptr(): (t.untyped_storage().nbytes(), t.element_size()) for t in tensors}
        self.starts = np.array(sorted(storages), dtype=np.uint64)
        self.widths = [storages[int(start)][1] for start in self.starts]
        self.marks = [
            {kind: np.zeros(storages[int(start)][0] // width, dtype=bool) for kind in ("read", "written")}
            for start, width in zip(self.starts, self.widths, strict=True)
        ]

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        # A mask may be of any integer type there, which numpy would take for indices.
        addresses = pointers[np.broadcast_to(mask.astype(bool), pointers.shape)]
        if addresses.size == 0:
            return
        which = int(np.searchsorted(self.starts, addresses.flat[0], side="right")) - 1
        width = self.widths[which]
        # An address before its tensor wraps around, one behind it is out of range: either way numpy raises.
        self.marks[which][kind][((addresses - self.starts[which]) // np.uint64(width)).astype(np.int64)] = True
        self.asked += addresses.size * width

    def launch(self, name: str) -> Launch:
        read, written = (
            sum(int(marks[kind].sum()) * width for marks, width in zip(self.marks, self.widths, strict=True))
            for kind in ("read", "written")
        )
        return Launch(name, read, written, self.asked, self.flops, self.bits)


@contextlib.contextmanager
def watching(launches: list[Launch], records: list[Any]) -> Iterator[None]:
    """Appends a Launch for every kernel that Triton's interpreter runs inside, and to `records` how it was asked for.

    It wants TRITON_INTERPRET=1.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    watch: list[_Watch] = []
    call = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    dot = InterpreterBuilder.create_dot

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        watch[:] = [_Watch(tensors)]
        with _disable_current_modes():
            call(self, *args, **kwargs)
        launches.append(watch.pop().launch(self.fn.__name__))
        constexprs = {name: value for name, value in kwargs.items() if name in self.constexprs}
        records.append(SimpleNamespace(kernel=self, grid=self.grid, args=args, constexprs=constexprs))

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        watch[0].touch("read", pointers.data, mask.data)
        return load(self, pointers, mask, *rest, **keywords)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch[0].touch("written", pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    def watched_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        watch[0].flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", watched_call),
        mock.patch.object(InterpreterBuilder, "create_masked_load", watched_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", watched_store),
        mock.patch.object(InterpreterBuilder, "create_dot", watched_dot),
    ):
        yield


def gpu_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout as it runs on a GPU: one kernel that writes the result and a mask of bytes."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def gpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention in 16 bits as it runs on a GPU: flash attention, or with a mask the
    memory-efficient one, which takes it as an additive one and one key head a query head."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        keep, drop = (torch.scalar_tensor(x, dtype=query.dtype, device=query.device) for x in (0.0, -torch.inf))
        attn_mask = torch.where(attn_mask, keep, drop)
    attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    attend = aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def as_on_gpu(plan: str | None = None) -> Iterator[None]:
    """On any device the calls that a GPU would get: fused dropout and attention, and our ops by `plan`.

    A dispatch mode would send our ops through the registered ones, as compilation does; plain calls are what counts.
    """
    with contextlib.ExitStack() as stack:
        replace = mock.patch.object
        stack.enter_context(replace(F, "dropout", gpu_dropout))
        stack.enter_context(replace(F, "scaled_dot_product_attention", gpu_attention))
        if plan is not None:
            stack.enter_context(support.backend("triton"))
            stack.enter_context(replace(support, "choose_plan", lambda x, backend: plan))
            stack.enter_context(replace(support, "runs_plainly", lambda x: True))
            # Nothing here runs under autocast, which does not know the meta device.
            stack.enter_context(replace(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()))
        yield


def count(step: Callable[[], Any], *, plan: str | None = None, records: list[Any] | None = None) -> list[Launch]:
    """The launches of `step()`: aten calls, and the Triton kernels of our ops by `plan`, which the interpreter runs."""
    counter = AtenCounter()
    with as_on_gpu(plan), contextlib.ExitStack() as stack:
        if plan is not None:
            stack.enter_context(watching(counter.launches, [] if records is None else records))
        stack.enter_context(counter)
        step()
    return counter.launches


def saved_bytes(forward: Callable[[], Tensor], parameters: Any) -> int:
    """Bytes that autograd holds from `forward()` to backward; whole storages, `parameters` apart."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    del y
    return sum(storage.nbytes() for storage in saved.values())

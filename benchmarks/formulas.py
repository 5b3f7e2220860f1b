"""Closed forms of what the Triton kernels move: of each launch as it was asked for, and of whole plans.

`of_launch` takes a launch that `peft_fast.kernels._launch.recording` recorded, its tiles and splits as the launcher
chose them for a chip, and gives exactly what the interpreter would count for it (tests/test_traffic.py holds them to
each other), also at sizes that no interpreter can run. `e`, `f` and `w` are bytes of an element of the activations, of
the parameters and of what partial sums are kept in; a partial block counts as its part, a product as its whole tile.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks import _formulas_adapter, _formulas_lora, _formulas_prefix
from benchmarks._counting import AtenCounter, Launch, as_on_gpu
from benchmarks._formulas_shared import SEED, cdiv
from peft_fast.kernels._launch import recording

_KERNELS = _formulas_lora.KERNELS | _formulas_adapter.KERNELS | _formulas_prefix.KERNELS


def of_launch(launch: Any) -> Launch:
    """The bytes and products of a recorded launch."""
    kernel = launch.kernel
    names = [name for name in kernel.arg_names if name not in launch.constexprs]
    arguments = SimpleNamespace(**dict(zip(names, launch.args, strict=True)), **launch.constexprs, grid=launch.grid)
    name = kernel.fn.__name__
    read, written, asked, flops = _KERNELS[name](arguments)
    first = next(arg for arg in launch.args if isinstance(arg, Tensor))
    return Launch(name, read, written, asked, flops, 8 * first.element_size())


def count_for(
    target: GPUTarget, step: Callable[[], Any], *, plan: str, records: list[Any] | None = None
) -> list[Launch]:
    """The launches of `step()`, on the meta device, as they would be on `target`; none is run."""
    with as_on_gpu(plan), recording(target) as launches, AtenCounter() as counter:
        step()
    if records is not None:
        records += launches
    return counter.launches + [of_launch(launch) for launch in launches]


def _kernels(records: list[Any], name: str) -> list[Any]:
    return [record for record in records if record.kernel.fn.__name__ == name]


def lora_terms(
    plan: str, M: int, K: int, N: int, R: int, *, e: int, f: int, bias: bool, dropout: bool, records: list[Any]
) -> dict[str, int]:
    """Bytes that a LoRA layer moves forward and backward, all gradients wanted; `records` are its launches.

    activations and weight   e (4MK + 3MN + 2NK) by `fused`, e (6MK + 5MN + 2NK) by `split`; e MN more where ds
                             takes a read of dy for itself; e 2N with a trained bias
    factors                  f (3RK + 3NR): each is read twice, its gradient written
    s and ds                 w 6MR: each is written once and read twice
    partial sums             w 2c RK of dA, w 2c NR of dB (and w 2c N of dbias), w 2c MR of each of s and ds:
                             written and read, with as many parts c as the launcher made; nothing where there is
                             one part of s or ds
    seed                     four times 8 bytes with dropout: drawn, and read by three kernels
    """
    w = 8 if e == 8 else 4
    shrinks, grads = _kernels(records, "_shrink_kernel"), _kernels(records, "_factor_grad_kernel")
    of_b, of_a = grads
    parts_a, parts_b = of_a.grid[1], of_b.grid[1]
    once = len(shrinks) == 1
    parts = [launch.grid[1] for launch in shrinks if launch.grid[1] > 1]
    if once:
        parts.append(cdiv(N, of_b.constexprs["BLOCK_K"]))
    wide = {"fused": 4 * M * K + 3 * M * N, "split": 6 * M * K + 5 * M * N}[plan] + 2 * N * K
    return {
        "activations and weight": e * (wide + (0 if once else M * N) + (2 * N if bias else 0)),
        "factors": f * 3 * R * (K + N),
        "s and ds": w * 6 * M * R,
        "partial sums": w * 2 * (parts_a * R * K + parts_b * N * (R + bias) + sum(parts) * M * R),
        "seed": 4 * SEED if dropout else 0,
    }


def adapter_terms(M: int, K: int, R: int, *, e: int, f: int, dropout: bool, records: list[Any]) -> dict[str, int]:
    """Bytes that a bottleneck adapter with biases and without LayerNorms moves, its input its residual.

    activations     e 6MK: x twice, y, dy twice, dx
    parameters      f (6RK + 2K + 2R): each is read twice (biases once), its gradient written
    z, act(z), dz   w 6MR, each written and read once; w 3MR more where R takes several blocks
    partial sums    w 2c (RK + K) of dWu and dbu, w 2c RK of dWd, w 2c R of dbd
    seed            four times 8 bytes with dropout
    """
    w = 8 if e == 8 else 4
    (rows,), (up, down) = (_kernels(records, name) for name in ("adapter_bwd_kernel", "_factor_grad_kernel"))
    several = rows.constexprs["BLOCKS_R"] > 1
    return {
        "activations": e * 6 * M * K,
        "parameters": f * (6 * R * K + 2 * K + 2 * R),
        "z, act(z), dz": w * M * R * (9 if several else 6),
        "partial sums": w * 2 * (up.grid[1] * K * (R + 1) + down.grid[1] * R * K + rows.grid[0] * R),
        "seed": 4 * SEED if dropout else 0,
    }


def prefix_terms(
    Z: int, H: int, H_KV: int, S: int, P: int, DH: int, *, e: int, f: int, dropout: bool, records: list[Any]
) -> dict[str, int]:
    """Bytes that attention over a prefix moves, S = T, no mask given, no window, no gate; causal or not.

    queries         e 10 Z H S DH: q four times, dy three times, y twice, dq
    keys, values    e 8 Z H_KV S DH: read by three kernels, their gradients written; never copied
    prefix          f 8 H_KV P DH: read by three kernels, its gradients written
    rows            w 7 Z H S of log-sum-exp and δ
    partial sums    w 4c H_KV P DH
    seed            five times 8 bytes with dropout
    """
    w = 8 if e == 8 else 4
    (total,) = _kernels(records, "_sum_partials_kernel")
    parts = total.args[total.kernel.arg_names.index("count_0")]
    return {
        "queries": e * 10 * Z * H * S * DH,
        "keys, values": e * 8 * Z * H_KV * S * DH,
        "prefix": f * 8 * H_KV * P * DH,
        "rows": w * 7 * Z * H * S,
        "partial sums": w * 4 * parts * H_KV * P * DH,
        "seed": 5 * SEED if dropout else 0,
    }

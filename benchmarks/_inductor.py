"""Counts what `torch.compile` would launch and move for a step: the kernels that Inductor's scheduler makes of it.

Inductor lowers, fuses and schedules for the CPU, the only device there is everywhere; nothing is generated or run. It
fuses by the same rules for a GPU, where it may still choose other templates. What a kernel moves is Inductor's own
figure: each buffer once. Products stay the vendor's.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which Inductor imports
    from torch._inductor.compile_fx import compile_fx, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

from benchmarks._counting import Launch


def compiled_launches(make: Callable[[], tuple[Callable[..., Tensor], list[Tensor], Tensor]]) -> list[Launch]:
    """The kernels of `make()`, which gives a function, leaves it is called with and the gradient of its result.

    It is called under a FakeTensorMode: no memory is taken at any size.
    """
    launches: list[Launch] = []

    def inner(graph_module: Any, inputs: Any, **options: Any) -> Any:
        lowered = copy.deepcopy(graph_module)
        record_original_output_strides(lowered)
        with V.set_fake_mode(detect_fake_mode(inputs)):
            post_grad_passes(lowered, is_inference=False)
            graph = GraphLowering(lowered, inputs)
            with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
                graph.run(*inputs)
                graph.init_wrapper_code()
                graph._update_scheduler()
                launches.extend(_launch(node) for node in graph.scheduler.nodes if _is_kernel(node))

        def run(arguments: list[Any]) -> Any:
            return graph_module(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    torch._dynamo.reset()
    with FakeTensorMode():
        function, inputs, dy = make()
        compiled = torch.compile(function, backend=lambda gm, args: compile_fx(gm, args, inner_compile=inner))
        torch.autograd.grad(compiled(*inputs), [leaf for leaf in inputs if leaf.requires_grad], dy)
    return launches


def _is_kernel(node: Any) -> bool:
    if isinstance(node, NopKernelSchedulerNode):
        return False
    return not (isinstance(node, ExternKernelSchedulerNode) and isinstance(node.node, MultiOutput))


def _launch(node: Any) -> Launch:
    read, written = node.get_read_buffer_sizes(), node.get_write_buffer_sizes()
    first = next(iter(node.get_outputs()))
    return Launch(
        f"inductor.{type(node).__name__}",
        read,
        written,
        read + written,
        int(node.estimate_flops() or 0),
        8 * first.node.get_dtype().itemsize,
    )

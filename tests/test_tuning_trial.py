"""A trial of tuning leaves no trace, and times what it says it times.

No device is here to be timed: trials are timed by a table, and their steps run in the interpreter.
"""

import contextlib
import functools
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peft_fast
from models import lora_layers, lora_model
from peft_fast import tuning
from peft_fast.ops import lora_linear
from peft_fast.testing import lora_linear_inputs
from tuned import (
    CPU,
    TILE_WINS,
    Layer,
    Timer,
    cold,  # noqa: F401
    spy,
)

pytest.importorskip("triton")


from peft_fast.kernels import _launch, low_rank
from peft_fast.kernels import lora_linear as launchers
from peft_fast.kernels._launch import Plan

# Small enough for the interpreter; dropout, so that the seed tells whether torch's random state was touched.
M, K, N, R, P = 16, 16, 16, 2, 0.25


def leaves():
    inputs = lora_linear_inputs(M, K, N, R)
    return inputs, [tensor.requires_grad_() for tensor in (inputs.x, inputs.lora_a, inputs.lora_b)]


def step(inputs, tensors, around=contextlib.nullcontext):
    """y, its gradients and the random state that is left, from a fixed one; forward inside of `around()`."""
    torch.manual_seed(7)
    x, lora_a, lora_b = tensors
    with peft_fast.backend("triton"):
        with around():
            y = lora_linear(x, inputs.weight, lora_a, lora_b, bias=inputs.bias, scaling=inputs.scaling, dropout_p=P)
        grads = torch.autograd.grad(y, tensors, inputs.dy) if y.requires_grad else ()
    return [y.detach(), *grads, torch.random.get_rng_state()]


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class TestTrial:
    """Trials whose steps run, in the interpreter, on CPU tensors."""

    @pytest.fixture(autouse=True)
    def on_cpu(self, monkeypatch):
        monkeypatch.setattr(tuning, "serves", lambda x: True)
        self.monkeypatch = monkeypatch
        self.timer = Timer(monkeypatch, TILE_WINS, runs=True)

    def untuned(self, plan, **options):
        """The step by a plan that nothing was measured for."""
        self.monkeypatch.setattr(tuning, "_choices", Fixed(plan))
        result = step(*leaves(), **options)
        self.monkeypatch.setattr(tuning, "_choices", {})
        return result

    def test_first_call_equals_second_and_both_what_no_trial_gives(self):
        inputs, tensors = leaves()
        before = [tensor.detach().clone() for tensor in (*tensors, inputs.weight, inputs.bias, inputs.dy)]
        first, second = step(inputs, tensors), step(inputs, tensors)
        assert len(self.timer.trials) == 1
        assert_equal(first, second)
        assert_equal([*tensors, inputs.weight, inputs.bias, inputs.dy], before)
        assert_equal(first, self.untuned("fused 64x128"))

    def test_the_tensors_of_a_trial_are_its_own(self, monkeypatch):
        inputs, tensors = leaves()
        live = {tensor.data_ptr() for tensor in (*tensors, inputs.weight, inputs.bias, inputs.dy)}
        seen, call = [], Plan.__call__

        def watched(plan, *args):
            if threading.current_thread() is not threading.main_thread():
                seen.extend(arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor))
            call(plan, *args)

        monkeypatch.setattr(Plan, "__call__", watched)
        step(inputs, tensors)
        assert seen
        assert not live & set(seen)

    @pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
    def test_modes_of_the_caller_do_not_reach_it(self, around):
        inputs, tensors = leaves()
        if around is torch.inference_mode:
            tensors = [tensor.detach() for tensor in tensors]
        first = step(inputs, tensors, around)
        assert len(self.timer.trials) == 1
        assert_equal(first, step(inputs, tensors, around))

    def test_hooks_of_the_caller_do_not_see_its_saved_tensors(self):
        packed = []
        hooks = functools.partial(
            torch.autograd.graph.saved_tensors_hooks, lambda tensor: packed.append(1) or tensor, lambda tensor: tensor
        )
        step(*leaves(), hooks)
        first = len(packed)
        step(*leaves(), hooks)
        assert len(self.timer.trials) == 1
        assert len(packed) == 2 * first > 0

    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    def test_checkpointing(self, use_reentrant):
        inputs, tensors = leaves()

        def run(x, lora_a, lora_b):
            return lora_linear(x, inputs.weight, lora_a, lora_b, scaling=inputs.scaling, dropout_p=P)

        def checkpointed():
            torch.manual_seed(7)
            with peft_fast.backend("triton"):
                y = checkpoint(run, *tensors, use_reentrant=use_reentrant)
                for tensor in tensors:
                    tensor.grad = None
                y.backward(inputs.dy)
            return [y.detach(), *(tensor.grad for tensor in tensors)]

        first = checkpointed()
        assert len(self.timer.trials) == 1
        assert_equal(first, checkpointed())

    @pytest.mark.parametrize("plan", ["split", "fused", "fused 64x128"])
    def test_backward_keeps_the_plan_of_forward(self, monkeypatch, plan):
        monkeypatch.setattr(tuning, "_choices", Fixed(plan))
        inputs, tensors = leaves()
        plans, bwd = [], launchers.lora_bwd
        monkeypatch.setattr(launchers, "lora_bwd", lambda *args, **kw: plans.append(kw["plan"]) or bwd(*args, **kw))
        monkeypatch.setattr(_launch, "_plans", {})
        tiles = spy(monkeypatch, low_rank, "_matmul_tile")
        with peft_fast.backend("triton"):
            y = lora_linear(tensors[0], inputs.weight, *tensors[1:])
        monkeypatch.setattr(tuning, "_choices", Fixed("split" if plan != "split" else "fused"))
        torch.autograd.grad(y, tensors, inputs.dy)
        assert plans == [plan]
        assert len(tiles) == 2 * (plan != "split")
        assert {tile.rows for tile in tiles} <= {64 if plan == "fused 64x128" else 128}

    def test_every_plan_is_tried_with_the_calls_of_the_layer(self):
        """The real steps, timed by the clock."""
        self.monkeypatch.undo()
        shape = tuning.Shape(CPU, M, K, N, R, torch.float32, torch.float32, True, False)
        assert list(tuning._steps(shape)) == ["eager", "split", "fused", "fused 128x128", "fused 64x128"]
        self.monkeypatch.setattr(tuning, "WARM_RUNS", 1)
        self.monkeypatch.setattr(tuning, "ROUNDS", 1)
        self.monkeypatch.setattr(low_rank, "_NAMED_TILES", {})
        times = tuning._trial(shape, None)
        assert list(times) == ["eager", "split", "fused"]
        assert all(milliseconds > 0 for milliseconds in times.values())

    @pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no dropout"])
    @pytest.mark.parametrize("fault", [1.05, 0.0, torch.nan], ids=str)
    def test_a_plan_with_other_results_is_left_out(self, fault, dropout):
        """As a compiler's fault might leave them."""
        module = __import__("sys").modules["peft_fast.ops.lora_linear"]
        right = module.lora_linear_by
        self.monkeypatch.undo()
        self.monkeypatch.setattr(tuning, "WARM_RUNS", 1)
        self.monkeypatch.setattr(tuning, "ROUNDS", 1)
        self.monkeypatch.setattr(low_rank, "_NAMED_TILES", {})
        self.monkeypatch.setattr(
            module, "lora_linear_by", lambda plan, *args: right(plan, *args) * (fault if plan == "fused" else 1.0)
        )
        shape = tuning.Shape(CPU, M, K, N, R, torch.float32, torch.float32, dropout, False)
        with pytest.warns(UserWarning, match="cannot run by the plan fused: its results are not those of split"):
            assert list(tuning._trial(shape, None)) == ["eager", "split"]


class Fixed(dict):
    """Choices of one plan, whatever the shape."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan

    def get(self, key, default=None):
        return tuning.Choice(self.plan, False)


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=["fp32 factors", "bf16 factors"])
def test_the_stock_that_is_timed_is_peft(factor_dtype, dropout):
    """Call by call, forward and backward, so that no plan wins over something slower than peft."""
    model = lora_model(base=Layer(), target_modules=["linear"], lora_dropout=0.1, r=R)
    model.base_model.model.linear.base_layer.to(torch.bfloat16)
    (layer,) = lora_layers(model)
    for factor in (layer.lora_A, layer.lora_B):
        factor.to(factor_dtype)
    layer.base_layer.bias = None
    layer.train(dropout)
    x = torch.randn(M, 32, dtype=torch.bfloat16, requires_grad=True)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    stock = tuning._steps(tuning.Shape(CPU, M, 32, 48, R, torch.bfloat16, factor_dtype, dropout, False))["eager"]
    dy = torch.ones(M, 48, dtype=torch.bfloat16)
    with _Calls() as expected:
        torch.autograd.grad(layer(x), (x, *parameters), dy)
    with _Calls() as actual:
        stock()
    assert actual.names == expected.names
    assert len(actual.names) > 10

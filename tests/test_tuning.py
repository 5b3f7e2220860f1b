"""The plan of a LoRA linear layer follows what is measured, and measuring leaves no trace.

No device is here to be timed: trials are timed by a table, and where their steps run they run in the interpreter.
"""

import contextlib
import functools
import threading
import time

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peft_fast
from models import batch, lora_layers, lora_model, loss_and_gradients, patched_copy
from peft_fast import support, tuning, tuning_file
from peft_fast.ops import lora_linear
from peft_fast.testing import lora_linear_inputs

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from peft_fast.kernels import lora_linear as launchers
from peft_fast.kernels import low_rank
from peft_fast.kernels._launch import recording

ABOUT = {"device": "Some GPU", "capability": "9.0", "torch": "2", "triton": "3", "kernels": "ab"}
CPU = torch.device("cpu")
STOCK_WINS = {"eager": 1.0, "split": 2.0, "fused": 3.0}
SPLIT_WINS = {"eager": 3.0, "split": 1.0, "fused": 2.0}
FUSED_WINS = {"eager": 3.0, "split": 2.0, "fused": 1.0}
TILE_WINS = {"eager": 3.0, "split": 2.0, "fused": 1.5, "fused 64x128": 1.0}


@pytest.fixture(autouse=True)
def cold(monkeypatch, tmp_path):
    """A process that has measured nothing yet, on a device without a file."""
    monkeypatch.setenv("PEFT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PEFT_FAST_TUNE", raising=False)
    monkeypatch.setattr(tuning, "device_and_versions", lambda device: ABOUT)
    forget(monkeypatch)


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_waiting", {})
    monkeypatch.setattr(tuning_file, "_read", {})
    tuning_file.warn.cache_clear()
    tuning._by_table.cache_clear()


class Timer:
    """Stands for the device: a step runs, or not where only its time matters, and takes what `times` says."""

    def __init__(self, monkeypatch, times=SPLIT_WINS, *, runs=False):
        self.times, self.trials, self.runs = times, [], runs
        steps = tuning._steps

        def named_steps(shape):
            self.trials.append(shape)
            real = steps(shape) if runs else dict.fromkeys(self.times)
            return {plan: functools.partial(self.step, plan, real[plan]) for plan in self.times}

        monkeypatch.setattr(tuning, "_steps", named_steps)
        monkeypatch.setattr(tuning, "_milliseconds", lambda step, stream: step() or self.times[step.args[0]])
        monkeypatch.setattr(tuning, "WARM_RUNS", 1)
        monkeypatch.setattr(tuning, "ROUNDS", 1)

    def step(self, plan, real):
        if real:
            real()
        if isinstance(self.times[plan], Exception):
            raise self.times[plan]


def choose(M=64, K=32, N=48, R=4, *, dropout=False, measure=True, dtype=torch.bfloat16, factor_dtype=torch.float32):
    x, weight = torch.zeros(M, K, dtype=dtype), torch.zeros(N, K, dtype=dtype)
    return tuning.choose(x, weight, torch.zeros(R, K, dtype=factor_dtype), dropout, measure=measure)


class TestChoice:
    @pytest.mark.parametrize(
        ("times", "plan", "stock"),
        [
            (STOCK_WINS, "split", True),
            (SPLIT_WINS, "split", False),
            (FUSED_WINS, "fused", False),
            (TILE_WINS, "fused 64x128", False),
            ({"eager": 1.0, "split": 3.0, "fused": 2.0}, "fused", True),
            ({"eager": 1.0, "split": 0.99}, "split", True),
            ({"eager": 3.0, "split": 1.0, "fused": 0.99}, "split", False),
        ],
        ids=["stock", "split", "fused", "tile", "stock, then fused", "split within noise", "fused within noise"],
    )
    def test_follows_the_timer(self, monkeypatch, times, plan, stock):
        timer = Timer(monkeypatch, times)
        assert choose() == (plan, stock)
        assert choose() == (plan, stock)
        assert len(timer.trials) == 1
        assert list(tuning.chosen().values()) == ["stock" if stock else plan]
        forget(monkeypatch)  # but not the file
        assert choose() == (plan, stock)
        assert len(timer.trials) == 1

    def test_the_median_counts(self, monkeypatch):
        timer = Timer(monkeypatch, {"eager": 2.0, "split": 1.0})
        values = iter([9.0, 1.0, 2.0, 1.0, 2.0, 9.0])
        monkeypatch.setattr(tuning, "_milliseconds", lambda step, stream: next(values))
        monkeypatch.setattr(tuning, "ROUNDS", 3)
        assert choose() == ("split", False)
        assert tuning_file.results(ABOUT)[str(timer.trials[0])] == {"eager": 2.0, "split": 1.0}

    def test_a_plan_that_fails_is_left_out(self, monkeypatch):
        Timer(monkeypatch, {"eager": 3.0, "split": 2.0, "fused": RuntimeError("out of shared memory")})
        with pytest.warns(UserWarning, match="cannot run by the plan fused: RuntimeError: out of shared memory"):
            assert choose() == ("split", False)

    @pytest.mark.parametrize("which", ["eager", "split"])
    def test_a_trial_that_fails_is_not_repeated(self, monkeypatch, which):
        timer = Timer(monkeypatch, FUSED_WINS | {which: torch.cuda.OutOfMemoryError("tried to allocate 1 GiB")})
        with pytest.warns(UserWarning, match="tried to allocate"):
            assert choose() == ("split", None)
        assert choose() == ("split", None)
        assert len(timer.trials) == 1
        assert tuning_file.results(ABOUT) == {}

    def test_scratch_tensors_that_do_not_fit(self, monkeypatch):
        def steps(shape):
            raise torch.cuda.OutOfMemoryError("tried to allocate 1 GiB")

        monkeypatch.setattr(tuning, "_steps", steps)
        with pytest.warns(UserWarning, match="was not measured: OutOfMemoryError"):
            assert choose() == ("split", None)
        assert choose() == ("split", None)

    def test_m_counts_by_powers_of_two(self, monkeypatch):
        timer = Timer(monkeypatch)
        for M in (64, 127, 100):
            choose(M)
        x = torch.zeros(4, 16, 32, dtype=torch.bfloat16)
        tuning.choose(x, torch.zeros(48, 32, dtype=x.dtype), torch.zeros(4, 32), False, measure=True)
        assert [shape.M for shape in timer.trials] == [64]
        for M in (128, 63, 16):
            choose(M)
        assert [shape.M for shape in timer.trials] == [64, 128, 32, 16]
        assert choose(tuning.LEAST_ROWS - 1) == choose(0) == ("split", None)
        assert len(timer.trials) == 4
        monkeypatch.setattr(tuning, "MOST_ELEMENTS", 64 * 48)
        forget(monkeypatch)
        choose(1 << 14)
        assert len(timer.trials) == 4  # as 64 rows

    def test_each_other_property_counts(self, monkeypatch):
        timer = Timer(monkeypatch)
        fp32 = {"dtype": torch.float32}
        for change in ({}, {"N": 32}, {"K": 64}, {"R": 8}, {"dropout": True}, {"factor_dtype": torch.bfloat16}, fp32):
            choose(**change)
        switch = torch.backends.cuda.matmul
        before, switch.fp32_precision = switch.fp32_precision, "tf32"
        try:
            choose(**fp32)
        finally:
            switch.fp32_precision = before
        names = {str(shape) for shape in timer.trials}
        assert len(names) == len(timer.trials) == 8
        assert "lora_linear M=64 K=32 N=48 R=4 float32 tf32 float32" in names
        assert "lora_linear M=64 K=32 N=48 R=4 bfloat16 float32 dropout" in names

    def test_threads_share_one_trial(self, monkeypatch):
        timer = Timer(monkeypatch)
        step, found = timer.step, []
        timer.step = lambda plan, real: time.sleep(0.02) or step(plan, real)
        threads = [threading.Thread(target=lambda: found.append(choose())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [("split", False)] * 4
        assert len(timer.trials) == 1


class TestFile:
    @pytest.mark.parametrize(
        "kept",
        [{"eager": 1.0}, {"split": 1.0, "fused": 0.5}, {}],
        ids=["without ours", "without stock", "empty"],
    )
    def test_times_that_do_not_suffice_are_measured_again(self, monkeypatch, kept):
        timer = Timer(monkeypatch, FUSED_WINS)
        choose()
        tuning_file.keep(ABOUT, {str(timer.trials[0]): kept})
        forget(monkeypatch)
        assert choose() == ("fused", False)
        assert len(timer.trials) == 2

    def test_a_plan_that_is_not_known_is_not_taken(self, monkeypatch):
        timer = Timer(monkeypatch)
        choose()
        tuning_file.keep(ABOUT, {str(timer.trials[0]): SPLIT_WINS | {"fused 1x1": 0.1}})
        forget(monkeypatch)
        assert choose() == ("split", False)
        assert len(timer.trials) == 1

    def test_a_damaged_file_is_measured_anew(self, monkeypatch):
        timer = Timer(monkeypatch, FUSED_WINS)
        path = tuning_file.path_of(ABOUT)
        path.parent.mkdir()
        path.write_text("{")
        with pytest.warns(UserWarning, match="damaged or foreign"):
            assert choose() == ("fused", False)
        assert tuning_file.results(ABOUT) == {str(timer.trials[0]): FUSED_WINS}

    def test_without_a_folder_results_last_for_the_process(self, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("PEFT_FAST_CACHE", str(tmp_path / "file"))
        timer = Timer(monkeypatch, FUSED_WINS)
        with pytest.warns(UserWarning, match="for this process only"):
            assert choose() == ("fused", False)
        assert choose() == ("fused", False)
        assert len(timer.trials) == 1

    def test_tune_0_keeps_to_the_shipped_table(self, monkeypatch):
        timer = Timer(monkeypatch, FUSED_WINS)
        choose()  # a result that must not be read
        (shape,) = timer.trials
        forget(monkeypatch)
        monkeypatch.setenv("PEFT_FAST_TUNE", "0")
        assert choose() == ("split", None)
        forget(monkeypatch)
        table = {"plan": "split", "devices": {ABOUT["device"]: {str(shape): STOCK_WINS}}}
        monkeypatch.setattr(tuning, "_table", lambda: table)
        assert choose() == ("split", True)
        assert len(timer.trials) == 1

    def test_the_shipped_table_claims_nothing(self):
        assert tuning._table()["devices"] == {}
        assert tuning._default() == ("split", None)


class TestManyProcesses:
    @pytest.fixture
    def rank(self, monkeypatch):
        """Sets the rank of this process in a run of several."""
        monkeypatch.setattr(tuning, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        return lambda rank: monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)

    def test_rank_0_measures_and_others_read(self, monkeypatch, rank):
        timer = Timer(monkeypatch, FUSED_WINS)
        rank(1)
        assert choose() == ("split", None)
        assert timer.trials == []
        forget(monkeypatch)
        rank(0)
        assert choose() == ("fused", False)
        forget(monkeypatch)
        rank(1)
        assert choose() == ("fused", False)
        assert len(timer.trials) == 1

    @pytest.mark.parametrize("times", [STOCK_WINS, FUSED_WINS], ids=["stock", "fused"])
    def test_a_result_that_comes_later_does_not_turn_ours_to_stock(self, monkeypatch, rank, times):
        """Between a forward and its repetition by checkpointing it would change the dropout mask."""
        Timer(monkeypatch)
        rank(1)
        assert choose() == ("split", None)
        tuning_file.keep(ABOUT, {str(shape): times for shape in tuning._waiting})
        assert choose() == ("fused" if times is FUSED_WINS else "split", None)

    def test_the_file_is_not_looked_at_in_each_call(self, monkeypatch, rank):
        monkeypatch.setattr(tuning, "LOOK_SECONDS", 60.0)
        looks = []
        monkeypatch.setattr(tuning_file, "results", lambda about: looks.append(about) or {})
        rank(1)
        assert {choose() for _ in range(3)} == {("split", None)}
        assert len(looks) == 1


class TestWhereNothingIsMeasured:
    """Captured, traced, transformed, in backward: a known result, else the table."""

    @pytest.fixture(autouse=True)
    def on_cpu(self, monkeypatch):
        monkeypatch.setattr(tuning, "serves", lambda x: True)
        self.timer = Timer(monkeypatch)

    def test_capture(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not tuning._may_measure(torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert tuning._may_measure(torch.device("cuda", 0))

    @pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
    @pytest.mark.parametrize("mode", ["fake", "compile", "vmap"])
    def test_tracing(self, monkeypatch, mode, known):
        inputs = lora_linear_inputs(16, 8, 8, 2)
        if known:
            self.timer.times = FUSED_WINS
            choose(16, 8, 8, 2, dtype=torch.float32)
        asked = spy(monkeypatch, tuning, "choose")
        step = functools.partial(lora_linear, scaling=2.0)
        args = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
        with peft_fast.backend("triton"):
            if mode == "fake":
                with FakeTensorMode() as fake:
                    step(*map(fake.from_tensor, args))
            elif mode == "compile":
                torch._dynamo.reset()
                torch.compile(step, backend="aot_eager", fullgraph=True)(*args)
            else:
                torch.func.vmap(step, (0, None, None, None))(inputs.x[None], *args[1:])
        assert len(self.timer.trials) == known
        assert all(choice.plan == ("fused" if known else "split") for choice in asked)
        assert bool(asked) == (mode != "vmap")  # which runs the reference

    @pytest.mark.parametrize("rows_alone", [True, False], ids=["rows", "all"])
    def test_dynamic_shapes(self, rows_alone):
        args = [torch.zeros(*size) for size in ((16, 8), (8, 8), (2, 8), (8, 2))]
        choose(16, 8, 8, 2, dtype=torch.float32)  # which a symbol must not be held against: it would be a guard
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(lora_linear, backend=counter, fullgraph=True, dynamic=None if rows_alone else True)
        if rows_alone:
            torch._dynamo.mark_dynamic(args[0], 0)
        with peft_fast.backend("triton"):
            for M in (16, 5, 40):
                step(args[0].new_zeros(M, 8) if M != 16 else args[0], *args[1:])
        assert counter.frame_count <= (1 if rows_alone else 2)  # as where nothing is looked up
        assert len(self.timer.trials) == 1

    def test_backward(self):
        found = []

        class Late(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dy):
                found.append(choose())
                return dy

        Late.apply(torch.ones(2, requires_grad=True)).sum().backward()
        assert found == [("split", None)]
        assert self.timer.trials == []


def spy(monkeypatch, owner, name):
    """A list of what `owner.name` returns from now on."""
    results, function = [], getattr(owner, name)

    def watched(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, watched)
    return results


def test_the_cpu_never_asks(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("tuning was asked for a call on the CPU")

    for name in ("choose", "serves", "_settle"):
        monkeypatch.setattr(tuning, name, asked)
    model = patched_copy(lora_model(lora_dropout=0.1))
    loss_and_gradients(model, batch())
    inputs = lora_linear_inputs(40, 16, 24, 4)
    lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 48)


class TestPatchedLayers:
    """On the meta device, which stands for a GPU: what would be launched is recorded."""

    @pytest.fixture(autouse=True)
    def meta(self, monkeypatch):
        monkeypatch.setattr(support, "_runs_triton", lambda device: True)
        monkeypatch.setattr(tuning, "serves", lambda x: True)
        # From a generator of the meta device nothing can be drawn.
        self.model = lora_model(base=_Layer(), target_modules=["linear"], lora_dropout=0.1).to("meta")
        peft_fast.patch(self.model)
        (self.layer,) = lora_layers(self.model)

    def call(self, M=64, **options):
        with recording(GPUTarget("cuda", 90, 32)) as launches:
            x = torch.empty(M, 32, device="meta", **options)
            (y,) = (self.layer(x),)
        (row,) = peft_fast.report(self.model).rows
        assert y.shape == (M, 48)
        return [launch.kernel.fn.__name__ for launch in launches], row

    def test_stock_runs_where_it_is_faster(self, monkeypatch):
        Timer(monkeypatch, STOCK_WINS)
        launches, row = self.call()
        assert launches == []
        assert (row.state, row.reason) == ("stock", "last call: stock is faster at this shape on this device")

    def test_an_explicit_choice_does_not_fall_back(self, monkeypatch):
        Timer(monkeypatch, STOCK_WINS)
        with peft_fast.backend("triton"):
            launches, row = self.call()
        assert "_update_kernel" in launches
        assert row.state == "fused"

    @pytest.mark.parametrize(
        ("times", "kernel"), [(SPLIT_WINS, "_update_kernel"), (FUSED_WINS, "_matmul_kernel")], ids=["split", "fused"]
    )
    def test_a_measurement_replaces_the_least_size(self, monkeypatch, times, kernel):
        Timer(monkeypatch, times)
        launches, row = self.call()
        assert kernel in launches
        assert row.state == "fused"

    @pytest.mark.parametrize("M", [64, 1 << 17], ids=["small", "large"])
    def test_the_least_size_holds_where_nothing_is_measured(self, monkeypatch, M):
        monkeypatch.setenv("PEFT_FAST_TUNE", "0")
        launches, row = self.call(M)
        assert ("_update_kernel" in launches) == (row.state == "fused") == (M > 64)
        assert row.reason == ("last call: too small to gain on this device" if M == 64 else "")

    def test_autocast_is_other_calls(self, monkeypatch):
        """Its casts are not in the time of stock that was measured."""
        Timer(monkeypatch, STOCK_WINS)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "meta")
        monkeypatch.setattr(torch._C, "_is_any_autocast_enabled", lambda: True)
        x = torch.empty(64, 32, device="meta")
        assert support.fusable_lora(self.layer, x) == "last call: too small to gain on this device"

    def test_compiled_code_goes_by_the_least_size(self, monkeypatch):
        timer = Timer(monkeypatch, STOCK_WINS)
        torch._dynamo.reset()
        step = torch.compile(self.layer, backend="eager", fullgraph=True)
        assert step(torch.empty(64, 32, device="meta")).shape == (64, 48)
        assert timer.trials == []


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
        seen, launch = [], low_rank.launch

        def watched(kernel, grid, *args, **options):
            if threading.current_thread() is not threading.main_thread():
                seen.extend(arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor))
            launch(kernel, grid, *args, **options)

        monkeypatch.setattr(low_rank, "launch", watched)
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
    model = lora_model(base=_Layer(), target_modules=["linear"], lora_dropout=0.1, r=R)
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

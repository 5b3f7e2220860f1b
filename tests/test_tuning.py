"""The plan of a LoRA linear layer follows what is measured, and measuring leaves no trace.

No device is here to be timed: trials are timed by a table, and where their steps run they run in the interpreter.
"""

import functools
import threading
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_fast
from models import batch, lora_layers, lora_model, loss_and_gradients, patched_copy
from peft_fast import support, tuning, tuning_file
from peft_fast.ops import lora_linear
from peft_fast.testing import lora_linear_inputs
from tuned import (
    ABOUT,
    CPU,
    FUSED_WINS,
    SPLIT_WINS,
    STOCK_WINS,
    TILE_WINS,
    Layer,
    Timer,
    choose,
    cold,  # noqa: F401
    forget,
    spy,
)

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from peft_fast.kernels._launch import recording


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

    def test_plans_that_all_fail(self, monkeypatch):
        Timer(monkeypatch, dict.fromkeys(FUSED_WINS, RuntimeError("no device")))
        with pytest.warns(UserWarning, match="cannot run by the plan") as warned:
            assert choose() == ("split", None)
        assert not any("was not measured" in str(warning.message) for warning in warned)

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

    def test_the_shipped_table(self):
        assert tuning._default() == ("split", None)
        shape = tuning.Shape(CPU, 8192, 4096, 4096, 16, torch.bfloat16, torch.float32, True, False)
        devices = tuning._table()["devices"]
        assert all(str(shape) in shapes for shapes in devices.values())
        for times in [times for shapes in devices.values() for times in shapes.values()]:
            assert times.keys() >= {"eager", "split", "fused"}
            assert tuning._fastest(times).stock is False


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


def test_the_cpu_never_asks(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("tuning was asked for a call on the CPU")

    for name in ("choose", "serves", "_settle"):
        monkeypatch.setattr(tuning, name, asked)
    model = patched_copy(lora_model(lora_dropout=0.1))
    loss_and_gradients(model, batch())
    inputs = lora_linear_inputs(40, 16, 24, 4)
    lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)


TOO_SMALL = "last call: too small to gain on this device, which takes activations of 16777216 elements"


class TestPatchedLayers:
    """On the meta device, which stands for a GPU: what would be launched is recorded."""

    @pytest.fixture(autouse=True)
    def meta(self, monkeypatch):
        monkeypatch.setattr(support, "_runs_triton", lambda device: True)
        monkeypatch.setattr(tuning, "serves", lambda x: True)
        # From a generator of the meta device nothing can be drawn.
        self.model = lora_model(base=Layer(), target_modules=["linear"], lora_dropout=0.1).to("meta")
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

    @pytest.mark.parametrize("M", [64, 1 << 20], ids=["small", "large"])
    def test_the_least_size_holds_where_nothing_is_measured(self, monkeypatch, M):
        monkeypatch.setenv("PEFT_FAST_TUNE", "0")
        launches, row = self.call(M)
        assert ("_update_kernel" in launches) == (row.state == "fused") == (M > 64)
        assert row.reason == (TOO_SMALL if M == 64 else "")

    def test_autocast_is_other_calls(self, monkeypatch):
        """Its casts are not in the time of stock that was measured."""
        Timer(monkeypatch, STOCK_WINS)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "meta")
        monkeypatch.setattr(torch._C, "_is_any_autocast_enabled", lambda: True)
        x = torch.empty(64, 32, device="meta")
        assert support.fusable_lora(self.layer, x) == TOO_SMALL

    def test_compiled_code_goes_by_the_least_size(self, monkeypatch):
        timer = Timer(monkeypatch, STOCK_WINS)
        torch._dynamo.reset()
        step = torch.compile(self.layer, backend="eager", fullgraph=True)
        assert step(torch.empty(64, 32, device="meta")).shape == (64, 48)
        assert timer.trials == []

"""What only a CUDA device can show."""

import pytest
import torch

from peft_fast import reference, tuning, tuning_file
from peft_fast.ops import lora_linear
from peft_fast.ops.lora_linear import lora_linear_by
from peft_fast.testing import assert_within_budget, lora_linear_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Memory is not poisoned here: the poison itself would not survive a graph capture."""


def step(inputs):
    y = lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, bias=inputs.bias)
    return [y, *torch.autograd.grad(y, (inputs.x, inputs.lora_a, inputs.lora_b), inputs.dy)]


def cuda_inputs(**config):
    inputs = lora_linear_inputs(300, 256, 512, 8, device="cuda", dtype=torch.bfloat16, **config)
    for tensor in (inputs.x, inputs.lora_a, inputs.lora_b):
        tensor.requires_grad_()
    return inputs


def assert_within_reference_budget(actual, inputs):
    """y, dx, da and db of bf16 inputs."""
    results = []
    for each in (inputs.to(torch.float64), inputs.to(torch.bfloat16)):
        leaves = [tensor.requires_grad_() for tensor in (each.x, each.lora_a, each.lora_b)]
        y = reference.lora_linear(each.x, each.weight, each.lora_a, each.lora_b, bias=each.bias, scaling=each.scaling)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, each.dy)])
    for value, truth, eager in zip(actual, *results, strict=True):
        assert_within_budget(value, truth, eager, length=max(inputs.weight.shape))


def test_second_stream():
    inputs = cuda_inputs()
    expected = step(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a kernel on another stream would not wait for this one
        inputs.x.data.mul_(2)
        inputs.x.data.div_(2)
        actual = step(inputs)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device():
    first = cuda_inputs()
    with torch.cuda.device(0):
        expected = [tensor.cpu() for tensor in step(first)]
        for name, value in vars(first).items():
            if isinstance(value, torch.Tensor):
                setattr(first, name, value.detach().to("cuda:1").requires_grad_(value.requires_grad))
        actual = [tensor.cpu() for tensor in step(first)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_graph_capture():
    inputs = cuda_inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    inputs.x.data.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(inputs), strict=True))


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A process that has measured nothing yet, with an empty cache folder."""
    monkeypatch.setenv("PEFT_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("PEFT_FAST_TUNE")
    monkeypatch.setattr(tuning, "_choices", {})


def test_tuning_leaves_no_trace_and_keeps_what_it_found(monkeypatch, tuned):
    inputs = cuda_inputs(factor_dtype=torch.float32)
    before = [tensor.detach().clone() for tensor in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)]

    def run():
        torch.manual_seed(7)
        y = lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, dropout_p=0.1)
        grads = torch.autograd.grad(y, (inputs.x, inputs.lora_a, inputs.lora_b), inputs.dy)
        return [y, *grads, torch.cuda.get_rng_state()]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    tensors = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))

    (times,) = tuning_file.results(tuning.device_and_versions(inputs.x.device)).values()
    assert times.keys() >= {"eager", "split", "fused", "fused 64x128"}
    assert all(0 < milliseconds < 1e3 for milliseconds in times.values())
    (plan,) = tuning.chosen().values()
    assert plan == ("stock" if tuning._fastest(times).stock else tuning._fastest(times).plan)

    def measured(shape):
        raise AssertionError("measured twice")

    monkeypatch.setattr(tuning, "_choices", {})  # as a new process
    monkeypatch.setattr(tuning, "_measured", measured)
    assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("plan", ["split", "fused", "fused 128x128", "fused 64x128"])
def test_every_plan_gives_the_same_result(plan):
    inputs = cuda_inputs()
    shape = tuning.Shape(inputs.x.device, 256, 256, 512, 8, torch.bfloat16, torch.bfloat16, False, False)
    if plan not in tuning._plans(shape):
        pytest.skip("the chip's own tile")
    y = lora_linear_by(plan, inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.bias, 2.0, 0.0)
    grads = torch.autograd.grad(y, (inputs.x, inputs.lora_a, inputs.lora_b), inputs.dy)
    assert_within_reference_budget([y.detach(), *grads], inputs)


def test_nothing_is_measured_in_a_capture(monkeypatch, tuned):
    inputs = cuda_inputs()
    step(inputs)  # loads what a capture must not load
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning_file, "results", lambda about: {})
    trials = []
    monkeypatch.setattr(tuning, "_trial", lambda shape, stream: trials.append(shape) or {})
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(inputs)
    assert trials == []


def test_more_than_2_31_elements():
    # x alone passes 2^31 elements; checked on its last rows, whose offsets a 32-bit product would fold back.
    M, K, N, R = 2**31 // 4096 + 64, 4096, 16, 8
    inputs = lora_linear_inputs(64, K, N, R, device="cuda", dtype=torch.bfloat16, bias=False)
    x = torch.zeros(M, K, device="cuda", dtype=torch.bfloat16)
    x[-64:] = inputs.x
    x.requires_grad_()
    lora_a, lora_b = inputs.lora_a.requires_grad_(), inputs.lora_b.requires_grad_()
    y = lora_linear(x, inputs.weight, lora_a, lora_b, scaling=inputs.scaling)
    dy = torch.zeros_like(y)
    dy[-64:] = inputs.dy
    actual = [y[-64:], *torch.autograd.grad(y, (x, lora_a, lora_b), dy)]
    actual[1] = actual[1][-64:]
    assert_within_reference_budget([tensor.detach() for tensor in actual], inputs)

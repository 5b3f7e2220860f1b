"""What only a CUDA device can show."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_fast import reference, support, tuning, tuning_file
from peft_fast.ops import lora_linear, prefix_attention
from peft_fast.ops.lora_linear import lora_linear_by
from peft_fast.testing import assert_within_budget, lora_linear_inputs, prefix_attention_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Memory is not poisoned here: the poison itself would not survive a graph capture."""


@pytest.fixture(autouse=True)
def kernels_serve_small_calls(monkeypatch):
    monkeypatch.setattr(support, "MIN_GPU_ELEMENTS", 0)


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


def captured(run):
    """A graph of `run` and its results, after a first run on another stream, as a capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def test_graph_capture():
    inputs = cuda_inputs()
    graph, results = captured(lambda: step(inputs))
    inputs.x.data.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(inputs), strict=True))


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A process that has measured nothing yet, with an empty cache folder."""
    monkeypatch.setenv("PEFT_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("PEFT_FAST_TUNE")
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_waiting", {})
    monkeypatch.setattr(tuning_file, "_read", {})


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


@pytest.mark.parametrize("plan", ["split", "fused", "fused 128x128", "fused 64x128", "fused tma"])
def test_every_plan_gives_the_same_result(plan):
    inputs = cuda_inputs()
    shape = tuning.Shape(inputs.x.device, 256, 256, 512, 8, torch.bfloat16, torch.bfloat16, False, False)
    if plan not in tuning._plans(shape):
        pytest.skip("the chip's own tile")
    y = lora_linear_by(plan, inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.bias, 2.0, 0.0, None)
    grads = torch.autograd.grad(y, (inputs.x, inputs.lora_a, inputs.lora_b), inputs.dy)
    assert_within_reference_budget([y.detach(), *grads], inputs)


def test_nothing_is_measured_in_a_capture(monkeypatch, tuned):
    inputs = cuda_inputs()
    step(inputs)  # loads what a capture must not load, and the plan of the table
    monkeypatch.setattr(tuning, "_choices", {})
    with monkeypatch.context() as untuned:
        untuned.setenv("PEFT_FAST_TUNE", "0")
        step(inputs)
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


def attention_inputs(dtype=torch.bfloat16, prefix_dtype=None, H_KV=2, DH=64, S=256):
    return prefix_attention_inputs(2, 4, H_KV, S, S, 32, DH, dtype=dtype, prefix_dtype=prefix_dtype, device="cuda")


def attention_step(inputs, causal=False, attention=prefix_attention):
    """y and the gradients of all inputs by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves().items()}
    y = attention(**leaves, is_causal=causal)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), inputs.dy), strict=True))


def assert_attention_within_budget(actual, inputs, causal=False):
    truth = attention_step(inputs.to(torch.float64), causal, reference.prefix_attention)
    eager = attention_step(inputs, causal, reference.prefix_attention)
    (Z, H, S, DH), P = inputs.query.shape, inputs.prefix_key.shape[1]
    for name, value in actual.items():
        assert_within_budget(value, truth[name], eager[name], length=DH + Z * H * S + S + P, name=name)


@pytest.fixture
def vendor_calls(monkeypatch):
    """The names of the vendor's functions that are called."""
    from peft_fast.kernels import vendor_attention  # needs Triton

    monkeypatch.setattr(vendor_attention, "MIN_LOGITS", 2**14)
    monkeypatch.setattr(vendor_attention, "MIN_FEATURES", 16)

    calls = []

    def counted(name, function):
        return lambda *args: calls.append(name) or function(*args)

    for name in ("fwd", "bwd"):
        monkeypatch.setattr(vendor_attention, name, counted(name, getattr(vendor_attention, name)))
    return calls


TORCHS_CHOICE_AND_FLASH = pytest.mark.parametrize(
    "kernel", [contextlib.nullcontext, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)], ids=["torchs", "flash"]
)


# Of the two kernels torch chooses cuDNN's on some chips alone.
@TORCHS_CHOICE_AND_FLASH
@pytest.mark.parametrize("DH", [64, 128])
@pytest.mark.parametrize("H_KV", [2, 4], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)],
    ids=["bf16", "fp16", "bf16-fp32"],
)
def test_prefix_added_to_the_vendors_part(dtypes, causal, H_KV, DH, kernel, vendor_calls):
    inputs = attention_inputs(*dtypes, H_KV, DH)
    with kernel():
        results = attention_step(inputs, causal)
    assert vendor_calls == ["fwd", "bwd"]
    assert_attention_within_budget(results, inputs, causal)


# Those of models, of other code, of y.sum(): none may be taken for another in what torch keeps of cuDNN.
@TORCHS_CHOICE_AND_FLASH
def test_layouts_beside_the_vendors_part(kernel, vendor_calls):
    inputs = attention_inputs()
    dy, query = inputs.dy, inputs.query
    for inputs.dy in (dy, dy.contiguous(), dy[:1, :1, :1, :1].expand_as(dy)):
        for inputs.query in (query, query.contiguous(), torch.cat([query, query], 3)[..., :64]):
            with kernel():
                results = attention_step(inputs)
            assert_attention_within_budget(results, inputs)
    assert vendor_calls == ["fwd", "bwd"] * 9


def test_small_calls_are_torchs(monkeypatch):
    inputs = attention_inputs(S=64)
    for least, name in ((0, "_PrefixAttentionBackward"), (1 << 24, "ScaledDotProduct")):
        monkeypatch.setattr(support, "MIN_GPU_ELEMENTS", least)
        y = prefix_attention(**{name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves().items()})
        assert name in y.grad_fn.name()
    assert_attention_within_budget(attention_step(inputs, causal=True), inputs, causal=True)


def test_short_calls_are_not_the_vendors(vendor_calls):
    attention_step(attention_inputs(S=64))
    assert vendor_calls == []


def test_deterministic_backward_is_not_the_vendors(vendor_calls):
    inputs = attention_inputs()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (attention_step(inputs, causal=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert vendor_calls == ["fwd", "fwd"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_attention_within_budget(first, inputs, causal=True)


def test_graph_capture_of_the_vendors_part(vendor_calls):
    inputs = attention_inputs()
    graph, results = captured(lambda: attention_step(inputs))
    inputs.query.normal_()
    graph.replay()
    assert vendor_calls == ["fwd", "bwd"] * 2
    assert_attention_within_budget(results, inputs)

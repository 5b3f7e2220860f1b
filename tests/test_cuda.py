"""What only a CUDA device can show."""

import pytest
import torch

from peft_fast import reference
from peft_fast.ops import lora_linear
from peft_fast.testing import lora_linear_inputs

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


def test_more_than_2_31_elements():
    # x alone passes 2^31 elements; checked on its last rows, whose offsets a 32-bit product would fold back.
    M, K, N, R = 2**31 // 4096 + 64, 4096, 16, 8
    inputs = lora_linear_inputs(64, K, N, R, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(M, K, device="cuda", dtype=torch.bfloat16)
    x[-64:] = inputs.x
    x.requires_grad_()
    lora_a, lora_b = inputs.lora_a.requires_grad_(), inputs.lora_b.requires_grad_()
    y = lora_linear(x, inputs.weight, lora_a, lora_b, scaling=inputs.scaling)
    dy = torch.zeros_like(y)
    dy[-64:] = inputs.dy
    actual = [y[-64:], *torch.autograd.grad(y, (x, lora_a, lora_b), dy)]
    actual[1] = actual[1][-64:]
    small = inputs.x.requires_grad_()
    truth = reference.lora_linear(small, inputs.weight, lora_a, lora_b, scaling=inputs.scaling)
    expected = [truth, *torch.autograd.grad(truth, (small, lora_a, lora_b), inputs.dy)]
    for value, true_value in zip(actual, expected, strict=True):
        assert torch.allclose(value, true_value, rtol=3e-2, atol=3e-2 * true_value.abs().max().item())

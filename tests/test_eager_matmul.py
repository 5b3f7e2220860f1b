"""Which library multiplies by the frozen weight on the CPU, and that its sums stay within the budget."""

import pytest
import torch

from peft_fast import eager, reference
from peft_fast.eager import matmul
from peft_fast.ops import lora_linear
from peft_fast.testing import assert_within_budget, lora_linear_inputs
from tests.test_ops_lora_linear import assert_op_within_budget

needs_one_dnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def taken(monkeypatch):
    """The shapes (M, K, N) that oneDNN multiplied, as on a CPU where it is the faster one."""
    shapes = []

    def linear(x, weight, bias):
        shapes.append((x.shape[0], *weight.shape[::-1]))
        return one_dnn_linear(x, weight, bias)

    one_dnn_linear = matmul._one_dnn_linear
    monkeypatch.setattr(matmul, "_has_one_dnn", lambda: True)
    monkeypatch.setattr(matmul, "_one_dnn_linear", linear)
    return shapes


@needs_one_dnn
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape", [(1024, 384, 384), (2800, 128, 384), (2800, 384, 128)], ids=lambda shape: "x".join(map(str, shape))
)
def test_budget(taken, shape, dropout_p):
    M, K, N = shape
    assert_op_within_budget(lora_linear_inputs(M, K, N, 8), "eager", dropout_p)
    assert taken == [(M, K, N), (M, N, K)]  # forward, and the input's gradient


@needs_one_dnn
def test_a_transposed_weight_and_a_strided_bias(taken):
    # GPT-2's Conv1D keeps the transpose; oneDNN would read a strided bias as if it were dense.
    M, K, N = 1024, 384, 384
    x, weight, lora_a, lora_b = torch.randn(M, K), torch.randn(K, N).t(), torch.randn(8, K), torch.randn(N, 8)
    bias = torch.randn(2 * N)[::2]
    y = lora_linear(x, weight, lora_a, lora_b, bias=bias)
    expected = reference.lora_linear(x, weight, lora_a, lora_b, bias=bias)
    x, weight, lora_a, lora_b, bias = (tensor.double() for tensor in (x, weight, lora_a, lora_b, bias))
    truth = reference.lora_linear(x, weight, lora_a, lora_b, bias=bias)
    assert taken == [(M, K, N)]
    assert_within_budget(y, truth, expected, length=K)


@needs_one_dnn
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(512, 512), torch.zeros(512, 512)),  # a sum so long that one chain exceeds the budget
        (torch.zeros(256, 384), torch.zeros(384, 384)),  # too few products
        (torch.zeros(2048, 64), torch.zeros(2048, 64)),  # too short sums
        (torch.zeros(1024, 384), torch.zeros(384, 768)[:, ::2]),  # not dense: a thousand times slower
        (torch.zeros(1024, 384), torch.zeros(384, 768)[:, :384]),
        (torch.zeros(384).expand(1024, 384), torch.zeros(384, 384)),
        (torch.zeros(1024, 384, dtype=torch.float64), torch.zeros(384, 384, dtype=torch.float64)),
    ],
    ids=["long", "few", "short", "strided", "sliced", "expanded", "float64"],
)
def test_what_stays_with_torchs_library(taken, x, weight):
    out = torch.ones(len(x), len(weight), dtype=x.dtype)
    assert torch.equal(matmul.add_linear(out, x, weight, ""), torch.ones_like(out))
    assert not taken


@needs_one_dnn
def test_the_switch_of_torch_is_kept(taken):
    inputs = lora_linear_inputs(1024, 384, 384, 8)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        eager.lora_fwd(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, None, 1.0, 0, None)
    assert not taken


@pytest.mark.parametrize("R", [8, 64])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_gradients_of_the_factors_are_dense(R, dropout_p):
    inputs = lora_linear_inputs(512, 128, 160, R)
    leaves = [inputs.lora_a.requires_grad_(), inputs.lora_b.requires_grad_()]
    y = lora_linear(inputs.x, inputs.weight, *leaves, dropout_p=dropout_p)
    assert all(gradient.is_contiguous() for gradient in torch.autograd.grad(y, leaves, inputs.dy))


@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("K", [384, 2112], ids=["cached", "batched"])  # on either side of what Intel's caches hold
@pytest.mark.parametrize("R", [8, 48])
def test_products_of_tall_matrices_on_either_vendors_cpu(R, K, intel, monkeypatch):
    monkeypatch.setattr(matmul, "is_intel", lambda: intel)
    draw = torch.Generator().manual_seed(0)
    s, x = torch.randn(512, R, generator=draw), torch.randn(512, K, generator=draw)
    assert_within_budget(matmul.tall_mm(s, x, ""), s.double().t() @ x.double(), s.t() @ x, length=512)


@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("K", [384, 2112], ids=["cached", "batched"])
@pytest.mark.parametrize("R", [2, 8, 12])
def test_products_with_narrow_factors_on_either_vendors_cpu(R, K, intel, monkeypatch):
    monkeypatch.setattr(matmul, "is_intel", lambda: intel)
    draw = torch.Generator().manual_seed(0)
    x, factor = torch.randn(512, K, generator=draw), torch.randn(K, R, generator=draw)
    for laid_out in (factor, factor.t().contiguous().t()):  # B's rows, and A's
        product = matmul.narrow_mm(x, laid_out, 0.5, "")
        assert_within_budget(product, 0.5 * x.double() @ factor.double(), 0.5 * (x @ factor), length=K)


@pytest.fixture
def biased(monkeypatch):
    """How often a bias was more than an operand."""
    calls, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: calls.append(0) or addmm(*args, **kwargs))
    return calls


@pytest.mark.parametrize("strided", [False, True])
def test_a_large_result_takes_its_bias_as_one_more_rank(strided, biased):
    M, K, N, R = 1024, 128, 520, 48
    assert M * N >= matmul.BIASED_ELEMENTS
    inputs = lora_linear_inputs(M, K, N, R)
    bias = torch.stack([inputs.bias, inputs.bias], 1)[:, 0] if strided else inputs.bias
    s, factor = torch.randn(M, R), inputs.lora_b.t()
    y = matmul.linear_plus(inputs.x, inputs.weight, bias, s, factor, "")
    assert not biased
    x, weight, bias, s, factor = (t.double() for t in (inputs.x, inputs.weight, bias, s, factor))
    truth = x @ weight.t() + bias + s @ factor
    expected = inputs.x @ inputs.weight.t() + inputs.bias + s.float() @ factor.float()
    assert_within_budget(y, truth, expected, length=K + R)


def test_a_bias_is_no_operand_of_products_that_round_it(biased):
    tensors = torch.zeros(1024, 8), torch.zeros(520, 8), torch.ones(520), torch.zeros(1024, 2), torch.ones(2, 520)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        matmul.linear_plus(*tensors, "")
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision
    assert biased


@pytest.mark.parametrize(("text", "intel"), [("vendor_id : GenuineIntel", True), ("vendor_id : AuthenticAMD", False)])
def test_the_vendor_of_the_cpu(text, intel, monkeypatch):
    ask = matmul.is_intel.__wrapped__
    monkeypatch.setattr(matmul.Path, "read_text", lambda self: text)
    assert ask() is intel
    monkeypatch.setattr(matmul.Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(matmul.platform, "processor", lambda: f"Family 6, {text}")
    assert ask() is intel


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
@pytest.mark.parametrize("intel", [False, True])
def test_one_dnn_is_for_cpus_that_mkl_was_not_written_for(intel, monkeypatch):
    monkeypatch.setattr(matmul, "is_intel", lambda: intel)
    assert matmul._has_one_dnn.__wrapped__() is not intel

"""Compiled dropouts of a patched base model on the CPU: a mask of ours, which the compiler's products read."""

import pytest
import torch
from test_patch_attention import attention_modules, inputs, usual, values_and_gradients
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, BertConfig, BertForSequenceClassification

import peft_fast
from models import batch, lora_model, patched_copy
from peft_fast import eager, reference, support
from peft_fast.ops.attention_dropout import apply_attention_dropout
from peft_fast.patch import Dropout
from peft_fast.testing import assert_within_budget

P = 0.25
THRESHOLD = reference.drop_threshold(P)
SHAPE = (4, 128, 128)

# Inductor imports modules that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_dynamo(monkeypatch):
    # Compiled code draws one number after the other on every CPU.
    monkeypatch.setattr(support, "draws_one_by_one", lambda: False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def module():
    return Dropout(P).train()


def masks_in(graph):
    return sum(node.target is torch.ops.peft_fast.dropout_mask for node in graph.graph.nodes)


@pytest.fixture
def bert():
    """A LoRA model in training: 7 dropouts, 2 of them attention's, and 12 LoRA layers that drop nothing."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    return patched_copy(lora_model(base=BertForSequenceClassification(config))).train()


def test_every_dropout_of_a_model_takes_the_mask_op(bert):
    masks = []

    def counted(graph, _):
        masks.append(masks_in(graph))
        assert not any(
            "dropout" in str(node.target) and "peft_fast" not in str(node.target) for node in graph.graph.nodes
        )
        return graph

    torch.compile(bert, fullgraph=True, backend=counted)(**batch())
    drops = sum(type(module) is Dropout for module in bert.modules())
    assert masks == [drops]
    assert drops > 4


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_forward_and_backward_have_one_mask(backend, module):
    compiled, x = torch.compile(module, fullgraph=True, backend=backend), torch.randn(SHAPE, requires_grad=True)
    ys = [compiled(x), compiled(x)]
    for y in ys:
        keep = torch.autograd.grad(y, x, torch.ones_like(y))[0] != 0
        assert abs((~keep).double().mean() - P) < 5 * (P * (1 - P) / x.numel()) ** 0.5
        assert torch.allclose(y, x * keep * reference.keep_scale(THRESHOLD))
    assert not torch.equal(*ys)


@pytest.mark.parametrize("shape", [(), (0, 5), (3, 0), (7,), (2, 3, 4)], ids=str)
def test_every_shape(shape, module):
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(torch.ones(shape))
    scale = reference.keep_scale(THRESHOLD)
    assert y.shape == shape
    assert ((y == 0) | ((y - scale).abs() < 1e-6)).all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_inputs_that_are_no_plain_tensors_stay_torchs(module):
    nested = torch.nested.nested_tensor([torch.ones(60, 128), torch.ones(20, 128)], layout=torch.jagged)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(nested)
    assert 0.2 < (y.values() == 0).double().mean() < 0.3


def test_one_graph_serves_small_and_large_inputs(module):
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 400):
        compiled(torch.randn(rows, 128))
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_draws_the_same_mask(use_reentrant, module):
    step = torch.compile(
        lambda x: checkpoint(lambda x: module(x) * x, x, use_reentrant=use_reentrant),
        fullgraph=True,
        backend="aot_eager",
    )
    x = torch.randn(SHAPE, requires_grad=True)
    y = step(x)
    y.sum().backward()
    assert torch.allclose(x.grad * x, 2 * y, atol=1e-6)


def test_evaluation_and_what_is_exported_stay_torchs(module, bert):
    exported = torch.export.export(nn.Sequential(module), (torch.ones(SHAPE),))
    assert "peft_fast" not in exported.graph_module.code
    assert "dropout" in exported.graph_module.code
    masks = []
    torch.compile(bert.eval(), fullgraph=True, backend=lambda graph, _: masks.append(masks_in(graph)) or graph)(
        **batch()
    )
    assert masks == [0]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_attentions_values_and_gradients(backend):
    query, key, value, bias, dy = inputs(S=28)
    bias[1, :, 4] = -torch.inf  # a query that sees no key
    seed = torch.tensor([3])
    mask = eager.dropout_mask(seed, (2 * 3 * 28, 28), THRESHOLD).view(2, 3, 28, 28)
    compiled = torch.compile(apply_attention_dropout, fullgraph=True, backend=backend)
    y, *grads = values_and_gradients(lambda *qkv: compiled(*qkv, bias, 0.25, THRESHOLD, seed), query, key, value, dy)
    assert (y[1, :, 4] == 0).all()
    assert (grads[0][1, :, 4] == 0).all()
    bias[1, :, 4], dy[1, :, 4] = 0, 0  # the same gradients, without a row of NaN
    expected = values_and_gradients(lambda *qkv: usual(*qkv, bias, mask), query, key, value, dy)
    wide = (tensor.double() for tensor in (query, key, value, dy))
    truth = values_and_gradients(lambda *qkv: usual(*qkv, bias.double(), mask), *wide)
    expected[0][1, :, 4], truth[0][1, :, 4] = 0, 0
    for name, *tensors in zip(("y", "dq", "dk", "dv"), (y, *grads), truth, expected, strict=True):
        assert_within_budget(*tensors, length=28, name=name)


@pytest.mark.parametrize("change", [None, "causal", "bfloat16", "grouped", "exported"])
def test_attentions_calls(change, bert):
    module = attention_modules(bert)[0]
    query, key, value, _, _ = inputs(T=20, dtype=torch.bfloat16 if change == "bfloat16" else torch.float32)
    if change == "grouped":
        key, value, module.num_key_value_groups = key[:, :1], value[:, :1], 3
    module.is_causal = change == "causal"

    class Attention(nn.Module):
        def forward(self, query, key, value):
            return AttentionInterface()["sdpa"](module, query, key, value, None, dropout=P)[0]

    if change == "exported":
        assert "peft_fast" not in torch.export.export(Attention(), (query, key, value)).graph_module.code
        return
    masks = []

    def counted(graph, _):
        masks.append(masks_in(graph))
        return graph

    y = torch.compile(Attention(), fullgraph=True, backend=counted)(query, key, torch.ones_like(value))
    assert masks == [change in (None, "causal")]
    assert y.shape == (2, 20, 3, 16)
    sums = y.double().mean(-1)  # of a row's kept weights, over 1 - p
    assert abs(sums.mean() - 1) < 0.2
    assert sums.std() > 0.05
    if change == "causal":
        assert all(abs(first - round(first / (4 / 3)) * 4 / 3) < 1e-5 for first in sums[:, 0].flatten().tolist())


def test_unpatching_gives_torchs_back(bert):
    peft_fast.unpatch(bert)
    masks = []
    torch.compile(bert, fullgraph=True, backend=lambda graph, _: masks.append(masks_in(graph)) or graph)(**batch())
    assert masks == [0]

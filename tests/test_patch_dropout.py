"""Dropout modules of the base model: on the CPU they draw their masks from a seed once the model is patched."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

import peft_fast
from models import batch, lora_layers, lora_model, patched_copy
from peft_fast import BottleneckConfig, PrefixConfig, eager, reference, support
from peft_fast.ops.dropout import apply_dropout
from peft_fast.testing import assert_within_budget, saved_bytes

SHAPE = (4, 128, 128)  # just large enough to gain
SIZES = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
METHODS = ["bottleneck adapters", "prefixes", "prefixes at the input"]
DRAWS_ONE_BY_ONE = support.draws_one_by_one


@pytest.fixture(autouse=True)
def _as_on_a_cpu_where_it_gains(monkeypatch):
    monkeypatch.setattr(support, "draws_one_by_one", lambda: True)


def dropout_modules(model):
    inside = {part for layer in lora_layers(model) for part in layer.modules()}
    return [module for module in model.modules() if isinstance(module, nn.Dropout) and module not in inside]


def bert_with_dropout(**config):
    torch.manual_seed(0)
    return lora_model(base=BertForSequenceClassification(BertConfig(**SIZES, **config)), lora_dropout=0.1)


@pytest.fixture
def module():
    model = patched_copy(bert_with_dropout())
    return dropout_modules(model)[0].train()


# As `.view` of a projection is split into heads, an image's features, a row for all, every other feature.
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads": lambda x: x.unflatten(2, (4, 32)).transpose(1, 2),
    "channels last": lambda x: x.unflatten(2, (8, 16)).to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand(6, -1, -1),
    "sliced": lambda x: x[:, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.1, 0.4], ids=["points", "bytes"])
@pytest.mark.parametrize("dtype", support.FLOATING, ids=str)
def test_values_gradient_and_strides(p, dtype, layout):
    x = LAYOUTS[layout](torch.randn(SHAPE, dtype=dtype)).detach().requires_grad_()
    seed, threshold = torch.tensor([5]), reference.drop_threshold(p)
    y = apply_dropout(x, threshold, seed)
    assert y.stride() == F.dropout(x, p).stride()
    mask = eager.dropout_mask(seed, (x.numel(), 1), threshold).as_strided(x.shape, y.stride())
    for dy in (torch.randn(x.shape, dtype=dtype), torch.randn(x.mT.shape, dtype=dtype).mT):
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        for actual, given in ((y, x), (dx, dy)):
            wide = given.double() * mask * reference.keep_scale(threshold)
            assert_within_budget(actual, wide, given * mask * reference.keep_scale(threshold), length=1)


def test_long_rows_are_dropped_evenly():
    K, threshold = 3 << 22, reference.drop_threshold(0.01)
    dropped = apply_dropout(torch.ones(K), threshold, torch.tensor([1])).eq(0).view(-1, 3).double()
    assert (dropped.mean(0) - 0.01).abs().max() < 5 * (0.01 * 0.99 / (K / 3)) ** 0.5


def test_second_derivatives_and_batched_gradients():
    x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    seed, threshold = torch.tensor([5]), reference.drop_threshold(0.3)
    assert torch.autograd.gradgradcheck(lambda x: apply_dropout(x.square(), threshold, seed), x)
    y, dy = apply_dropout(x, threshold, seed), torch.randn(3, 8, 16, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in dy])
    assert torch.equal(batched, expected)
    mapped = torch.func.vmap(lambda row: torch.autograd.grad(y, x, row, retain_graph=True)[0])(dy)
    assert torch.equal(mapped, expected)


def test_keeps_the_seed_alone(module):
    x = torch.randn(SHAPE, requires_grad=True)
    assert saved_bytes(lambda: module(x), []) == 8
    assert saved_bytes(lambda: nn.Dropout(0.1)(x), []) == 4 * x.numel()


def test_draws_with_torchs_generator(module):
    x = torch.ones(SHAPE)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
    assert first.mean() == pytest.approx(1, abs=5 * (0.1 / 0.9 / x.numel()) ** 0.5)


def _small(x, module):
    return x[:1, :50]


def _in_evaluation(x, module):
    module.eval()
    return x


def _in_place(x, module):
    module.inplace = True
    return x.clone()


def _everything(x, module):
    module.p = 1.0
    return x


def _nothing(x, module):
    module.p = 0.0
    return x


@pytest.mark.parametrize("prepare", [_small, _in_evaluation, _in_place, _everything, _nothing])
def test_stock_runs(prepare, module):
    x = prepare(torch.randn(SHAPE), module)
    stock = nn.Dropout(module.p, module.inplace).train(module.training)
    torch.manual_seed(2)
    expected = stock(x.clone())
    torch.manual_seed(2)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("taken", [1, 100], ids=["a seed", "a number an element"])
def test_stock_runs_where_it_draws_in_parallel(taken, module, monkeypatch):
    def bernoulli_(self, p, *, generator):
        return self.copy_(torch.rand(min(taken, len(self)), generator=generator)[:1])

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "bernoulli_", bernoulli_)
        one_by_one = DRAWS_ONE_BY_ONE.__wrapped__()
    assert one_by_one == (taken == 100)
    monkeypatch.setattr(support, "draws_one_by_one", lambda: one_by_one)
    assert (saved_bytes(lambda: module(torch.ones(SHAPE, requires_grad=True)), []) == 8) == one_by_one


def test_stock_runs_where_calls_are_watched_or_transformed(module):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(SHAPE)
    assert module(torch.empty(SHAPE, device="meta")).is_meta
    with FakeTensorMode() as mode:
        assert module(mode.from_tensor(x)).shape == x.shape
    assert "peft_fast.dropout_mask" in make_fx(module)(x).code
    torch.func.vmap(module, randomness="different")(x)
    assert (torch.func.grad(lambda x: module(x).sum())(x) == 0).any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_stock_runs_on_nested_tensors(module):
    nested = torch.nested.nested_tensor([torch.randn(600, 128), torch.randn(200, 128)], requires_grad=True)
    module(nested).to_padded_tensor(0).sum().backward()


@pytest.mark.parametrize("watched", ["nothing", "forward", "backward"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", ["dropout", "LoRA layer"])
def test_checkpointing_draws_the_same_mask(kind, use_reentrant, watched, module):
    if kind == "LoRA layer":
        module = lora_layers(patched_copy(lora_model(lora_dropout=0.5)))[0]
        module.lora_B["default"].weight.data.mul_(100)
    x = torch.randn(2048, next(module.parameters(), torch.empty(1, 128)).shape[1], requires_grad=True)

    def step():
        """The gradient is that of the very masks of this y."""
        with FlopCounterMode(display=False) if watched == "forward" else nullcontext():
            y = checkpoint(lambda x: module(x) * 1.0, x, use_reentrant=use_reentrant)
        x.grad = None
        with FlopCounterMode(display=False) if watched == "backward" else nullcontext():
            y.backward(y.detach())
        return y.detach(), x.grad

    y, gradient = step()
    if kind == "dropout":
        assert torch.equal(gradient == 0, y == 0)
    else:  # Σ y² = <x, dx> for what is linear in x and has no bias
        module.base_layer.bias.data.zero_()
        y, gradient = step()
        assert (x * gradient).sum().item() == pytest.approx(y.square().sum().item(), rel=1e-4)


def test_a_sparse_gradient_stays_sparse(module):
    weight = torch.randn(600, 128, requires_grad=True)
    F.embedding(torch.tensor([1, 2]), module(weight), sparse=True).sum().backward()
    assert weight.grad.layout == torch.sparse_coo


def test_a_default_device_changes_nothing(module, monkeypatch):
    with torch.device("meta"):
        expected = DRAWS_ONE_BY_ONE.__wrapped__()
        assert module(torch.ones(SHAPE, device="cpu")).is_cpu
    assert expected == DRAWS_ONE_BY_ONE.__wrapped__()
    gradient = torch.ones(2, *SHAPE)
    x = torch.ones(SHAPE, requires_grad=True)
    y = module(x)
    with torch.device("meta"):
        (dx,) = torch.autograd.grad(y, x, gradient[0], retain_graph=True)
        assert dx.is_cpu
        assert torch.equal(dx, y)
        assert torch.autograd.grad(y, x, gradient, is_grads_batched=True)[0].is_cpu


class TestPatch:
    def test_modules_of_the_base_model_change_and_change_back(self):
        model = bert_with_dropout()
        count = len(dropout_modules(model))
        report = peft_fast.patch(model)
        assert report.dropouts == count > 3
        assert f"; {count} dropouts of the base model patched\n" in str(report)
        assert {type(module) for module in dropout_modules(model)} == {peft_fast.patch.__globals__["Dropout"]}
        layer = lora_layers(model)[0]
        assert type(layer.lora_dropout["default"]) is nn.Dropout  # part of the layer's op
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        peft_fast.unpatch(model)
        assert {type(module) for module in dropout_modules(model)} == {nn.Dropout}
        for copied in copies:
            assert peft_fast.report(copied) == report

    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    def test_the_report_says_why_dropout_is_slow(self, dropout_p, monkeypatch):
        model = lora_model("llama", lora_dropout=dropout_p)
        fast = peft_fast.patch(model)
        monkeypatch.setattr(support.dropout_native, "_loaded", "cc: nothing there")
        slow = peft_fast.report(model)
        assert "numpy" not in str(fast)
        assert ("numpy draws dropout, more slowly: cc: nothing there; CC names" in str(slow)) == bool(dropout_p)
        assert (slow == fast) == (not dropout_p)

    def test_a_merged_model_can_be_unpatched(self):
        stock = bert_with_dropout()
        merged = patched_copy(stock).merge_and_unload()
        peft_fast.unpatch(merged)
        assert not [module for module in merged.modules() if type(module).__module__.startswith("peft_fast")]
        assert torch.equal(merged.eval()(**batch()).logits, stock.merge_and_unload().eval()(**batch()).logits)

    def test_without_dropout_none_is_reported(self):
        model = bert_with_dropout(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model.base_model.classifier.p = 0.0
        for module in dropout_modules(model):
            module.p = 0.0
        report = peft_fast.patch(model)
        assert report.dropouts == 0
        assert "dropout" not in str(report).splitlines()[0]

    @pytest.mark.parametrize(
        "config", [BottleneckConfig(style="houlsby"), PrefixConfig(), PrefixConfig(layers="input")], ids=METHODS
    )
    def test_models_of_this_packages_own_methods(self, config):
        base = BertForSequenceClassification(BertConfig(**SIZES))
        count = sum(type(module) is nn.Dropout for module in base.modules())
        model = get_peft_model(base, config).train()
        with pytest.raises(ValueError, match="no LoRA layer"):
            peft_fast.patch(nn.Linear(2, 2))
        assert {row.state for row in peft_fast.report(model).rows} == {"fused"}
        report = peft_fast.patch(model, strict=True)
        assert (report.dropouts, {row.state for row in report.rows}) == (count, {"fused"})
        ids = torch.randint(2, 50, (16, 64))
        model(input_ids=ids, labels=torch.arange(16) % 2).loss.backward()
        peft_fast.unpatch(model)
        assert sum(type(module) is nn.Dropout for module in model.modules()) == count

    def test_subclasses_and_a_forward_of_its_own_stay(self):
        class Louder(nn.Dropout):
            pass

        model = bert_with_dropout()
        first, second, *_ = dropout_modules(model)
        first.__class__ = Louder
        second.forward = lambda x: x + 1
        peft_fast.patch(model)
        assert type(first) is Louder
        assert torch.equal(second(torch.zeros(SHAPE)), torch.ones(SHAPE))

    def test_a_forward_that_somebody_kept_is_stocks_after_unpatching(self):
        model = patched_copy(bert_with_dropout())
        module, layer = dropout_modules(model)[0], lora_layers(model)[0]
        kept = module.forward, layer.forward
        peft_fast.unpatch(model)
        x = torch.randn(1024, 64, requires_grad=True)
        assert saved_bytes(lambda: kept[0](x), []) == 4 * x.numel()
        model.eval()
        assert torch.equal(kept[0](x), x)
        assert torch.equal(kept[1](x), layer(x))

    def test_none_is_reported_where_stock_draws_in_parallel(self, monkeypatch):
        monkeypatch.setattr(support, "draws_one_by_one", lambda: False)
        assert peft_fast.patch(bert_with_dropout()).dropouts == 0

    def test_hooks_fire(self, module):
        seen = []
        module.register_forward_hook(lambda *args: seen.append(1))
        module(torch.randn(SHAPE))
        assert seen == [1]

    def test_a_step_trains_what_stock_trains(self):
        model = patched_copy(bert_with_dropout())
        ids = torch.randint(2, 50, (16, 64))
        model(input_ids=ids, labels=torch.arange(16) % 2).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    def test_evaluation_is_stocks(self):
        stock = bert_with_dropout().eval()
        assert torch.allclose(patched_copy(stock)(**batch()).logits, stock(**batch()).logits, atol=1e-6)

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_fast import reference
from peft_fast.layers import BottleneckAdapter, LoraLinear


def test_is_the_layer_of_peft():
    base = nn.Sequential(nn.Linear(24, 40))
    layer = LoraLinear(copy.deepcopy(base[0]), 4, 12, use_rslora=True)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=["0"]))
    stock = model.base_model.model[0]
    with torch.no_grad():
        stock.lora_A["default"].weight.copy_(layer.lora_a)
        stock.lora_B["default"].weight.copy_(layer.lora_b.normal_())
    x = torch.randn(3, 5, 24)
    assert torch.allclose(layer(x), stock(x), atol=1e-5)
    assert layer.scaling == stock.scaling["default"]


def test_starts_as_the_base_layer_and_trains_its_factors_alone():
    base = nn.Linear(24, 40)
    layer = LoraLinear(base, 4, 8)
    x = torch.randn(6, 24)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}
    assert not base.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(dtype):
    layer = LoraLinear(nn.Linear(24, 40, dtype=dtype), 4, 8, lora_dropout=0.5).eval()
    nn.init.normal_(layer.lora_b)
    x, weight = torch.randn(6, 24, dtype=dtype), layer.base_layer.weight.clone()
    before = layer(x)
    layer.merge()
    layer.merge()
    tolerance = 30 * torch.finfo(dtype).eps
    assert torch.allclose(layer(x), before, rtol=tolerance, atol=tolerance * before.abs().max().item())
    assert not torch.allclose(layer.base_layer.weight, weight)
    layer.unmerge()
    layer.unmerge()
    assert torch.allclose(layer.base_layer.weight, weight, atol=tolerance)


def test_dropout_in_training_alone():
    layer = LoraLinear(nn.Linear(64, 40), 4, 8, lora_dropout=0.5)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(6, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Conv1d(1, 1, 1), 4, 8), "base_layer: expected exactly nn.Linear, got Conv1d"),
        ((nn.Linear(2, 2), 0, 8), "r: expected a whole rank of at least 1, got 0"),
        ((nn.Linear(2, 2), 4, 8, 1.5), r"lora_dropout: must lie in \[0, 1\), got 1.5"),
    ],
    ids=["layer", "rank", "dropout"],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoraLinear(*arguments)


def test_a_merged_layer_loads_as_merged():
    merged, fresh = (LoraLinear(nn.Linear(24, 40), 4, 8) for _ in range(2))
    nn.init.normal_(merged.lora_b)
    merged.merge()
    fresh.load_state_dict(merged.state_dict())
    x = torch.randn(6, 24)
    assert torch.equal(fresh(x), merged(x))


@pytest.mark.parametrize("scaling", [0.5, "learned"])
def test_bottleneck_adapter_is_the_usual_modules(scaling):
    adapter = BottleneckAdapter(24, 6, activation="gelu", scaling=scaling, norm_before=True, norm_after=True)
    nn.init.normal_(adapter.up_weight)
    x = torch.randn(3, 5, 24)
    down, up = nn.Linear(24, 6), nn.Linear(6, 24)
    down.weight, down.bias, up.weight, up.bias = (
        getattr(adapter, name) for name in ("down_weight", "down_bias", "up_weight", "up_bias")
    )
    term = up(nn.functional.gelu(down(adapter.norm_before(x)))) * adapter.scaling
    assert torch.allclose(adapter(x), adapter.norm_after(x + term), atol=1e-6)
    adapter(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_bottleneck_adapter_starts_as_its_residual():
    x = torch.randn(6, 24)
    assert torch.equal(BottleneckAdapter(24, 6, dropout=0.1)(x), x)
    assert (BottleneckAdapter(24, 6, init="houlsby")(x) - x).abs().max() < 0.1


def test_parallel_bottleneck_adapter():
    adapter, feed_forward = BottleneckAdapter(24, 6, 40), nn.Linear(24, 40)
    nn.init.normal_(adapter.up_weight)
    x = torch.randn(6, 24)
    y = adapter(x, residual=feed_forward(x))
    expected = feed_forward(x) + reference.bottleneck_adapter(
        x, adapter.down_weight, adapter.up_weight, down_bias=adapter.down_bias, up_bias=adapter.up_bias
    )
    assert torch.allclose(y, expected, atol=1e-5)


def test_bottleneck_adapter_drops_in_training_alone():
    adapter = BottleneckAdapter(24, 6, dropout=0.5)
    nn.init.normal_(adapter.up_weight)
    x = torch.randn(6, 24)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size: expected a whole number"),
        ({"bottleneck_size": 4, "activation": "mish"}, "activation: expected one of relu"),
        ({"bottleneck_size": 4, "dropout": 1.5}, "dropout: must lie"),
        ({"bottleneck_size": 4, "scaling": "big"}, "scaling: expected a number"),
        ({"bottleneck_size": 4, "init": "ones"}, "init: expected one of houlsby"),
    ],
)
def test_bottleneck_adapter_rejects_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(24, **arguments)


class Usual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm_before = nn.LayerNorm(384) if norm == "before" else nn.Identity()
        self.norm_after = nn.LayerNorm(384) if norm == "after" else nn.Identity()
        self.term = nn.Sequential(nn.Linear(384, 24), nn.ReLU(), nn.Linear(24, 384))

    def forward(self, x):
        return self.norm_after(x + self.term(self.norm_before(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_compiled_without_dropout_is_the_graph_of_the_usual_modules(norm):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    ours = BottleneckAdapter(384, 24, norm_before=norm == "before", norm_after=norm == "after")
    graphs = []
    for layer in (Usual(norm), ours):
        calls = []

        def record(graph, _, calls=calls):
            calls += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
        compiled(torch.randn(512, 384, requires_grad=True)).sum().backward()
        graphs.append(calls)
    assert graphs[0] == graphs[1]
    assert len(graphs[0]) > 15

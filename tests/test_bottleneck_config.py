"""The options of bottleneck adapters: what each does, and which are refused."""

import re

import pytest
import torch
from adapted import adapted, assert_same, bottleneck_layers, fill, logits, step
from families import FAMILIES, batch, build
from peft import PeftModel, get_peft_model
from torch import nn

from peft_fast import BottleneckConfig, reference
from peft_fast.methods import BottleneckLayer, bottleneck
from peft_fast.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = pytest.mark.parametrize(
    ("norm_after", "residual_after_norm"),
    [(False, False), (True, False), (True, True)],
    ids=["no norm after", "norm of the sum", "norm of the term"],
)
NORMALIZE_LAST = ("bert", "roberta", "distilbert", "electra", "albert", "bart", "opt_postnorm")


@NORMS
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_options_reach_the_op(activation, norm_after, residual_after_norm):
    options = {"norm_before": True, "norm_after": norm_after, "residual_after_norm": residual_after_norm}
    config = BottleneckConfig(
        style="parallel", target_modules=["0"], bottleneck_size=3, activation=activation, scaling="learned", **options
    )
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    fill(model)
    (layer,) = bottleneck_layers(model)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    x = torch.randn(4, 6)

    def expected(dtype):
        def norm(norms):
            return tuple(p.to(dtype) for p in norms["default"].parameters()) if "default" in norms else None

        return reference.bottleneck_adapter(
            x.to(dtype),
            down.weight.to(dtype),
            up.weight.to(dtype),
            down_bias=down.bias.to(dtype),
            up_bias=up.bias.to(dtype),
            activation=activation,
            scaling=layer.bottleneck_scaling["default"].to(dtype),
            residual=layer.base_layer(x).to(dtype),
            norm_before=norm(layer.bottleneck_norm_before),
            norm_after=norm(layer.bottleneck_norm_after),
            residual_after_norm=residual_after_norm,
        )

    assert_within_budget(model(x), expected(torch.float64), expected(torch.float32), length=6)


class FeedForward(nn.Module):
    """The feed-forward of a layer that normalizes last, or first: what it adds to its input r is h."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.fc1, self.fc2, self.norm = last, nn.Linear(6, 9), nn.Linear(9, 6), nn.LayerNorm(6)

    def forward(self, r):
        u = self.fc2(self.fc1(r if self.last else self.norm(r)).tanh()) + r
        return self.norm(u) if self.last else u


@NORMS
@pytest.mark.parametrize(
    ("last", "residual_from"), [(True, "branch"), (True, "sum"), (True, "norm"), (False, "branch"), (False, "sum")]
)
def test_residual_from(last, residual_from, norm_after, residual_after_norm):
    """Results and gradients, that of r too, of LN(q + s·t(LN(h + r)) + r) and of q + s·t(h + r) + r."""
    torch.manual_seed(0)
    feed_forward = FeedForward(last).double()
    places = {"target_modules": ["norm" if last else "fc2"], "source_module": "fc1" if last else "norm"}
    around_sum = last and residual_from == "branch"  # where h + r is one
    if around_sum:
        del places["source_module"]
    norms = {"norm_after": norm_after, "residual_after_norm": residual_after_norm}
    model = get_peft_model(
        feed_forward, BottleneckConfig(bottleneck_size=3, scaling=0.7, residual_from=residual_from, **places, **norms)
    )
    fill(model)
    (layer,) = bottleneck_layers(model)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    norm = feed_forward.norm.base_layer if last else nn.Identity()
    fc2 = feed_forward.fc2 if last else feed_forward.fc2.base_layer

    r = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    h = fc2(feed_forward.fc1(r if last else feed_forward.norm(r)).tanh())
    x = norm(h + r)
    q = {"branch": h + r if around_sum else h, "sum": h + r, "norm": x}[residual_from]
    v = 0.7 * up(down(x).relu())
    after = layer.bottleneck_norm_after["default"] if norm_after else nn.Identity()
    v = q + after(v) if residual_after_norm else after(q + v)
    expected = norm(v if around_sum else v + r)
    leaves = [r, *(p for p in model.parameters() if p.requires_grad)]
    y, dy = model(r), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("residual_from", ["sum", "norm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_residual_from_at_the_default_places(family, residual_from, monkeypatch):
    """r is what the base model adds to the feed-forward's output, seen here as the difference of h + r and h."""
    if residual_from == "norm" and family not in NORMALIZE_LAST:
        with pytest.raises(ValueError, match="residual_from: 'norm' needs a LayerNorm as the target, got a"):
            adapted(family, residual_from="norm")
        return
    calls = []
    op = bottleneck.apply_bottleneck_adapter

    def recorded(x, residual, *args):
        calls.append((x, residual, op(x, residual, *args)))
        return calls[-1][2]

    monkeypatch.setattr(bottleneck, "apply_bottleneck_adapter", recorded)
    model = adapted(family, residual_from=residual_from)
    outputs, received = [], []
    for layer in bottleneck_layers(model):
        if family in NORMALIZE_LAST:
            layer.base_layer.register_forward_pre_hook(lambda m, args: received.append(args[0]))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "bottleneck_" not in name and module.weight.shape == (32, 64):
            module.register_forward_hook(lambda m, args, y: outputs.append(y))
    logits(model, family)
    assert calls
    if family not in NORMALIZE_LAST:
        assert all(x is residual for x, residual, _ in calls)
        return
    for u, last, h, (x, residual, y) in zip(received[::2], received[1::2], outputs, calls, strict=True):
        assert residual is (u if residual_from == "sum" else x)
        torch.testing.assert_close(last, y + (u - h.view_as(u)))


@pytest.mark.parametrize(("family", "residual_from"), [("bert", "norm"), ("opt_postnorm", "sum"), ("llama", "sum")])
def test_residual_from_saved_checkpointed_and_compiled(family, residual_from, tmp_path):
    model = adapted(family, residual_from=residual_from)
    branch = logits(adapted(family), family)
    expected, gradients = logits(model, family), step(model, family)[1]
    assert not torch.allclose(expected, branch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, family), expected)
    assert_same(step(loaded, family)[1], gradients)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, family), logits(build(family), family))
    assert not any(
        source.take() is not None for layer in bottleneck_layers(loaded) for source in layer.bottleneck_source.values()
    )
    loaded.enable_input_require_grads()
    loaded.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step(loaded, family)[1], gradients)
    torch._dynamo.reset()
    model.base_model.model.loss_type = "ForCausalLM"  # named, since guessing it logs, which no graph can hold
    ids = batch(family)["input_ids"]
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


def test_residual_from_needs_what_the_model_adds():
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="residual_from: 'sum' needs source_module"):
        get_peft_model(net, BottleneckConfig(target_modules=["0"], residual_from="sum"))
    late = get_peft_model(net, BottleneckConfig(target_modules=["0"], residual_from="sum", source_module="1"))
    with pytest.raises(ValueError, match="source_module: '1' did not run before"):
        late(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0]}, {0}),
        ({"target_modules": ["output.dropout"], "layers_to_transform": [1], "layers_pattern": "layer"}, {1}),
        ({"target_modules": r".*layer\.0\.output\.LayerNorm"}, {0}),
        ({"exclude_modules": r".*layer\.0\..*"}, {1}),
        ({}, {0, 1}),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, dict) else "",
)
def test_choice_of_layers(config, layers, tmp_path):
    model = adapted("bert", "pfeiffer", **config)
    names = [name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]
    assert {int(re.search(r"layer\.(\d+)", name)[1]) for name in names} == layers
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path)), logits(model))


def test_sizes():
    (layer, *_) = bottleneck_layers(get_peft_model(build("bert"), BottleneckConfig()))
    assert layer.bottleneck_down["default"].weight.shape == (2, 32)
    (layer, *_) = bottleneck_layers(get_peft_model(build("bert"), BottleneckConfig(reduction_factor=100)))
    assert layer.bottleneck_down["default"].weight.shape == (1, 32)
    config = BottleneckConfig(style="parallel", target_modules=["intermediate.dense"], bottleneck_size=3)
    (layer, *_) = bottleneck_layers(get_peft_model(build("bert"), config))
    assert layer.bottleneck_down["default"].weight.shape == (3, 32)
    assert layer.bottleneck_up["default"].weight.shape == (64, 3)


def test_small_normal_init():
    model = get_peft_model(nn.Sequential(nn.Linear(100, 100)), BottleneckConfig(target_modules=["0"], init="houlsby"))
    (layer,) = bottleneck_layers(model)
    for linear in (layer.bottleneck_down["default"], layer.bottleneck_up["default"]):
        assert linear.weight.abs().max() <= 0.02
        assert 0.005 < linear.weight.std() < 0.01
        assert not linear.bias.any()


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("style", {"style": "compacter"}),
        ("activation", {"activation": "swish"}),
        ("init", {"init": "bert"}),
        ("residual_from", {"residual_from": "post_add"}),
        ("residual_from", {"residual_from": "sum", "style": "houlsby"}),
        ("residual_from", {"residual_from": "norm", "style": "parallel"}),
        ("bottleneck_size, reduction_factor", {"bottleneck_size": 8, "reduction_factor": 4}),
        ("bottleneck_size", {"bottleneck_size": 0}),
        ("bottleneck_size", {"bottleneck_size": 2.5}),
        ("reduction_factor", {"reduction_factor": -1}),
        ("scaling", {"scaling": "channel"}),
        ("scaling", {"scaling": float("nan")}),
        ("dropout", {"dropout": 1.0}),
        ("residual_after_norm", {"residual_after_norm": True}),
        ("source_module", {"style": "houlsby", "source_module": "intermediate"}),
        ("layers_to_transform", {"layers_to_transform": [0], "target_modules": "a|b"}),
        ("layers_to_transform", {"layers_to_transform": []}),
        ("layers_pattern", {"layers_pattern": "layer"}),
    ],
)
def test_wrong_options_are_named(field, config):
    value = re.escape(str(next(iter(config.values()))))
    with pytest.raises(ValueError, match=rf"^{field}: .*{value}"):
        BottleneckConfig(**config)


def test_unknown_model_is_told_its_modules():
    net = nn.Module()
    net.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
    with pytest.raises(ValueError, match=r"target_modules: no default.*\blayers\.\*\.0, layers\.\*\.1$"):
        get_peft_model(net, BottleneckConfig())


def test_module_of_unknown_width_and_unknown_source():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with pytest.raises(ValueError, match="width of a Tanh is not known"):
        get_peft_model(net, BottleneckConfig(target_modules=["1"]))
    with pytest.raises(ValueError, match="source_module: no parent of 0 has a module 'fc1'"):
        get_peft_model(net, BottleneckConfig(style="parallel", target_modules=["0"], source_module="fc1"))
    late = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        BottleneckConfig(style="parallel", target_modules=["0"], source_module="1"),
    )
    with pytest.raises(ValueError, match="source_module: '1' did not run before"):
        late(torch.randn(2, 4))

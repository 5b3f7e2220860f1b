"""Checkpoints of the `adapters` library, against the published forward written out in plain torch.

The files are written here, under the library's names for parameters and options.
"""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from families import batch, build
from peft import PeftModel
from safetensors.torch import save_file

from peft_fast.methods import BottleneckConfig, BottleneckLayer, load_adapters_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

# The library's three configurations: Houlsby et al. 2019, Pfeiffer et al. 2021, He et al. 2022.
COMMON = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_dim": 4,
    "phm_layer": False,
    "reduction_factor": 8,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
CONFIGS = {
    "double_seq_bn": COMMON | {"mh_adapter": True, "non_linearity": "swish"},
    "seq_bn": COMMON | {"original_ln_before": True, "non_linearity": "relu"},
    "par_bn": COMMON | {"is_parallel": True, "scaling": 4.0, "non_linearity": "relu", "init_weights": "mam_adapter"},
}
ACTIVATIONS = {"swish": F.silu, "relu": F.relu, "gelu": F.gelu, "leakyrelu": F.leaky_relu, "tanh": torch.tanh}
PREFIXES = {
    "bert": ("bert.encoder.layer.{}.attention.output.adapters.task", "bert.encoder.layer.{}.output.adapters.task"),
    "llama": ("model.layers.{}.attention_adapters.adapters.task", "model.layers.{}.output_adapters.adapters.task"),
}
K, R = 32, 4

each_config = pytest.mark.parametrize("name", CONFIGS)
each_family = pytest.mark.parametrize("family", PREFIXES)


def make_weights(family: str, config: dict) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    weights = {}
    for layer in range(2):
        if layer in config["leave_out"]:
            continue
        for behind, used in zip(PREFIXES[family], (config["mh_adapter"], config["output_adapter"]), strict=True):
            if not used:
                continue
            prefix, down = behind.format(layer), int(config["ln_before"])
            shapes = {f"adapter_down.{down}.weight": (R, K), f"adapter_down.{down}.bias": (R,)}
            shapes |= {"adapter_up.weight": (K, R), "adapter_up.bias": (K,)}
            for norm in ("adapter_norm_before",) * config["ln_before"] + ("adapter_norm_after",) * config["ln_after"]:
                shapes |= {f"{norm}.weight": (K,), f"{norm}.bias": (K,)}
            if config["scaling"] == "learned":
                shapes["scaling"] = (1,)
            weights |= {f"{prefix}.{n}": 0.5 * torch.randn(shape, generator=draw) for n, shape in shapes.items()}
            if config["ln_before"]:  # the same tensors under a second name
                for name in ("weight", "bias"):
                    weights[f"{prefix}.adapter_down.0.{name}"] = weights[f"{prefix}.adapter_norm_before.{name}"]
    return weights


def write(folder, family: str, config: dict, kind: str = "adapter.safetensors") -> dict[str, torch.Tensor]:
    weights = make_weights(family, config)
    saved = {"config": config, "hidden_size": K, "model_type": family, "name": "task", "version": "adapters.1.1.0"}
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    if kind.endswith(".safetensors"):
        save_file({n: w for n, w in weights.items() if "norm_before" not in n}, folder / kind)
    else:
        torch.save(weights, folder / kind)
    return weights


class Published:
    """The layer as published: what the library computes behind attention or feed-forward, h, with the residual r."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor], prefix: str) -> None:
        self.config = config
        self.weights = {n.removeprefix(f"{prefix}."): w for n, w in weights.items() if n.startswith(f"{prefix}.")}

    def __call__(self, h, r, layer_norm):
        if not self.weights:
            return layer_norm(h + r)
        if self.config["is_parallel"]:
            x, inner = r, None
        elif self.config["original_ln_before"]:
            x = layer_norm(h + r)
            inner = {True: h, False: x, "post_add": h + r}[self.config["residual_before_ln"]]
        else:
            x, inner = h, h
        w, down = self.weights, int(self.config["ln_before"])
        if down:
            x = F.layer_norm(x, (K,), w["adapter_norm_before.weight"], w["adapter_norm_before.bias"])
        z = F.linear(x, w[f"adapter_down.{down}.weight"], w[f"adapter_down.{down}.bias"])
        z = ACTIVATIONS[self.config["non_linearity"]](z)
        t = F.linear(z, w["adapter_up.weight"], w["adapter_up.bias"])
        t = t * w.get("scaling", self.config["scaling"])
        before_norm = self.config["adapter_residual_before_ln"]
        if inner is not None and before_norm:
            t = t + inner
        if self.config["ln_after"]:
            t = F.layer_norm(t, (K,), w["adapter_norm_after.weight"], w["adapter_norm_after.bias"])
        if inner is not None and not before_norm:
            t = t + inner
        if inner is None:
            t = t + h
        return layer_norm(t + r)


def published_bert(model, config, weights, input_ids):
    x = model.bert.embeddings(input_ids)
    for i, layer in enumerate(model.bert.encoder.layer):
        behind_attention, behind_output = (Published(config, weights, p.format(i)) for p in PREFIXES["bert"])
        h = layer.attention.output.dense(layer.attention.self(x)[0])
        x = behind_attention(h, x, layer.attention.output.LayerNorm)
        h = layer.output.dense(layer.intermediate(x))
        x = behind_output(h, x, layer.output.LayerNorm)
    return model.classifier(model.bert.pooler(x))


def published_llama(model, config, weights, input_ids):
    def no_norm(x):
        # The library leaves the norm out where the model has none there.
        return x

    x = model.model.embed_tokens(input_ids)
    positions = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    for i, layer in enumerate(model.model.layers):
        behind_attention, behind_output = (Published(config, weights, p.format(i)) for p in PREFIXES["llama"])
        h, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=positions, attention_mask=None)
        x = behind_attention(h, x, no_norm)
        x = behind_output(layer.mlp(layer.post_attention_layernorm(x)), x, no_norm)
    return model.lm_head(model.model.norm(x))


PUBLISHED = {"bert": published_bert, "llama": published_llama}


@torch.no_grad()
def build_uneven(family):
    """A base model in which h is as large as r and no LayerNorm is near the identity."""
    model = build(family)
    draw = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


@torch.no_grad()
def assert_parity(model, family, config, weights):
    ids = batch(family)["input_ids"]
    expected = PUBLISHED[family](build_uneven(family), config, weights, ids)
    base = build_uneven(family)(input_ids=ids).logits
    assert (expected - base).abs().max() > 100 * 1e-5  # the adapters do something
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)


@each_family
@each_config
@pytest.mark.parametrize("kind", ["adapter.safetensors", "model.safetensors", "pytorch_adapter.bin"])
def test_parity_with_the_published_forward(name, family, kind, tmp_path):
    weights = write(tmp_path, family, CONFIGS[name], kind)
    model = load_adapters_checkpoint(build_uneven(family), tmp_path)
    assert_parity(model, family, CONFIGS[name], weights)


OPTIONS = {
    "learned scaling": {"scaling": "learned", "non_linearity": "gelu"},
    "norm before": {"scaling": 0.5, "non_linearity": "leakyrelu", "ln_before": True},
    "norm after": {"ln_after": True, "non_linearity": "tanh"},
    "residual in the norm": {"ln_after": True, "adapter_residual_before_ln": True},
    "layer left out": {"leave_out": [0], "dropout": 0.1},
}
NOT_POSSIBLE = ("seq_bn", "bert", "residual in the norm")


@pytest.mark.parametrize(
    ("name", "family", "option"),
    [case for case in itertools.product(CONFIGS, PREFIXES, OPTIONS) if case != NOT_POSSIBLE],
)
def test_parity_with_options(name, family, option, tmp_path):
    config = CONFIGS[name] | OPTIONS[option]
    kind = "pytorch_adapter.bin" if config["ln_before"] else "adapter.safetensors"
    weights = write(tmp_path, family, config, kind)
    model = load_adapters_checkpoint(build_uneven(family), tmp_path)
    assert_parity(model, family, config, weights)


# What the option changes on BERT, on Llama, and where it has no effect. The library fails with "post_add" where no
# LayerNorm stands in front of the adapter.
ORDERS = [
    ("seq_bn", "bert", False),
    ("seq_bn", "bert", "post_add"),
    ("seq_bn", "llama", False),
    *(("double_seq_bn", family, False) for family in PREFIXES),
    *(("par_bn", family, value) for family in PREFIXES for value in (False, "post_add")),
]
ORDER_OPTIONS = {"plain": {}} | {name: OPTIONS[name] for name in ("norm after", "residual in the norm", "norm before")}


@pytest.mark.parametrize("option", ORDER_OPTIONS)
@pytest.mark.parametrize(("name", "family", "value"), ORDERS, ids=str)
def test_parity_with_other_residuals(name, family, value, option, tmp_path):
    config = CONFIGS[name] | ORDER_OPTIONS[option] | {"residual_before_ln": value}
    weights = write(tmp_path, family, config, "pytorch_adapter.bin")
    model = load_adapters_checkpoint(build_uneven(family), tmp_path)
    assert_parity(model, family, config, weights)


@pytest.mark.parametrize(
    ("name", "family"), [("seq_bn", "llama"), ("double_seq_bn", "bert"), ("double_seq_bn", "llama")]
)
def test_residual_of_the_sum_needs_a_norm_in_front(name, family, tmp_path):
    write(tmp_path, family, CONFIGS[name] | {"residual_before_ln": "post_add"})
    with pytest.raises(ValueError, match=rf"residual_before_ln: 'post_add' needs a LayerNorm .* {family} do not"):
        load_adapters_checkpoint(build(family), tmp_path)


def test_residual_in_the_norm_before_the_models_own(tmp_path):
    """The library's LN(LN_a(h + s·t) + r) has no form LN(LN_a(u + s·t)) with u = h + r."""
    write(tmp_path, "bert", CONFIGS["seq_bn"] | {"ln_after": True, "adapter_residual_before_ln": True})
    with pytest.raises(ValueError, match="adapter_residual_before_ln: with ln_after and original_ln_before"):
        load_adapters_checkpoint(build("bert"), tmp_path)


@pytest.mark.parametrize(
    "config",
    [*CONFIGS.values(), CONFIGS["seq_bn"] | {"residual_before_ln": False}],
    ids=[*CONFIGS, "seq_bn, another residual"],
)
def test_imported_adapter_is_a_peft_adapter(config, tmp_path):
    """Added beside another, saved by peft, loaded again, and trained on."""
    write(tmp_path, "bert", config)
    model = load_adapters_checkpoint(build("bert"), tmp_path)
    expected = model.eval()(**batch("bert")).logits
    again = load_adapters_checkpoint(model, tmp_path, "again")
    assert again is model
    model.set_adapter("again")
    assert torch.equal(model(**batch("bert")).logits, expected)
    model.save_pretrained(tmp_path / "peft", selected_adapters=["again"])
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "peft" / "again", is_trainable=True)
    assert torch.equal(loaded.eval()(**batch("bert")).logits, expected)
    loaded.train()(**batch("bert")).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_gating", True),
        ("phm_layer", True),
        ("inv_adapter", "nice"),
        ("cross_adapter", True),
        ("stochastic_depth", 0.1),
        ("original_ln_after", False),
        ("residual_before_ln", "before"),
        ("residual_before_ln", []),
        ("architecture", "lora"),
        ("mh_adapter", True),
        ("original_ln_before", False),
        ("non_linearity", "selu"),
        ("scaling", "channel"),
        ("some_new_option", 1),
    ],
)
def test_unsupported_options_are_named(option, value, tmp_path):
    write(tmp_path, "bert", CONFIGS["seq_bn"])
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["config"][option] = value
    path.write_text(json.dumps(saved))
    base = build("bert")
    with pytest.raises(ValueError, match=option):
        load_adapters_checkpoint(base, tmp_path)
    assert not any(isinstance(module, BottleneckLayer) for module in base.modules())


def test_what_does_not_fit_is_named_and_the_model_left_alone(tmp_path):
    weights = write(tmp_path, "bert", CONFIGS["seq_bn"], "pytorch_adapter.bin")
    path = tmp_path / "pytorch_adapter.bin"
    down = "bert.encoder.layer.{}.output.adapters.task.adapter_down.0.{}"
    layers = {name.replace("layer.1", "layer.7"): value for name, value in weights.items()}
    sizes = weights | {down.format(1, "weight"): torch.ones(R + 1, K), down.format(1, "bias"): torch.ones(R + 1)}
    for state, message in (
        (
            {name: w for name, w in weights.items() if "up.bias" not in name},
            r"output adapter of layer 0: expected.*up\.bias",
        ),
        (weights | {down.format(1, "weight"): torch.ones(R, K + 1)}, "output adapter of layer 1: expected"),
        (layers, "model: has 2 layers, got an adapter of layer 7"),
        (sizes, r"reduction_factor: .*\[4, 5\]"),
        ({}, "no weights of a bottleneck adapter named 'task'"),
    ):
        torch.save(state, path)
        base = build("bert")
        with pytest.raises(ValueError, match=message):
            load_adapters_checkpoint(base, tmp_path)
        assert not any(isinstance(module, BottleneckLayer) for module in base.modules())
    path.unlink()
    with pytest.raises(ValueError, match="found none of"):
        load_adapters_checkpoint(build("bert"), tmp_path)


def test_other_models_and_files_are_refused(tmp_path):
    write(tmp_path, "bert", CONFIGS["seq_bn"])
    with pytest.raises(ValueError, match="only bert, llama can be read, got 'gpt2'"):
        load_adapters_checkpoint(build("gpt2"), tmp_path)
    with pytest.raises(ValueError, match="the adapter is for 'bert', got a model of type 'llama'"):
        load_adapters_checkpoint(build("llama"), tmp_path)
    BottleneckConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a configuration of the adapters library"):
        load_adapters_checkpoint(build("bert"), tmp_path)


class _Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_is_never_executed(tmp_path, capsys):
    weights = write(tmp_path, "bert", CONFIGS["seq_bn"], "pytorch_adapter.bin")
    torch.save(
        weights | {"bert.encoder.layer.0.output.adapters.task.extra": _Harmful()}, tmp_path / "pytorch_adapter.bin"
    )
    with pytest.raises(Exception, match="Weights only load failed"):
        load_adapters_checkpoint(build("bert"), tmp_path)
    assert "executed" not in capsys.readouterr().out

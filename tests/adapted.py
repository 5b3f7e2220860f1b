"""Models with bottleneck adapters, and what tests do with them."""

import torch
from families import batch, build
from peft import PeftModel, get_peft_model
from torch import nn

from peft_fast import BottleneckConfig
from peft_fast.methods import BottleneckLayer


def adapted(family: str = "bert", style: str = "pfeiffer", *, zero: bool = False, **config) -> PeftModel:
    """An adapter whose output is as large as what it is added to, unless it is to be zero."""
    base = config.pop("base", None) or build(family)
    model = get_peft_model(base, BottleneckConfig(style=style, bottleneck_size=4, **config))
    if not zero:
        fill(model)
    return model


def fill(model: nn.Module, adapter_name: str = "default", seed: int = 2) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in bottleneck_layers(model):
        for name in layer.adapter_layer_names:
            if adapter_name in (adapters := getattr(layer, name)):
                values = adapters[adapter_name]
                for parameter in [values] if isinstance(values, nn.Parameter) else values.parameters():
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def bottleneck_layers(model: nn.Module) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


def step(model: nn.Module, family: str = "bert", seed: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Logits and gradients of one training step."""
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**batch(family))
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: nn.Module, family: str = "bert") -> torch.Tensor:
    return model.eval()(**batch(family)).logits


def assert_same(gradients: dict, expected: dict) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name

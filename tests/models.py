"""Small random models of the kinds that people fine-tune, with peft LoRA on them."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import peft_fast
from peft_fast.testing import assert_within_budget

VOCABULARY = 50


class Watching(TorchDispatchMode):
    """Sees every call and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def bert(layers: int = 2) -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # named, since guessing it logs, which is no part of a compiled graph
    return model


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama}


def lora_model(
    name: str = "bert", *, dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **config
) -> PeftModel:
    """A peft LoRA model whose low-rank paths are not zero, always with the same values."""
    torch.manual_seed(0)
    base = (base or MODELS[name]()).to(dtype)
    targets = r".*encoder.*(query|key|value|dense)" if name == "bert" else TARGETS[name]
    config = {"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": name == "gpt2"} | config
    model = get_peft_model(base, LoraConfig(**config))
    return fill_lora_b(model).train()


def fill_lora_b(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(values)
    return model


def batch(name: str = "bert") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(2, VOCABULARY, (4, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    labels = torch.tensor([0, 1, 1, 0]) if name == "bert" else input_ids
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def loss_and_gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss, the logits and every gradient of one step, by name."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach()} | gradients


def states(model: nn.Module) -> set[str]:
    return {row.state for row in peft_fast.report(model).rows}


def patched_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    peft_fast.patch(copied)
    return copied


def lora_layers(model: nn.Module) -> list[lora.Linear]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def assert_same_step(stock: nn.Module, patched: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Loss, logits and all gradients within the error budget that stock's own error sets."""
    truth = loss_and_gradients(copy.deepcopy(stock).double(), inputs)
    expected, actual = loss_and_gradients(stock, inputs), loss_and_gradients(patched, inputs)
    assert actual.keys() == expected.keys() == truth.keys()
    assert len(actual) > 2
    for name in actual:
        assert_within_budget(actual[name], truth[name], expected[name], length=128, name=name)


def assert_equal_logits(stock: nn.Module, patched: nn.Module) -> None:
    assert torch.allclose(patched(**batch()).logits, stock(**batch()).logits, atol=1e-6)

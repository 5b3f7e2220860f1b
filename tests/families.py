"""A small random model of every family that the methods know, and a batch for each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 50
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "embedding_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
_MODERNBERT = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_VIT = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64} | {
    key: _ENCODER[key] for key in ("num_hidden_layers", "num_attention_heads")
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
_OPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32} | {
    key: _ENCODER[key] for key in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"attention_heads": 4, "ffn_dim": 64}.items()
}

_CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=1)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT)),
    "opt_postnorm": lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT, do_layer_norm_before=False)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_DECODER)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DECODER)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_DECODER)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_DECODER)),
    "gemma3_text": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_DECODER)),
}
_CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_ENCODER)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_ENCODER)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**_DISTILBERT)),
    "electra": lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**_ENCODER)),
    "albert": lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**_ENCODER)),
    "modernbert": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(**_ENCODER, **_MODERNBERT, attention_dropout=0.1, mlp_dropout=0.1)
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_VIT)),
}
_SEQ2SEQ: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5, decoder_start_token_id=0)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
}

TASKS = (
    dict.fromkeys(_CLASSIFIERS, "SEQ_CLS")
    | dict.fromkeys(_CAUSAL, "CAUSAL_LM")
    | dict.fromkeys(_SEQ2SEQ, "SEQ_2_SEQ_LM")
)
FAMILIES = tuple(TASKS)
_BUILDERS = _CLASSIFIERS | _CAUSAL | _SEQ2SEQ


def build(family: str) -> nn.Module:
    """Always the same model, in eval mode. Dropout is as the family's config has it."""
    torch.manual_seed(0)
    return _BUILDERS[family]().eval()


def batch(family: str) -> dict[str, Tensor]:
    """Two short examples with labels; of the first, the last tokens are padding."""
    draw = torch.Generator().manual_seed(1)
    ids: Any = partial(torch.randint, 3, VOCABULARY, generator=draw)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=draw), "labels": torch.tensor([0, 1])}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    labels = torch.tensor([0, 1]) if TASKS[family] == "SEQ_CLS" else ids((2, 7))
    return {"input_ids": ids((2, 7)), "attention_mask": mask, "labels": labels}

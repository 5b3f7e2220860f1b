"""The configuration of prefix tuning."""

import copy
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from peft_fast.methods._checks import check_targets, is_number
from peft_fast.methods.prefix_targets import SIDES

_LAYERS = ("all", "input")
_NOT_AT_THE_INPUT = (
    "targets",
    "reparametrization",
    "gate",
    "position_offset",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
)
_INITS = ("random", "vocab", "text", "zero_value")


@dataclass
class PrefixConfig(PeftConfig):
    """Configuration of prefix tuning, for `peft.get_peft_model`.

    Works on every model that uses transformers' attention interface; there, "sdpa" takes the place of every attention
    implementation but "eager".

    Args:
        num_virtual_tokens: the length P of the prefix.
        layers: "all": each attention module has a prefix of its own. "input": P trained rows stand in front of what the
            embeddings give to the first layer (Li & Liang 2021, section 4.1: embeddings of virtual tokens), and
            everything behind the last layer sees the real tokens alone; in an encoder-decoder model, in front of the
            encoder's. Rows see every token of an encoder's sequence, also where sequences are packed, and each other
            in a causal model. With `num_virtual_tokens`, `init`, `init_text`, `prefix_dropout` and `modules_to_save`.
        targets: which kinds of attention get one, of "encoder" (self-attention that sees both sides), "decoder" (causal
            self-attention) and "cross" (a decoder's attention over an encoder's output). By default all that there are.
        init: "random": normal with a standard deviation of 0.5. "zero_value": the same with values of zero; this is not
            the base model, since the prefix still draws attention. "text": the keys and values that the model itself
            computes for `init_text`, on rotary models in front of position 0; an encoder-decoder model gets the text on
            both sides. "vocab": the same for tokens drawn from the vocabulary. With `layers="input"`: "text" and
            "vocab" are the embeddings of the tokens, and "random" has their standard deviation.
        init_text: for "text": token ids, or a string and `tokenizer_name_or_path`. Repeated or cut to P tokens.
        tokenizer_name_or_path: where `AutoTokenizer` finds the tokenizer of `init_text`, a string.
        reparametrization: train an embedding of P rows and a two-layer perceptron in each attention module in place of
            the keys and values, which they compute (Li & Liang 2021, section 4.3); `PrefixModel.make_plain` keeps only
            the result.
        reparametrization_size: the width of the perceptron's hidden layer.
        prefix_dropout: the probability, in [0, 1), of dropping an element of the prefix in training.
        gate: a trained factor for each head, tanh of a parameter that starts at 0, on the prefix's part of the output,
            with a softmax of its own (LLaMA-Adapter, Zhang et al. 2023): the model starts as the base model. A gated
            prefix cannot be active together with others.
        position_offset: how far to move the positions of the tokens in models with learned absolute positions: P for a
            prefix trained with peft, else 0.
        target_modules: names of attention modules, or a regular expression of whole names. By default all of `targets`.
        exclude_modules: names, or a regular expression, of attention modules that get no prefix.
        layers_to_transform: numbers of the layers that get prefixes.
        layers_pattern: the name of the list of layers, with `layers_to_transform`.
        modules_to_save: modules to train and save beside the prefixes, such as a new head.
        trained: in saved configurations: the prefix comes from a checkpoint, so `init` is not run.

    Raises ValueError, naming the field and its value.
    """

    num_virtual_tokens: int = field(default=16, metadata={"help": "The length P of the prefix."})
    layers: str = field(default="all", metadata={"help": "Where prefixes are put."})
    targets: list[str] | str | None = field(default=None, metadata={"help": "Kinds of attention that get a prefix."})
    init: str = field(default="random", metadata={"help": "Initial prefix."})
    init_text: list[int] | str | None = field(default=None, metadata={"help": "Text, or its token ids."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "The tokenizer of init_text."})
    reparametrization: bool = field(default=False, metadata={"help": "Train a perceptron that computes the prefix."})
    reparametrization_size: int = field(default=512, metadata={"help": "Its hidden width."})
    prefix_dropout: float = field(default=0.0, metadata={"help": "Dropout of the prefix."})
    gate: bool = field(default=False, metadata={"help": "Gate the prefix, from zero, in each head."})
    position_offset: int = field(default=0, metadata={"help": "Shift of learned absolute positions."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that get a prefix."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that get none."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers that get prefixes."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save as well."})
    trained: bool = field(default=False, metadata={"help": "The prefix comes from a checkpoint."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PREFIX")
        if isinstance(self.targets, str):
            self.targets = [self.targets]
        self._check()
        check_targets(self)

    def _check(self) -> None:
        for name, choices in ("layers", _LAYERS), ("init", _INITS):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.targets is not None and not (self.targets and set(self.targets) <= set(SIDES)):
            raise ValueError(f"targets: expected some of {', '.join(SIDES)}, got {self.targets!r}")
        for name, least in ("num_virtual_tokens", 1), ("reparametrization_size", 1), ("position_offset", 0):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if not is_number(self.prefix_dropout) or not 0.0 <= self.prefix_dropout < 1.0:
            raise ValueError(f"prefix_dropout: must lie in [0, 1), got {self.prefix_dropout!r}")
        self._check_init()
        if self.layers == "input":
            self._check_input()

    def _check_init(self) -> None:
        if self.reparametrization and self.init != "random":
            raise ValueError(f'init: a reparametrization starts from "random", got {self.init!r}')
        if self.init == "text" and self.init_text is None:
            raise ValueError('init_text: init="text" starts from it, but none was given')
        if self.init != "text" and self.init_text is not None:
            raise ValueError(f'init_text: goes with init="text", got {self.init_text!r} with init={self.init!r}')
        if self.init != "text" or self.trained:
            return
        if not self.init_text:
            raise ValueError(f"init_text: has no tokens, got {self.init_text!r}")
        if isinstance(self.init_text, str) and self.tokenizer_name_or_path is None:
            raise ValueError(f"tokenizer_name_or_path: needed for init_text {self.init_text!r}, got None")

    def _check_input(self) -> None:
        for name in _NOT_AT_THE_INPUT:
            if value := getattr(self, name):
                raise ValueError(f'{name}: goes with layers="all", not with layers="input", got {value!r}')
        if self.init == "zero_value":
            raise ValueError(f'init: with layers="input" there are no values to be zero, got {self.init!r}')

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As peft's own, as a configuration whose prefix is trained."""
        if self.trained:
            return super().save_pretrained(save_directory, **kwargs)
        saved = copy.copy(self)
        saved.trained = True
        return saved.save_pretrained(save_directory, **kwargs)

"""The methods that the examples can fine-tune with, and their options on the command line."""

import argparse

from peft import LoraConfig, PeftConfig, TaskType

import peft_fast

# What is trained side by side: a method of PEFT's own, as it is and patched.
VARIANTS = {"lora": ("stock", "patched"), "adapter": ("adapter",), "prefix": ("prefix",)}
# A prefix is a few vectors far from the loss; it learns at rates that would break weights.
LEARNING_RATES = {"lora": 1e-3, "adapter": 1e-3, "prefix": 3e-2}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--method", choices=sorted(VARIANTS), default="lora", help="PEFT method (default: %(default)s)")
    add("--rank", type=int, default=8, help="rank R of the low-rank update (default: %(default)s)")
    add("--alpha", type=float, default=16, help="the update is scaled by alpha / rank (default: %(default)s)")
    add(
        "--style",
        choices=("houlsby", "pfeiffer", "parallel"),
        default="pfeiffer",
        help="of adapter (default: %(default)s)",
    )
    add("--bottleneck-size", type=int, default=48, help="size of an adapter's bottleneck (default: %(default)s)")
    add("--prefix-length", type=int, default=16, help="virtual tokens of a prefix (default: %(default)s)")
    add(
        "--dropout",
        type=float,
        default=0.05,
        help="dropout before the low-rank update, behind an adapter, or of a prefix (default: %(default)s)",
    )
    rates = ", ".join(f"{rate:g} with {method}" for method, rate in LEARNING_RATES.items())
    add("--lr", type=float, help=f"peak learning rate; it falls linearly to 0 (default: {rates})")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on the method; end the program where a value is out of range."""
    if options.lr is None:
        options.lr = LEARNING_RATES[options.method]
    for name in ("rank", "bottleneck_size", "prefix_length"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, it is {getattr(options, name)}")
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout must lie in [0, 1), it is {options.dropout}")


def peft_config(options: argparse.Namespace, task_type: TaskType, dropout: float) -> PeftConfig:
    """The configuration of options.method. A new head is trained as it is, beside it."""
    if options.method == "lora":  # on every linear layer of the encoder
        return LoraConfig(
            task_type=task_type,
            target_modules="all-linear",
            # peft leaves the head of a classifier out by itself, this one not.
            exclude_modules=["qa_outputs"] if task_type == TaskType.QUESTION_ANS else None,
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=dropout,
        )
    if options.method == "adapter":  # at the places of --style
        return peft_fast.BottleneckConfig(
            task_type=task_type, style=options.style, bottleneck_size=options.bottleneck_size, dropout=dropout
        )
    return peft_fast.PrefixConfig(task_type=task_type, num_virtual_tokens=options.prefix_length, prefix_dropout=dropout)

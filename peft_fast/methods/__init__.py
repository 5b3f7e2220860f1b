"""The fine-tuning methods that peft lacks, as peft tuners. Importing this package adds them to peft's tables."""

from peft_fast.methods._register import register_method
from peft_fast.methods.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel
from peft_fast.methods.bottleneck_import import load_adapters_checkpoint
from peft_fast.methods.prefix import PrefixConfig, PrefixLayer, PrefixModel
from peft_fast.methods.prefix_import import load_peft_prefix
from peft_fast.methods.prefix_interface import register

__all__ = [
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "PrefixConfig",
    "PrefixLayer",
    "PrefixModel",
    "load_adapters_checkpoint",
    "load_peft_prefix",
]

register_method("bottleneck", BottleneckConfig, BottleneckModel)
register_method("prefix", PrefixConfig, PrefixModel)
register()

"""The fused ops as functions of tensors."""

from peft_fast.ops.bottleneck_adapter import bottleneck_adapter
from peft_fast.ops.lora_linear import lora_linear
from peft_fast.ops.prefix_attention import prefix_attention

__all__ = ["bottleneck_adapter", "lora_linear", "prefix_attention"]

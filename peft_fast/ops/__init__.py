"""The fused ops as functions of tensors."""

from peft_fast.ops.lora_linear import lora_linear

__all__ = ["lora_linear"]

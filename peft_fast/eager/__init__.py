"""The ops from ordinary torch calls, with dropout for the CPU in C: the fast path where Triton does not serve."""

from peft_fast.eager.attention_dropout import dropped_attention_bwd as dropped_attention_bwd
from peft_fast.eager.attention_dropout import dropped_attention_fwd as dropped_attention_fwd
from peft_fast.eager.bottleneck_adapter import adapter_bwd as adapter_bwd
from peft_fast.eager.bottleneck_adapter import adapter_fwd as adapter_fwd
from peft_fast.eager.dropout import draw_seed as draw_seed
from peft_fast.eager.dropout import drop as drop
from peft_fast.eager.dropout import dropout_mask as dropout_mask
from peft_fast.eager.lora_linear import lora_bwd as lora_bwd
from peft_fast.eager.lora_linear import lora_fwd as lora_fwd
from peft_fast.eager.norm_of_sum import norm_of_sum_bwd as norm_of_sum_bwd
from peft_fast.eager.norm_of_sum import norm_of_sum_fwd as norm_of_sum_fwd
from peft_fast.eager.prefix_attention import attention_bwd as attention_bwd
from peft_fast.eager.prefix_attention import attention_dropout_mask as attention_dropout_mask
from peft_fast.eager.prefix_attention import attention_fwd as attention_fwd

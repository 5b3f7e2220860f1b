"""What the tests of all kernels share."""

import torch

SEED = 0x5EED_0F_D20F_0075
# (activations, trained parameters)
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}

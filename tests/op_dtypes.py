"""The dtypes that every op is tested in: of activations, and of its parameters where they have another one."""

import pytest
import torch

DTYPES = [
    pytest.param(torch.float64, None, id="fp64"),
    pytest.param(torch.float32, None, id="fp32"),
    pytest.param(torch.bfloat16, None, id="bf16"),
    pytest.param(torch.float16, None, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32"),
    pytest.param(torch.float16, torch.float32, id="fp16-fp32"),
]

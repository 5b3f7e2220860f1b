"""The public names, and what an import does not do."""

import subprocess
import sys

import peft_fast


def test_public_names():
    assert sorted(peft_fast.__all__) == [
        "BottleneckConfig",
        "PatchReport",
        "PrefixConfig",
        "VerifyReport",
        "backend",
        "layers",
        "ops",
        "patch",
        "reference",
        "report",
        "unpatch",
        "verify",
    ]
    assert all(hasattr(peft_fast, name) for name in peft_fast.__all__)
    assert peft_fast.ops.__all__ == ["bottleneck_adapter", "lora_linear", "prefix_attention"]
    assert callable(peft_fast.patch)


def test_import_starts_nothing():
    """No Triton, no CUDA, no compiler, no thread setting, no change of torch's or peft's classes."""
    code = """
import sys, torch, peft
from peft.tuners import lora
threads, forward, state = torch.get_num_threads(), lora.Linear.forward, torch.random.get_rng_state()
before = set(sys.modules)
import peft_fast
assert not torch.cuda.is_initialized()
assert (torch.get_num_threads(), lora.Linear.forward) == (threads, forward)
assert torch.equal(torch.random.get_rng_state(), state)
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert "triton" not in new or "triton" in {name.split(".")[0] for name in before}, new
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, capture_output=True, text=True)

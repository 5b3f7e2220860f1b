"""Fused kernels that make existing Hugging Face PEFT training code faster and change nothing else."""

import importlib.machinery
import importlib.util
import pathlib
import sys

__version__ = "0.1.0"


def _find_kernels() -> None:
    """In a checkout, let `peft_fast.kernels`, and only that name, resolve to the folder beside the package."""
    package = pathlib.Path(__file__).parent
    if (package / "kernels").is_dir():
        return
    spec = importlib.machinery.ModuleSpec("peft_fast.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(package.parent / "kernels")]
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = globals()["kernels"] = module


_find_kernels()

from peft_fast import layers, ops, reference  # noqa: E402
from peft_fast.methods import BottleneckConfig, PrefixConfig  # noqa: E402
from peft_fast.patch import PatchReport, patch, report, unpatch  # noqa: E402
from peft_fast.support import backend  # noqa: E402
from peft_fast.verify import VerifyReport, verify  # noqa: E402

__all__ = [
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

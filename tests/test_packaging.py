"""What a user installs, and that the folder `kernels/` never stands for Hugging Face's package of that name."""

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("peft_fast", "kernels")


def _python(code: str, cwd: Path, *path: Path) -> str:
    """Run `code` in a process of its own, started in `cwd`, with `path` before what is installed."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: building in the repository would leave build/, and read a stale one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(checkout)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_every_source_and_no_package_named_kernels(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for name in SHIPPED for path in (ROOT / name).rglob("*.py")}
    expected = {name if name.startswith("peft_fast/") else f"peft_fast/{name}" for name in sources}
    assert names == expected | {"peft_fast/py.typed", "peft_fast/tuned.json", "peft_fast/eager/dropout.c"}


def test_unpacked_wheel_imports_its_own_kernels(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import peft_fast.kernels; print(peft_fast.__file__, *peft_fast.kernels.__path__, sep='\\n')"
    assert _python(code, tmp_path, tmp_path).splitlines() == [
        str(tmp_path / "peft_fast" / "__init__.py"),
        str(tmp_path / "peft_fast" / "kernels"),
    ]


def test_bare_checkout_resolves_kernels_and_nothing_else(checkout):
    code = """
        import importlib.util, peft_fast, peft_fast.kernels
        print(peft_fast.__file__, *peft_fast.kernels.__path__, sep="\\n")
        print([name for name in ("tests", "peft_fast") if importlib.util.find_spec(f"peft_fast.{name}")])
    """
    assert _python(code, checkout).splitlines() == [
        str(checkout / "peft_fast" / "__init__.py"),
        str(checkout / "kernels"),
        "[]",
    ]


# Any name transformers takes from the package: as a decorator it changes nothing.
_STAND_IN = """
STAND_IN = True

class Anything:
    def __getattr__(self, name):
        return Anything()

    def __call__(self, *args, **kwargs):
        return args[0] if args and isinstance(args[0], type) else Anything()

def __getattr__(name):
    return Anything()
"""


def test_the_real_kernels_package_wins_from_the_repository_root(tmp_path):
    package, metadata = tmp_path / "kernels", tmp_path / "kernels.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text(_STAND_IN)
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    code = """
        import transformers, peft, peft_fast.kernels, kernels
        from transformers.utils import is_kernels_available
        import transformers.integrations.hub_kernels
        print(kernels.STAND_IN, is_kernels_available(), *peft_fast.kernels.__path__)
    """
    assert _python(code, ROOT, tmp_path) == f"True True {ROOT / 'kernels'}"


def test_import_and_eager_op_without_triton():
    code = """
        import sys
        sys.modules["triton"] = None
        import torch, peft_fast
        x, weight, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
        print(peft_fast.ops.lora_linear(x, weight, a, b).tolist() == [[6.0] * 4] * 2)
    """
    assert _python(code, ROOT) == "True"

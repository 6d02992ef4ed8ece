"""What is installed is what is on disk, and it imports where triton does not exist."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOTS = {"lit_align": ROOT / "lit_align", "lit_align_kernels": ROOT / "kernels"}
# Kernels, what they are made of and what audits them; the operations import them on demand.
NEEDS_TRITON = re.compile(
    r"lit_align_kernels\.(audit\..+|launch_tables|selected_positions|\w+\.(kernel|row|rounding|audit))"
    r"|lit_align\.pipelines\.training_bench\.worker\.trl_run"  # TRL's own imports, of an extra
)

IMPORT_WITHOUT_TRITON = """
import importlib, sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
for name in sys.argv[1:]:
    importlib.import_module(name)
assert "triton" not in sys.modules
print(len(sys.argv) - 1)
"""

LOAD_FROM_REPOSITORY_ROOT = """
import sys
from transformers import AutoModelForCausalLM

assert sys.path[0] == ""  # as `python -c` and notebooks have it: our kernels/ answers first
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "lit_align_kernels" not in sys.modules
assert model(input_ids=model.dummy_inputs["input_ids"]).logits.isfinite().all()
"""


def python_files() -> dict[str, Path]:
    """Dotted module name to file, for every module that is installed."""
    found = {}
    for package, folder in ROOTS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code with the repository root as working directory and first on sys.path."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_module_imports_without_triton():
    names = [name for name in python_files() if not NEEDS_TRITON.fullmatch(name)]
    done = run_python(IMPORT_WITHOUT_TRITON, *names)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == len(names) > 10


def test_transformers_loads_a_model_from_the_repository_root(tiny_llama_dir):
    done = run_python(LOAD_FROM_REPOSITORY_ROOT, str(tiny_llama_dir))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_pyproject_lists_the_packages_that_are_on_disk():
    on_disk = set()
    for name, path in python_files().items():
        on_disk.add(name if path.name == "__init__.py" else name.rpartition(".")[0])
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == on_disk
    without_init = {
        package
        for package in listed
        if not (folder_of(package) / "__init__.py").exists() and package != "lit_align_kernels"
    }
    assert without_init == set()


def folder_of(package: str) -> Path:
    root, _, rest = package.partition(".")
    return ROOTS[root].joinpath(*rest.split(".")) if rest else ROOTS[root]


def test_the_wheel_gets_every_file_that_is_not_python():
    """What package-data names exists, and no data file beside the code is forgotten."""
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert {name: ROOT / folder for name, folder in setuptools["package-dir"].items()} == ROOTS
    patterns = setuptools["package-data"]["lit_align"]
    carried = {path for pattern in patterns for path in ROOTS["lit_align"].glob(pattern)}
    assert all(any(ROOTS["lit_align"].glob(pattern)) for pattern in patterns)
    lying = {
        path
        for path in ROOTS["lit_align"].rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert lying == carried


def test_the_constraints_lie_inside_the_ranges():
    ranges = {
        requirement.name: requirement.specifier
        for requirement in map(
            Requirement,
            [
                *PYPROJECT["project"]["dependencies"],
                *PYPROJECT["project"]["optional-dependencies"]["bench"],
            ],
        )
    }
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in lines
    for pin in pins:
        version = next(iter(pin.specifier)).version
        assert ranges[pin.name].contains(Version(version)), pin


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "test-long", "lint", "types", "imports"])
def test_make_knows_its_targets_and_the_torch_index(target, tmp_path):
    command = ["make", "-n", target, f"VENV={tmp_path / 'venv'}", "TORCH_INDEX=https://example.org"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch_line = next(line for line in done.stdout.splitlines() if line.endswith(" torch"))
    assert '--index-url "https://example.org" --constraint constraints.txt' in torch_line


def test_the_installed_distribution_is_this_one():
    assert metadata.version("lit-align") == PYPROJECT["project"]["version"]
    init = (ROOT / "lit_align" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'__version__ = "(.+)"', init).group(1) == PYPROJECT["project"]["version"]

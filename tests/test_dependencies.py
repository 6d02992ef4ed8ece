"""Every dependency has its reason, and nothing else is imported; the bill lists what is there."""

import ast
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"lit_align", "lit_align_kernels", "tests"}


@pytest.fixture(scope="module")
def audit():
    """scripts/audit.py as a module."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_dependency_has_a_reason_and_every_reason_a_dependency(audit):
    asked, said = audit.declared(), audit.reasons()
    assert {"torch", "jinja2", "pytest", "setuptools", "trl"} <= asked.keys()
    assert audit.faults(asked, said) == []


def test_what_is_missing_is_named(audit):
    asked, said = audit.declared(), audit.reasons()
    assert audit.faults(asked | {"left-pad": "run"}, said) == [
        "left-pad (run) has no line in DEPENDENCIES.md"
    ]
    (fault,) = audit.faults(asked, said | {"left-pad": ("run", "it pads texts")})
    assert "does not ask for it" in fault
    (fault,) = audit.faults(asked, said | {"torch": ("run", "needed")})
    assert "is no reason" in fault
    (fault,) = audit.faults(asked, said | {"torch": ("dev", "tensors and all that")})
    assert "pyproject.toml has it in run" in fault
    (fault,) = audit.faults(asked, said | {"left-pad": ("padding", "it pads texts")})
    assert "nobody asks for" in fault


def test_a_dependency_without_a_reason_fails_the_audit(audit, tmp_path, monkeypatch, capsys):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert text.count("dependencies = [\n") == 1
    new = text.replace("dependencies = [\n", 'dependencies = [\n    "left-pad>=1",\n')
    (tmp_path / "pyproject.toml").write_text(new, encoding="utf-8")
    monkeypatch.setattr(audit, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["audit.py"])
    with pytest.raises(SystemExit, match="1"):
        audit.main()
    assert "left-pad (run) has no line in DEPENDENCIES.md" in capsys.readouterr().out
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        audit.main()


def test_the_pinned_releases_are_of_dependencies(audit):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {audit.canonical(re.split(r"[=<>]", line)[0]) for line in lines if "==" in line}
    assert pinned and pinned <= audit.reasons().keys()


def imported(folder: str) -> set[str]:
    """Top-level modules that a folder's code imports, the standard library's and ours left out."""
    names = [n for p in (ROOT / folder).rglob("*.py") for n in imports(p.read_text("utf-8"))]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - OURS


def imports(code: str) -> list[str]:
    """The modules that a file imports, wherever it does; code in its strings does not count."""
    nodes = list(ast.walk(ast.parse(code)))
    plain = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return plain + [str(n.module) for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]


def test_imports_are_found_wherever_they_stand():
    code = "import a, b.c as d\ndef f():\n    from e.g import h\n    'import no'\nfrom . import n"
    assert imports(code) == ["a", "b.c", "e.g"]


@pytest.mark.parametrize("folder", ["lit_align", "kernels", "scripts", "tests"])
def test_what_is_imported_is_listed(audit, folder):
    packages = metadata.packages_distributions()
    listed = audit.reasons().keys()
    for module in sorted(imported(folder)):
        # A module that is not installed here (an extra) is called as its package.
        owners = {audit.canonical(name) for name in packages.get(module, [module])}
        assert owners & listed, f"{folder} imports {module}, of which DEPENDENCIES.md says nothing"


def test_the_bill_of_materials(audit):
    bill = audit.bill_of_materials()
    assert bill == audit.bill_of_materials()
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    parts = {part["name"]: part for part in bill["components"]}
    torch = parts["torch"]
    assert torch["version"] == metadata.version("torch")
    assert torch["purl"] == f"pkg:pypi/torch@{metadata.version('torch')}"
    references = {"lit-align", *(part["bom-ref"] for part in bill["components"])}
    edges = {edge["ref"]: edge["dependsOn"] for edge in bill["dependencies"]}
    assert references >= edges.keys() and all(references >= set(to) for to in edges.values())
    assert parts["safetensors"]["bom-ref"] in edges[parts["transformers"]["bom-ref"]]


@pytest.mark.parametrize(
    ("program", "expected", "printed"),
    [
        ("exit 3", None, "cannot be reached"),
        ("echo refused >&2; exit 1", None, "nothing is known: refused"),
        (
            """echo '{"dependencies": [{"name": "a", "skip_reason": "not found"}]}'""",
            None,
            "nothing is known: not found",
        ),
        (
            """echo '{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}'""",
            [],
            "",
        ),
        (
            """echo '{"dependencies": [{"name": "a", "version": "1", "vulns":
               [{"id": "CVE-1", "fix_versions": ["2"]}]}, {"name": "b", "skip_reason": "new"}]}'
               exit 1""",
            ["a 1: CVE-1, mended in 2"],
            "not checked: b: new",
        ),
    ],
)
def test_what_pip_audit_says(audit, tmp_path, capsys, program, expected, printed):
    path = tmp_path / "pip-audit"
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    assert audit.known_vulnerabilities(path) == expected
    assert printed in capsys.readouterr().out


def test_without_pip_audit_it_says_so(audit, tmp_path, capsys):
    assert audit.known_vulnerabilities(tmp_path / "absent") is None
    assert "nothing is known" in capsys.readouterr().out

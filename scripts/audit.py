"""What lit-align is made of: dependencies and their reasons, a bill of materials, known holes.

    python scripts/audit.py --sbom build/sbom.cdx.json --pip-audit build/pip-audit/bin/pip-audit

Fails where a dependency has no reason in docs/DEPENDENCIES.md (or a reason has no dependency), and
where pip-audit knows of a vulnerability in what is installed here. Where pip-audit or its database
cannot be reached it says that nothing is known, and does not fail.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
REASONS = ROOT / "docs" / "DEPENDENCIES.md"
OWN = "lit-align"
SHORTEST_REASON = 3  # words
PIP_AUDIT_SECONDS = 300


def canonical(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, str]:
    """Every package that pyproject.toml names → the group that does (`run`, `build`, an extra)."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    groups = {"run": project["dependencies"], **project["optional-dependencies"]}
    groups["build"] = settings["build-system"]["requires"]
    found = {}
    for group, requirements in groups.items():
        for requirement in requirements:
            if (name := canonical(Requirement(requirement).name)) != OWN:
                found.setdefault(name, group)
    return found


def reasons() -> dict[str, tuple[str, str]]:
    """Package → (its group, why), of the tables in docs/DEPENDENCIES.md."""
    found, header = {}, []
    for line in REASONS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif not set(line) <= set("|-: "):
            of_row = dict(zip(header, cells, strict=True))
            group = of_row.get("extra") or of_row.get("brought by") or "run"
            found[canonical(of_row["package"])] = (group, of_row["why"])
    return found


def faults(asked: dict[str, str], said: dict[str, tuple[str, str]]) -> list[str]:
    """What pyproject.toml and the list of reasons disagree about, one sentence each."""
    groups = {*asked.values()}
    found = [f"{n} ({g}) has no line in {REASONS.name}" for n, g in asked.items() if n not in said]
    for name, (group, why) in said.items():
        if len(why.split()) < SHORTEST_REASON:
            found.append(f"{name}: {why!r} is no reason")
        if name in asked and asked[name] != group:
            found.append(
                f"{name} is listed under {group}, and pyproject.toml has it in {asked[name]}"
            )
        if name not in asked and group in groups:
            found.append(f"{name} is listed, and pyproject.toml does not ask for it")
        if name not in asked and group not in groups and canonical(group) not in asked:
            found.append(f"{name} is listed as brought by {group}, which nobody asks for")
    return found


def bill_of_materials() -> dict[str, Any]:
    """All that is installed in this environment, as CycloneDX 1.5, in one order."""
    installed = {canonical(d.name): d for d in metadata.distributions() if d.name}
    components = [_component(name, d) for name, d in sorted(installed.items()) if name != OWN]
    own = installed.get(OWN)
    root = {"type": "library", "bom-ref": OWN, "name": OWN, "version": own.version if own else "0"}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": root},
        "components": components,
        "dependencies": [
            {"ref": _reference(name, d), "dependsOn": _needs(d, installed)}
            for name, d in sorted(installed.items())
        ],
    }


def _reference(name: str, distribution: metadata.Distribution) -> str:
    return OWN if name == OWN else f"pkg:pypi/{name}@{distribution.version}"


def _component(name: str, distribution: metadata.Distribution) -> dict[str, Any]:
    reference = _reference(name, distribution)
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "version": distribution.version,
        "purl": reference,
    }
    about: Any = distribution.metadata
    if licence := about.get("License-Expression"):
        component["licenses"] = [{"expression": licence}]
    elif (licence := about.get("License")) and len(licence) < 80:
        component["licenses"] = [{"license": {"name": licence}}]
    return component


def _needs(
    distribution: metadata.Distribution, installed: dict[str, metadata.Distribution]
) -> list[str]:
    names = set()
    for text in distribution.requires or ():
        requirement = Requirement(text)
        name = canonical(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name in installed:
            names.add(_reference(name, installed[name]))
    return sorted(names)


def known_vulnerabilities(pip_audit: Path) -> list[str] | None:
    """One line for each that pip-audit knows in this environment; None: it could not find out."""
    words = ["--progress-spinner", "off", "--format", "json", "--skip-editable", "--timeout", "15"]
    site = sysconfig.get_paths()["purelib"]
    try:
        done = subprocess.run(
            [str(pip_audit), *words, "--path", site],
            capture_output=True,
            text=True,
            timeout=PIP_AUDIT_SECONDS,
            check=False,
        )
        packages = json.loads(done.stdout)["dependencies"]
    except OSError as error:
        print(f"pip-audit: not here ({error.strerror}): nothing is known of vulnerabilities")
        return None
    except subprocess.TimeoutExpired:
        print("pip-audit: no answer in time: nothing is known of vulnerabilities")
        return None
    except (ValueError, KeyError):
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"pip-audit: its database cannot be reached, nothing is known: {said:.300}")
        return None
    skipped = [p for p in packages if "skip_reason" in p]
    if len(skipped) == len(packages):  # a mirror of PyPI may have the files and not the database
        reason = skipped[0]["skip_reason"] if skipped else "it names no package"
        print(f"pip-audit: it knows none of the packages, nothing is known: {reason:.300}")
        return None
    print(f"pip-audit: {len(packages) - len(skipped)} packages checked, {len(skipped)} not")
    for package in skipped:
        print(f"  not checked: {package['name']}: {package['skip_reason']:.200}")
    return [
        f"{p['name']} {p['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'none'}"
        for p in packages
        for v in p.get("vulns", ())
    ]


def main() -> None:
    """Print what was found; exit with 1 where something has to be done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sbom", type=Path, help="where the bill of materials goes")
    parser.add_argument("--pip-audit", type=Path, help="the program; without it nothing is asked")
    given = parser.parse_args()
    asked = declared()
    found = faults(asked, reasons())
    print(f"dependencies: {len(asked)} asked for, {len(found)} without a reason or out of place")
    if given.sbom:
        bill = bill_of_materials()
        given.sbom.parent.mkdir(parents=True, exist_ok=True)
        given.sbom.write_text(json.dumps(bill, indent=1) + "\n", encoding="utf-8")
        print(f"bill of materials: {len(bill['components'])} packages in {given.sbom}")
    vulnerabilities = known_vulnerabilities(given.pip_audit) if given.pip_audit else None
    if vulnerabilities is not None:
        print(f"pip-audit: {len(vulnerabilities)} known vulnerabilities")
    found += vulnerabilities or []
    for fault in found:
        print(f"  {fault}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

"""The workflows run what exists, and the versions that they name are those that are declared."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Not Python packages of ours to bound, or bounded by another name.
OTHERS = {"flix-peft", "flix-conformance"}


def targets() -> set[str]:
    """The targets of the Makefile."""
    return {
        name for line in re.findall(r"^([\w -]+):", MAKEFILE, re.MULTILINE) for name in line.split()
    }


def steps(workflow: Path) -> list[dict[str, Any]]:
    said = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    return [step for job in said["jobs"].values() for step in job.get("steps", [])]


def declared() -> dict[str, Version]:
    """The oldest version of each package that pyproject.toml declares."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    found: dict[str, Version] = {}
    for requirement in map(Requirement, lines):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                version = Version(bound.version)
                assert found.setdefault(requirement.name.lower(), version) == version, requirement
    return found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_makes_exists(workflow: Path) -> None:
    made = [
        target
        for step in steps(workflow)
        for target in re.findall(r"^make \"?([\w-]+)", step.get("run", ""), re.MULTILINE)
    ]
    known = targets() | {"test-"}  # of a matrix
    assert {target for target in made if target not in known} == set()
    assert made or workflow.name == "conformance.yml"


def test_every_python_that_is_declared_is_tried() -> None:
    said = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    tried = set(said["jobs"]["core"]["strategy"]["matrix"]["python"])
    named = {c.split(" :: ")[-1] for c in PROJECT["classifiers"] if ":: Python :: 3." in c}
    assert named <= tried and f">={min(named)}" == PROJECT["requires-python"]


def test_the_minimum_environment_is_what_is_declared() -> None:
    lines = (ROOT / "tests/constraints/minimum.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    bounds = declared()
    wrong = {
        name: (version, str(bounds[name]))
        for name, version in pinned.items()
        if name in bounds and Version(version) != bounds[name]
    }
    assert wrong == {}
    kit = tomllib.loads((ROOT / "conformance/pyproject.toml").read_text(encoding="utf-8"))
    for requirement in map(Requirement, kit["project"]["dependencies"]):
        if requirement.name not in OTHERS:
            assert f">={bounds[requirement.name]}" == str(requirement.specifier)


def test_the_matrix_of_the_kit_starts_at_the_minimums() -> None:
    said = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    matrix = said["jobs"]["kit"]["strategy"]["matrix"]
    bounds = declared()
    for framework in ("torch", "jax"):
        assert Version(matrix[framework][0].removeprefix("==")) == bounds[framework], framework
    # Declared alone it goes further down than beside JAX.
    assert Version(matrix["tensorflow"][0].removeprefix("==")) >= bounds["tensorflow"]

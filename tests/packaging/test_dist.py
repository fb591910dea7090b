"""What make dist holds a wheel to, and what the projects' files say to each other."""

from __future__ import annotations

import re
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.dist import NEEDED, PROJECTS, faults

ROOT = Path(__file__).parents[2]


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def wheel(folder: Path, *names: str) -> Path:
    path = folder / "made-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_without_its_data_is_found(name: str, tmp_path: Path) -> None:
    top = "flix" if name == "flix_peft" else name
    whole = [n + "x" if n.endswith("/") else n for n in NEEDED[name]]
    whole = [f"made-1{n}" if n.startswith(".dist-info") else n for n in whole]
    assert faults(wheel(tmp_path, f"{top}/__init__.py", *whole), name) == []
    for lost in whole:
        (fault,) = faults(wheel(tmp_path, *(n for n in whole if n != lost)), name)
        assert "lacks" in fault


def test_a_wheel_that_installs_the_tests_is_found(tmp_path: Path) -> None:
    made = faults(wheel(tmp_path, *NEEDED["flix_peft"], "tests/__init__.py"), "flix_peft")
    assert made[-1].endswith("installs tests/, too")


def test_flix_and_its_kit_go_together() -> None:
    flix, kit = project(ROOT), project(ROOT / "conformance")
    assert flix["project"]["optional-dependencies"]["conformance"] == [kit["project"]["name"]]
    assert any(d.startswith(flix["project"]["name"]) for d in kit["project"]["dependencies"])
    for key in ("requires-python", "license"):
        assert flix["project"][key] == kit["project"][key]
    for key in ("fallback_version", "local_scheme"):
        assert flix["tool"]["setuptools_scm"][key] == kit["tool"]["setuptools_scm"][key]
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "conformance" / "LICENSE").read_bytes()


def test_an_editable_install_is_a_path() -> None:
    """With a finder instead, a Python in the folder above the clone imports the clone as an empty package."""
    assert project(ROOT)["tool"]["setuptools"]["package-dir"] == {"": "."}


def test_the_kit_brings_no_framework() -> None:
    bare = {
        re.split(r"[<>=!\[]", d)[0]
        for d in project(ROOT / "conformance")["project"]["dependencies"]
    }
    assert bare == {"flix-peft", "numpy", "pytest", "hypothesis"}


def test_what_the_build_writes_is_not_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*/_built.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git, or no repository")
    assert listed.stdout == ""


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", v) for v in versions[1:])
    assert len(versions) > 1
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for part in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert len(found) == len(set(found)), "a heading stands twice in one version"


def test_the_citation_names_the_paper() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(said)
    (paper,) = said["references"]
    assert "2402.17934" in paper["url"] and paper["authors"][0]["family-names"] == "Lin"

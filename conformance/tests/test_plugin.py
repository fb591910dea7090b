"""The pytest plugin from outside: options, report, expected failures, missing frameworks; each run is a process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_BROKEN = """
from flix_numpy import *
from flix_numpy.conformance import Harness

class harness(Harness):
    def call(self, model, batch, path=None):
        y, dtype = super().call(model, batch, path)
        return y + 1, dtype
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    sources = [folder, _ROOT.parent, _ROOT / "src", _ROOT / "example_backend" / "src"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sources))}
    command = [sys.executable, "-m", "pytest", "-p", "flix_conformance.plugin", "-q"]
    options = ["--pyargs", "flix_conformance", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    return subprocess.run(
        [*command, *options, *arguments],
        env={**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "broken.py").write_text(_BROKEN, encoding="utf-8")
    (tmp_path / "absent.py").write_text("import no_such_framework\n", encoding="utf-8")
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    return tmp_path


def test_report(folder: Path) -> None:
    report = folder / "out" / "report.json"
    found = run(
        folder,
        *("--flix-backend", "numpy=flix_numpy", "--flix-backend", "broken=broken"),
        *("-k", "forward", "--flix-report", str(report)),
    )
    assert found.returncode == 1, found.stdout
    assert "forward            FAIL    pass" in found.stdout
    data = json.loads(report.read_text(encoding="utf-8"))
    outcomes = {
        entry["check"]: {name: cell["outcome"] for name, cell in entry["results"].items()}
        for entry in (*data["checks"], *data["pairs"])
    }
    assert outcomes["forward"] == {"numpy": "passed", "broken": "failed"}
    assert outcomes["cross_forward"] == {"numpy+broken": "failed"}
    assert outcomes["merge"] == {}


def test_what_a_harness_lacks_is_marked(folder: Path) -> None:
    """A backend without embeddings: the others' checks run, and the report says what did not."""
    source = _BROKEN.replace("y + 1", "y") + "\n    kinds = ('linear',)\n"
    (folder / "partial.py").write_text(source, encoding="utf-8")
    arguments = ("--flix-backend", "partial=partial", "-k", "embedding or renamed")
    found = run(folder, *arguments, "-rs")
    assert found.returncode == 0, found.stdout
    assert re.search(r"^renamed_feature +pass$", found.stdout, re.MULTILINE)
    for name in ("embedding_forward", "embedding_gradients"):
        assert re.search(rf"^{name} +-$", found.stdout, re.MULTILINE), found.stdout
    assert "no embedding layers" in found.stdout


def test_expected_failures(folder: Path) -> None:
    listed = folder / "expected.txt"
    arguments = ("--flix-backend", "broken=broken", "--flix-expected-failures", str(listed))
    listed.write_text("# known\n\nforward[broken]: adds one\nembedding_forward: likewise\n")
    found = run(folder, *arguments, "-k", "broken-forward or broken-embedding_forward")
    assert found.returncode == 0, found.stdout
    assert "xfail" in found.stdout
    listed.write_text("files_round_trip: not written yet\n")
    found = run(folder, *arguments, "-k", "files_round_trip")
    assert found.returncode == 1, found.stdout
    assert "XPASS" in found.stdout


@pytest.mark.parametrize("line", ["forward", "forward:", "no_such_check: reason"])
def test_bad_expectations_are_usage_errors(folder: Path, line: str) -> None:
    listed = folder / "expected.txt"
    listed.write_text(line + "\n")
    found = run(folder, "--flix-backend", "broken=broken", "--flix-expected-failures", str(listed))
    assert found.returncode == 4, found.stdout
    assert "expected.txt:1" in found.stderr + found.stdout


def test_missing_framework_does_not_pass(folder: Path) -> None:
    found = run(
        folder,
        "--flix-backend",
        "absent=absent",
        "--flix-backend",
        "numpy=flix_numpy",
        "-k",
        "installed or split",
    )
    assert found.returncode == 1, found.stdout
    assert "absent: not installed: No module named 'no_such_framework'" in found.stdout
    assert "split_batch  not installed" in found.stdout or "not installed" in found.stdout


def test_unknown_backends_and_missing_harnesses_are_usage_errors(folder: Path) -> None:
    found = run(folder, "--flix-backend", "torhc")
    assert found.returncode == 4, found.stdout
    assert "torch" in found.stderr + found.stdout
    found = run(folder, "--flix-backend", "empty=empty")
    assert found.returncode == 4, found.stdout
    assert "harness()" in found.stderr + found.stdout


def test_broken_imports_are_no_missing_frameworks(folder: Path) -> None:
    (folder / "broken.py").write_text("from flix_numpy import Lair\n", encoding="utf-8")
    found = run(folder, "--flix-backend", "broken=broken")
    assert found.returncode == 4, found.stdout
    assert "cannot be imported: cannot import name 'Lair'" in found.stderr + found.stdout


def test_missing_primitives_are_usage_errors(folder: Path) -> None:
    source = _BROKEN + "\nclass primitives(Primitives):\n    read = None\n    switch = None\n"
    (folder / "partial.py").write_text(source, encoding="utf-8")
    found = run(folder, "--flix-backend", "partial=partial")
    assert found.returncode == 4, found.stdout
    assert "lacks the primitives read, switch" in found.stderr + found.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("call = None", "its harness lacks call;"),
        ("trainer = kernel = None", "its harness lacks trainer, kernel;"),
        ("dtypes = ('float64',)", "dtypes = ('float64',); 'float32' must be among them"),
        ("strategies = ('gather',)", "strategies = ('gather',); 'auto' must be among them"),
    ],
)
def test_incomplete_harnesses_are_usage_errors(folder: Path, line: str, said: str) -> None:
    source = _BROKEN.split("    def call", maxsplit=1)[0] + f"    {line}\n"
    (folder / "partial.py").write_text(source, encoding="utf-8")
    found = run(folder, "--flix-backend", "partial=partial")
    assert found.returncode == 4, found.stdout
    assert said in found.stderr + found.stdout


def test_a_harness_without_dtypes_is_a_usage_error(folder: Path) -> None:
    source = "from flix_numpy import *\n\nclass harness:\n    strategies, kinds = ('auto',), ('linear',)\n"
    (folder / "partial.py").write_text(source, encoding="utf-8")
    found = run(folder, "--flix-backend", "partial=partial")
    assert found.returncode == 4, found.stdout
    assert "its harness lacks dtypes, plain, call, gradients" in found.stderr + found.stdout

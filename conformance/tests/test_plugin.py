"""The pytest plugin from outside: options, report, expected failures, missing frameworks; each run is a process."""

from __future__ import annotations

import json
import os
import re
import shlex
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
    assert set(data["versions"]) == {"flix", "flix_conformance", "hypothesis", "numpy", "python"}
    described = data["backends"]["numpy"]
    assert described["dtypes"] == ["float32", "float64"] and "numpy" in described["versions"]
    failed = data["checks"][0]["results"]["broken"]
    assert failed["message"].startswith("the output is "), failed["message"]
    assert failed["replay"] in found.stdout and "--flix-backend broken=broken" in failed["replay"]


@pytest.mark.parametrize("profile", ["quick", "nightly"])
def test_a_replay_fails_again(folder: Path, profile: str) -> None:
    """With the same example, though nightly's are new in every run."""
    arguments = ("--flix-backend", "broken=broken", "--flix-profile", profile)
    found = run(
        folder, *arguments, "-k", "broken-split_batch or broken-output_dtype or broken-merge"
    )
    line = re.search(r"^pytest --pyargs flix_conformance (.*)$", found.stdout, re.MULTILINE)
    assert line is not None, found.stdout
    assert f"--flix-profile {profile}" in line[1]
    again = run(folder, *shlex.split(line[1]))
    said = [re.search(r"^E +AssertionError: .*$", f.stdout, re.MULTILINE) for f in (found, again)]
    assert again.returncode == 1, again.stdout
    assert None not in said and said[0][0] == said[1][0]  # type: ignore[index]


def test_the_core_alone_is_marked(folder: Path) -> None:
    found = run(folder, "--flix-backend", "numpy=flix_numpy", "-k", "dropout_masks or output_dtype")
    assert re.search(r"^dropout_masks +pass\*$", found.stdout, re.MULTILINE), found.stdout
    assert re.search(r"^output_dtype +pass$", found.stdout, re.MULTILINE), found.stdout
    assert "the core's code alone ran" in found.stdout


def _partial(folder: Path, body: str) -> None:
    source = _BROKEN.split("    def call", maxsplit=1)[0] + body
    (folder / "partial.py").write_text(source, encoding="utf-8")


def test_abilities_that_are_declared_absent_are_not_offered(folder: Path) -> None:
    absent = "absent = ('training', 'gradients', 'merge')"
    _partial(folder, f"    {absent}\n    gradients = trainer = None\n")
    found = run(folder, "--flix-backend", "partial=partial")
    assert found.returncode == 0, found.stdout
    for name in ("merge", "gradient_x", "trajectory", "changed_merge", "added_trains_alone"):
        assert re.search(rf"^{name} +-$", found.stdout, re.MULTILINE), found.stdout
    for name in ("forward", "added_feature", "loaded_feature"):
        assert re.search(rf"^{name} +pass$", found.stdout, re.MULTILINE), found.stdout


def test_not_implemented_is_to_be_done_if_the_backend_says_so(folder: Path) -> None:
    _partial(
        folder, "    def gradients(self, *given):\n        raise NotImplementedError('no tape')\n"
    )
    found = run(
        folder, "--flix-backend", "partial=partial", "-k", "gradient_x or output_dtype", "-rs"
    )
    assert found.returncode == 0, found.stdout
    assert re.search(r"^gradient_x +todo$", found.stdout, re.MULTILINE), found.stdout
    assert "no tape" in found.stdout and "NotImplementedError (1 checks)" in found.stdout
    other = "import numpy\n\nclass Odd:\n    def __array__(self, *given, **named):\n        raise NotImplementedError\n"
    (folder / "library.py").write_text(other, encoding="utf-8")
    body = "    def gradients(self, *given):\n        import library\n        return numpy.asarray(library.Odd())\n"
    _partial(folder, "\n    import numpy\n" + body.replace("return numpy", "return self.numpy"))
    found = run(folder, "--flix-backend", "partial=partial", "-k", "gradient_x")
    assert found.returncode == 1, found.stdout


def test_a_backend_without_outputs_does_not_pass(folder: Path) -> None:
    _partial(folder, "    def call(self, *given):\n        raise NotImplementedError\n")
    chosen = ("-k", "forward or repeatable or test_installed")
    found = run(folder, "--flix-backend", "partial=partial", *chosen)
    assert found.returncode == 1, found.stdout
    assert re.search(r"^forward +FAIL$", found.stdout, re.MULTILINE), found.stdout
    assert re.search(r"^repeatable +todo$", found.stdout, re.MULTILINE), found.stdout


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
        ("forms = 'conv1d'", "has forms = 'conv1d'; a tuple of names is wanted"),
        ("nested = 'yes'", "has nested = 'yes'; True or False is wanted"),
        ("fit = True", "has fit = True; a method is wanted"),
        ("trainer = kernel = None", "its harness lacks trainer, kernel;"),
        ("dtypes = ('float64',)", "dtypes = ('float64',); 'float32' must be among them"),
        ("strategies = ('gather',)", "strategies = ('gather',); 'auto' must be among them"),
        ("strategies = ('auto', 'gahter')", "'gahter' among its strategies, which adapt refuses"),
        ("strategies = 'auto'", "strategies = 'auto'; a tuple of names is wanted"),
        ("kinds = ('linear', 'embeding')", "'embeding' among its kinds, which there is not"),
        ("dtypes = ('float32', 'bflaot16')", "'bflaot16' among its dtypes, which there is not"),
        ("dtypes = ('float32', 'float32')", "with one of them twice"),
        ("absent = ('trianing',)", "'trianing' among its absent, which there is not"),
        ("excluded = (('auto', 'flaot32'),)", "'flaot32' among its excluded, which there is not"),
        ("excluded = ('auto', 'float32')", "'auto' among its excluded; pairs (strategy, dtype)"),
        ("id_dtypes = ('float32',)", "'float32' among its id_dtypes, which is no integer"),
        ("compiled_foward = len", "'compiled_foward', which the kit does not know; did you mean"),
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

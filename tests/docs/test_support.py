"""The table in docs/support.md says what the tests cover, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.docs import support
from tests.docs.support import ROOT, SECTIONS, Section, collect, render, rewritten
from tests.helpers.media import MEDIA
from tests.helpers.zoo import ZOO

SMALL = Section(
    paths=(),
    architectures={"one": "One", "two": "Two", "three": "Three"},
    tables=(("Do", {"a": "A", "b": "B"}), ("Be", {"c": "C"})),
    applies=lambda name, feature: (name, feature) != ("two", "b") and name != "three",
)


def test_the_committed_table_is_what_the_tests_claim():
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.support", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (
        "docs/support.md is not what the tests claim; run python -m tests.docs.support\n"
        f"{done.stdout}{done.stderr}"
    )


def test_every_architecture_of_the_tests_has_a_row():
    assert list(SECTIONS["torch"].architectures) == list(ZOO)
    assert list(SECTIONS["media"].architectures) == list(MEDIA)


def test_cells_are_covered_inapplicable_or_untested():
    assert render(SMALL, {("one", "a"), ("two", "c")}).splitlines() == [
        "| Do | A | B |",
        "|---|:-:|:-:|",
        "| One | ✓ |   |",
        "| Two |   | – |",
        "",
        "| Be | C |",
        "|---|:-:|",
        "| One |   |",
        "| Two | ✓ |",
    ]


@pytest.mark.parametrize(
    "claim,message",
    [
        (("four", "a"), "no such row or column"),
        (("one", "d"), "no such row or column"),
        (("two", "b"), "marked inapplicable"),
    ],
)
def test_claims_without_a_place_are_refused(claim, message):
    with pytest.raises(ValueError, match=message):
        render(SMALL, {claim})


def test_only_generated_blocks_change():
    text = "before\n<!-- generated: x -->\nold\n<!-- end: x -->\nafter\n"
    found = rewritten(text, {("x", "one", "a"), ("y", "one", "b")}, {"x": SMALL})
    assert found.startswith("before\n") and found.endswith("\nafter\n") and "old" not in found
    assert found.count("✓") == 1
    assert rewritten(found, {("x", "one", "a")}, {"x": SMALL}) == found
    with pytest.raises(ValueError, match="block 'x'"):
        rewritten(text, set(), {"y": SMALL})


def test_tests_that_will_not_run_claim_nothing(tmp_path):
    (tmp_path / "test_claims.py").write_text(
        """
import pytest

covers = pytest.mark.covers

@covers("one", "a")
def test_runs(): pass

@covers("one", "b", backend="jax")
@pytest.mark.skipif(False, reason="no")
def test_runs_too(): pass

@pytest.mark.skip
@covers("two", "a")
def test_skipped(): pass

@pytest.mark.skipif(True, reason="yes")
@covers("two", "b")
def test_skipped_too(): pass

@pytest.mark.xfail
@covers("two", "c")
def test_broken(): pass

@pytest.mark.parametrize("name", [
    pytest.param("x", marks=covers("three", "a")),
    pytest.param("y", marks=[covers("three", "b"), pytest.mark.skip]),
])
def test_by_parameter(name): pass

@covers("four", "a")
def helper(): pass
"""
    )
    assert collect([tmp_path]) == {
        ("torch", "one", "a"),
        ("jax", "one", "b"),
        ("torch", "three", "a"),
    }


def test_what_cannot_be_collected_is_an_error(tmp_path):
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(RuntimeError, match="nothing_of_that_name"):
        collect([tmp_path])


def test_a_difference_is_shown_and_fails(tmp_path, monkeypatch, capsys):
    document = tmp_path / "support.md"
    document.write_text("<!-- generated: torch -->\n<!-- end: torch -->\n")
    monkeypatch.setattr(support, "DOCUMENT", document)
    monkeypatch.setattr(support, "collect", lambda paths: {("torch", "llama", "merge")})
    assert support.main(["--check"]) == 1
    assert "+| Llama |   | ✓ |   |" in capsys.readouterr().out
    assert support.main([]) == 0 and support.main(["--check"]) == 0

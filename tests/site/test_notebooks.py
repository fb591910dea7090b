"""The tutorials run, and keep outputs that a run of theirs gave."""

from __future__ import annotations

import json

import pytest

from tests.site.notebooks import executed, tutorials

NAMES = [path.stem for path in tutorials()]
FRAMEWORK = {"jax": "jax", "keras": "tensorflow", "torch": "transformers"}


def outputs(notebook):
    """The kinds of what each code cell shows."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[out["output_type"] for out in cell["outputs"]] for cell in cells]


def test_there_is_one_for_each_framework():
    assert set(NAMES) == set(FRAMEWORK)


@pytest.mark.parametrize("path", tutorials(), ids=NAMES)
def test_a_tutorial_runs_and_shows_what_it_keeps(path):
    pytest.importorskip(FRAMEWORK[path.stem])
    pytest.importorskip("nbclient")
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert outputs(executed(path)) == outputs(kept)  # its own assertions hold figures in bounds


@pytest.mark.parametrize("path", tutorials(), ids=NAMES)
def test_kept_outputs_are_of_a_whole_run_without_errors(path):
    kept = json.loads(path.read_text(encoding="utf-8"))
    counts = [cell["execution_count"] for cell in kept["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    shown = [kind for cell in outputs(kept) for kind in cell]
    assert "error" not in shown and len(shown) >= len(counts) / 2

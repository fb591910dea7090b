"""Two trees in one sitting: who runs when, what counts as worse, and that the trees must agree."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import compare, comparisons


def one(check=1.0, ratios=(0.9, 1.0, 1.1), ms=10.0):
    return {
        "ratios": {"over frozen": list(ratios)},
        "bars": {"over frozen": 0.95},
        "ms": {"flix": ms},
        "check": check,
        "load": [0.0, 0.0],
    }


def test_sides_take_turns_and_turn_round():
    assert list(compare.order(3)) == ["before", "after", "after", "before", "before", "after"]


def test_figures_are_medians_over_all_rounds():
    runs = {
        "before": [one(), one(ratios=(1.0, 1.0, 1.0))],
        "after": [one(ratios=(0.9, 0.9, 0.9), ms=8.0), one(ratios=(0.9, 0.9, 0.9), ms=12.0)],
    }
    (ratio, ms) = compare.rows_of("layer", runs)
    assert ratio[0] == "layer: over frozen"
    assert (ratio[1]["median"], ratio[2]["median"]) == (1.0, 0.9)
    assert ratio[3:] == ["0.900", "at most 0.95: yes"]
    assert ms == ["layer: flix, ms", 10.0, 10.0, "1.000", ""]


def test_what_is_worse_and_what_misses_its_bar_is_said():
    runs = {"before": [one(ratios=(1.0,))], "after": [one(ratios=(1.04,))]}
    (ratio, _) = compare.rows_of("layer", runs)
    assert ratio[3:] == ["1.040 **worse**", "at most 0.95: **no**"]
    runs["after"] = [one(ratios=(1.02,))]
    assert "worse" not in compare.rows_of("layer", runs)[0][3]


def test_trees_that_compute_different_numbers_are_refused():
    with pytest.raises(compare.ComparisonError, match="different numbers"):
        compare.rows_of("layer", {"before": [one(1.0)], "after": [one(1.01)]})


def test_comparisons_are_chosen_by_the_beginning_of_their_names():
    assert compare.chosen("") == list(comparisons.DEFAULT)
    assert compare.chosen("", every=True) == list(comparisons.COMPARISONS)
    assert compare.chosen("t5,jax-layer-768") == ["t5-training", "t5-generation", "jax-layer-768"]
    with pytest.raises(SystemExit, match="no comparison 'tf'"):
        compare.chosen("tf")


def test_flix_comes_from_the_tree_that_is_named(tmp_path):
    """A tree whose flix is another one's by a link, and one that has none of its own."""
    pytest.importorskip("peft")
    (tmp_path / "flix").symlink_to(compare.ROOT / "flix")
    found = compare.run("torch-growth", tmp_path, None, smoke=True)
    assert found["flix"] == str(tmp_path)
    assert set(found["ratios"]) == {"100 features over 25"}
    assert found["check"] > 0
    broken = tmp_path / "broken"
    (broken / "flix").mkdir(parents=True)
    (broken / "flix" / "__init__.py").write_text("raise ImportError('no flix here')")
    with pytest.raises(compare.ComparisonError, match="no flix here"):
        compare.run("torch-growth", broken, None, smoke=True)


@pytest.mark.slow
def test_a_tree_is_no_worse_than_itself_in_a_smoke_run(tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "found.json"
    words = ["--before", str(compare.ROOT), "--only", "torch-layer-768,t5", "--repeats", "1"]
    command = [sys.executable, "-m", "benchmarks.compare", *words, "--smoke", "--json", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(compare.ROOT)}
    done = subprocess.run(
        command, cwd=compare.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert list(found["runs"]) == ["torch-layer-768", "t5-training", "t5-generation"]
    assert "over PEFT's one LoRA" in done.stdout

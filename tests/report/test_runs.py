"""Runs' folders: what is missing is said, what is damaged or no run is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flix.report import ReportError
from flix.report.records import Curves, Examples
from flix.report.runs import read_run, read_runs
from tests.helpers.runs import make_run, write_json, write_lines


def test_a_whole_run_lacks_nothing(made: Path) -> None:
    run = read_run(made)
    assert run.name == "run" and run.missing == []
    assert len(run.metrics.cells) == 6 and run.metrics.cells[0].features == (("language", ("hau",)), ("task", ("ner",)))  # fmt: skip
    assert [c.name for c in run.metrics.cells if not c.seen] == ["language=yor,task=topic"]
    assert run.curves.loss[-1][0] == 400 and len(run.curves.evaluated) == 8
    assert len(run.mixture.cells) == 6 and run.examples.count == 24
    assert run.adapter.config.registry.groups == ("language", "task")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("metrics.json", "Scores: there is no metrics.json; the run is not finished, or was not evaluated."),
        ("log.jsonl", "Learning curves: there is no log.jsonl."),
        ("predictions.jsonl", "Examples: there is no predictions.jsonl."),
        ("mixture.json", "The mixture: there is no mixture.json."),
        ("run.json", "Command, versions, data fingerprints and cost: there is no run.json."),
        ("config.yaml", "The configuration: there is no config.yaml."),
        ("adapter", "Ranks, parameters and what features share: there is no adapter; none was saved yet."),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(made: Path, gone: str, said: str) -> None:
    path = made / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert read_run(made).missing == [said]


def test_an_unfinished_run_shows_the_adapter_of_its_last_whole_checkpoint(made: Path) -> None:
    from flix.transformers.checkpoints import MANIFEST

    assert MANIFEST == "flix_checkpoint.json"
    checkpoints = made / "checkpoints"
    for step in (9, 100, 200):
        shutil.copytree(made / "adapter", checkpoints / f"checkpoint-{step}")
        (checkpoints / f"checkpoint-{step}" / "flix_checkpoint.json").write_text("{}")
    (checkpoints / "checkpoint-200" / "flix_checkpoint.json").unlink()
    (checkpoints / "checkpoint-200" / "flix.safetensors").write_bytes(b"half")
    assert read_run(made).missing == []
    shutil.rmtree(made / "adapter")
    run = read_run(made)
    assert run.adapter is not None and len(run.missing) == 1
    assert run.missing[0].endswith("are of the checkpoint at step 100.")


def test_no_held_out_cell_and_no_left_out_features_are_said(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", held_out=())
    metrics = json.loads((made / "metrics.json").read_text())
    write_json(made, "metrics.json", {"cells": metrics["cells"]})
    first, second = read_run(made).missing
    assert first == "Scores of held-out cells: no cell was held out of training."
    assert second.startswith("What leaving a feature out costs: metrics.json does not say")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.json", "{", r"metrics\.json of '.*run' is damaged: "),
        ("metrics.json", "[]", r"metrics\.json of '.*run' must be an object, got \[\]"),
        ("metrics.json", "{}", r"metrics\.json of '.*run': cells is missing"),
        ("metrics.json", '{"cells": {}}', r"cells must be a list, got \{\}"),
        ("metrics.json", '{"cells": [{}]}', r"cells\[0\]: cell is missing"),
        ("metrics.json", '{"cells": [{"cell": "x"}]}', r"cells\[0\]: features are written as group=name"),
        ("metrics.json", '{"cells": [{"cell": "a=b", "score": "x"}]}', r"cells\[0\]: score must be a number or null, got 'x'"),
        ("metrics.json", '{"cells": [{"cell": "a=b", "score": true}]}', r"score must be a number or null, got True"),
        ("metrics.json", '{"cells": [{"cell": "a=b", "rows": -1}]}', r"rows must be a whole number of 0 or more, got -1"),
        ("metrics.json", '{"cells": [{"cell": "a=b", "seen": 1}]}', r"seen must be true or false, got 1"),
        ("metrics.json", '{"cells": [{"cell": "a=b", "interval": [1]}]}', r"interval must be \[low, high\], got \[1\.0\]"),
        ("metrics.json", '{"cells": [{"cell": "a=b"}, {"cell": "a=b"}]}', r"cells\[1\]: the cell 'a=b' occurs twice"),
        ("metrics.json", '{"cells": [], "left_out": {"a=b": 3}}', r"left_out: a=b must be an object, got 3"),
        ("metrics.json", '{"cells": NaN}', r"is damaged: NaN is no JSON"),
        ("mixture.json", '{"cells": 3}', r"mixture\.json of '.*run': cells must be a list, got 3"),
        ("mixture.json", '{"cells": [], "temperature": "hot"}', r"temperature must be a number or null, got 'hot'"),
        ("run.json", "[1]", r"run\.json of '.*run' must be an object, got \[1\]"),
        ("log.jsonl", "{}\n", r"log\.jsonl of '.*run', line 1: step is missing"),
        ("log.jsonl", "{\n{}\n", r"log\.jsonl of '.*run', line 1 is damaged"),
        ("log.jsonl", "3\n", r"line 1 must be an object, got 3"),
        ("log.jsonl", '{"step": 1, "loss": "x"}\n', r"line 1: loss must be a number or null, got 'x'"),
        ("log.jsonl", '{"step": 1.5}\n', r"line 1: step must be a whole number of 0 or more, got 1\.5"),
        ("predictions.jsonl", '{"cell": 3}\n', r"predictions\.jsonl of '.*run', line 1: cell must be a text, got 3"),
        ("predictions.jsonl", '{"cell": "a=b", "right": "yes"}\n', r"right must be true or false, got 'yes'"),
    ],
)  # fmt: skip
def test_damaged_files_are_named_with_the_place(made: Path, name: str, text: str, said: str) -> None:  # fmt: skip
    (made / name).write_text(text)
    with pytest.raises(ReportError, match=said):
        read_run(made)


def test_bytes_that_are_no_text_and_a_damaged_adapter_are_named(made: Path) -> None:
    (made / "config.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ReportError, match=r"config\.yaml of '.*run' is damaged"):
        read_run(made)
    (made / "config.yaml").unlink()
    (made / "metrics.json").write_bytes(b"\xff\xff")
    with pytest.raises(ReportError, match=r"metrics\.json of '.*run' is damaged"):
        read_run(made)
    (made / "metrics.json").unlink()
    (made / "adapter" / "flix.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ReportError, match=r"the adapter of '.*run': "):
        read_run(made)


def test_folders_that_are_no_run_are_named_with_what_they_are(made: Path) -> None:
    for folder, said in (
        (made / "none", r"there is no run '.*none'"),
        (made / "config.yaml", r"a run is a folder, but '.*config\.yaml' is a file"),
        (made / "adapter", r"is not a run of flix: .*it is an adapter; give the run's folder, '.*run'"),
        (made.parent, r"is not a run of flix: it holds none of metrics\.json.*; the runs in it are: .*run"),
    ):  # fmt: skip
        with pytest.raises(ReportError, match=said):
            read_run(folder)
    (made.parent / "empty").mkdir()
    with pytest.raises(ReportError, match="it may be the wrong folder"):
        read_run(made.parent / "empty")


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "run")
    other = make_run(tmp_path / "b" / "run", ["kin", "lug"], ["mt"])
    with pytest.raises(ReportError, match=r"'a/run' and 'b/run' have no cell in common.*language=hau,task=ner.*language=kin,task=mt"):  # fmt: skip
        read_runs([one, other])
    third = make_run(tmp_path / "c" / "run")
    metrics = json.loads((third / "metrics.json").read_text())
    metrics["cells"][0]["metric"] = "accuracy"
    write_json(third, "metrics.json", metrics)
    with pytest.raises(ReportError, match=r"'language=hau,task=ner' has the metric 'entity_f1' in the run 'a/run' and 'accuracy' in 'c/run'"):  # fmt: skip
        read_runs([one, third])
    with pytest.raises(ReportError, match=r"the run '.*run' is given twice"):
        read_runs([one, tmp_path / "a" / ".." / "a" / "run"])
    with pytest.raises(ReportError, match="at least one run"):
        read_runs([])


def test_a_run_without_scores_stands_beside_one_that_has_some(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    (other / "metrics.json").unlink()
    assert [run.metrics is None for run in read_runs([one, other])] == [False, True]


def lines_of(folder: Path, lines: list[Any]) -> Any:
    from flix.report.reading import read_lines

    write_lines(folder, "lines.jsonl", lines)
    return read_lines(folder / "lines.jsonl")


def test_steps_after_a_resume_count_as_they_were_last_written(tmp_path: Path) -> None:
    steps = [(10, 3.0), (20, 2.0), (30, 1.0), (20, 2.5), (30, 1.5)]
    curves = Curves.read(lines_of(tmp_path, [{"step": s, "loss": v} for s, v in steps]))
    assert curves.loss == [(10, 3.0), (20, 2.5), (30, 1.5)]
    steps = [(10, 3.0), (25, 9.0), (20, 2.5)]  # step 25 was undone
    curves = Curves.read(lines_of(tmp_path, [{"step": s, "loss": v} for s, v in steps]))
    assert curves.loss == [(10, 3.0), (20, 2.5)]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path, made: Path) -> None:
    with open(made / "log.jsonl", "a") as file:
        file.write('{"step": 999, "lo')
    assert read_run(made).curves.loss[-1][0] == 400


def test_a_loss_of_null_is_left_out(tmp_path: Path) -> None:
    curves = Curves.read(lines_of(tmp_path, [{"step": 1, "loss": None}, {"step": 2, "loss": 1}]))
    assert curves.loss == [(2, 1.0)]


def test_examples_are_the_first_of_each_cell_right_and_wrong_and_fit_a_page(tmp_path: Path) -> None:
    lines = [
        {"cell": cell, "source": "s" * 1000, "target": ["B-PER", "O"], "output": {"a": 1}, "right": i % 2 == 0}
        for cell in ("a=b", "a=c")
        for i in range(100)
    ]  # fmt: skip
    examples = Examples.read(lines_of(tmp_path, lines))
    assert examples.count == 200 and len(examples.kept) == 80
    first = examples.kept[0]
    assert len(first.source) == 400 and first.source.endswith("…")
    assert (first.target, first.output) == ("B-PER O", '{"a": 1}')
    many = [{"cell": f"a={i // 40}", "source": "x" * 390, "target": "", "output": "", "right": i % 2 == 0} for i in range(8000)]  # fmt: skip
    kept = Examples.read(lines_of(tmp_path, many)).kept
    assert sum(len(e.source) for e in kept) <= 700_000
    assert len({(e.cell, e.right) for e in kept}) == 400


def test_evaluations_tell_held_out_cells_apart_or_not(tmp_path: Path) -> None:
    old = {
        "loss": 1.0,
        "cells": {"a=b": {"loss": 1.0, "score": 10}, "a=c": {"loss": 1.0, "score": 30}},
    }
    new = {"loss": 2.0, "seen": 3.0, "held_out": 4.0, "scores": {"seen": 5.0, "held_out": None}}
    lines = [{"step": 1, "evaluation": old}, {"step": 2, "evaluation": new}]
    curves = Curves.read(lines_of(tmp_path, lines))
    assert curves.evaluated == [(1, 1.0), (2, 3.0)] and curves.held_out == [(2, 4.0)]
    assert curves.scores == [(1, 20.0), (2, 5.0)] and curves.held_out_scores == []

"""Averages and differences of scores."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("simplemma")
pytest.importorskip("sacrebleu")
from flix.quickstart.scores import COLUMNS, average, by_cell, score_rows, summary
from flix.study.summary import rank_rows


def test_scores_average_cells_by_kind(data):
    run = {
        cell.name: {"exact": 100.0 * (cell.held_out is None), "chrf": 50.0, "count": 1.0}
        for cell in data.cells
    }
    assert average(data, run, "seen", "exact") == 100.0
    assert average(data, run, "zero-shot", "exact") == 0.0
    other = {name: {**scores, "exact": scores["exact"] / 2} for name, scores in run.items()}
    table = summary(data, [run, other])
    assert table["seen"]["exact"]["mean"] == 75.0
    assert table["seen"]["exact"]["sd"] == pytest.approx(50 / math.sqrt(2), abs=0.01)
    assert set(table) == set(COLUMNS)
    json.dumps(table)


def test_metrics_of_a_run_are_read_by_pair():
    cell = {
        "cell": "task=num2en,language=ka",
        "features": {"task": ["num2en"], "language": ["ka"]},
        "scores": {"exact_match": 12.5, "chrf": 40.0},
    }
    assert by_cell({"cells": [cell]}) == {"ka/num2en": {"exact": 12.5, "chrf": 40.0}}


def test_tables_name_methods_and_leave_out_ranks_of_nothing():
    score = {"mean": 12.34, "sd": None}
    arm = {
        "title": "LoRA, rank 9", "ranks": {"language": 0, "shared": 9}, "active_rank": 9, "total_rank": 9,
        "trainable": 12345, "seconds": 61.2, "scores": {c: {"exact": score, "chrf": {"mean": 50.0, "sd": 1.0}} for c in COLUMNS},
    }  # fmt: skip
    results = {"arms": {"lora": arm}, "copy": dict.fromkeys(COLUMNS, 1.9)}
    assert score_rows(results, "exact") == [
        ["LoRA, rank 9", "12.3", "12.3", "12.3", "12.3"],
        ["copying the input", "1.9", "1.9", "1.9", "1.9"],
    ]
    assert score_rows(results, "chrf") == [["LoRA, rank 9", *["50.0 ±1.0"] * 4]]
    assert rank_rows(results["arms"].values()) == [
        ["LoRA, rank 9", "shared 9", "9", "9", "12,345", "61 s"]
    ]

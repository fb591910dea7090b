"""Averages and differences of scores."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("simplemma")
pytest.importorskip("sacrebleu")
from flix.quickstart.scores import COLUMNS, average, differences, summary


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
    gaps = differences(data, [run], [other])
    assert gaps[next(data.trained()).name] == 50.0
    json.dumps(table)

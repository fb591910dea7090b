"""The arms, the mixture and the scores: pure parts of the comparison."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("simplemma")
pytest.importorskip("sacrebleu")

from flix.quickstart.arms import FLIX, PLAIN, arms, budgets, config
from flix.quickstart.scores import COLUMNS, average, differences, summary


def test_loras_match_the_mixture_in_compute_and_in_parameters(data):
    flix, plain, compute, parameters = arms(data)
    active, total = budgets(data, flix)
    assert active == 1 + 2 + 4 + 8
    assert total == 14 * 1 + 7 * 2 + 4 * 4 + 8
    assert budgets(data, compute) == (active, active)
    assert budgets(data, parameters) == (total, total)
    assert budgets(data, plain)[1] <= total
    assert len({arm.name for arm in (flix, plain, compute, parameters)}) == 4


def test_a_task_brings_its_family_and_the_shared_feature(data):
    registry = config(data, FLIX, 0).registry
    routing = registry.encode([{"language": "ka", "task": "num2en"}])
    assert set(routing.names(0)) == {
        ("language", "ka"),
        ("task", "num2en"),
        ("family", "number"),
        ("shared", "all"),
    }
    assert set(config(data, PLAIN, 0).registry.groups) == {"language", "task"}


def test_the_language_alone_is_dropped_in_training(data):
    settings = config(data, FLIX, 0)
    routing = settings.registry.encode([{"language": "ka", "task": "num2en"}] * 2000)
    dropped = settings.feature_dropout(routing, seed=0, step=0)
    languages = set(settings.registry.ids_of("language"))
    gone = (dropped.ids < 0).mean(axis=0)
    for entry, feature in enumerate(routing.ids[0].tolist()):
        assert gone[entry] == pytest.approx(0.5 if feature in languages else 0.0, abs=0.05)


def test_unseen_combinations_are_served_without_the_language(data):
    torch = pytest.importorskip("torch")
    assert torch
    from flix.quickstart.training import routing_of

    seen = next(data.trained())
    new = next(data.zero_shot("test"))
    routing = routing_of(config(data, FLIX, 0), FLIX, [seen, new])
    assert routing.names(0)[("language", seen.language)] == 1.0
    assert routing.names(1)[("language", new.language)] == 0.0
    assert routing.names(1)[("task", new.task)] == 1.0


def test_the_mixture_draws_by_the_root_of_sizes_and_never_a_held_out_cell(data):
    pytest.importorskip("torch")
    from flix.quickstart.training import Mixture

    cells = list(data.trained())
    mixture = Mixture(cells, seed=0)
    counts = dict.fromkeys((cell.name for cell in cells), 0)
    for step in range(200):
        for cell, example in zip(*mixture.batch(step, 64), strict=True):
            counts[cell.name] += 1
            assert example in cell.train
    held_out = {cell.name for cell in data.zero_shot()}
    assert not held_out & {name for name, count in counts.items() if count}
    roots = np.sqrt([len(cell.train) for cell in cells])
    expected = 200 * 64 * roots / roots.sum()
    found = np.array([counts[cell.name] for cell in cells])
    assert np.abs(found - expected).max() < 6 * np.sqrt(expected.max())
    again = Mixture(cells, seed=0).batch(17, 64)[1]
    assert again == mixture.batch(17, 64)[1]
    with pytest.raises(ValueError, match="is held out; it must never be trained on"):
        Mixture([*cells, next(data.zero_shot())], seed=0)


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

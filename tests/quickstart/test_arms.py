"""The arms of the comparison and their budgets."""

from __future__ import annotations

import pytest

pytest.importorskip("simplemma")
pytest.importorskip("sacrebleu")
from flix.quickstart.arms import FLIX, PLAIN, arms, budgets, config


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

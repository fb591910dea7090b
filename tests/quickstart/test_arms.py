"""The arms of the comparison: their budgets, and what ``flix train`` makes of their configurations."""

from __future__ import annotations

import pytest

pytest.importorskip("simplemma")
pytest.importorskip("datasets")
pytest.importorskip("pydantic")
from flix.quickstart.arms import FLIX, arms, configuration
from flix.training.data import read_data
from flix.training.models import build_config
from flix.training.settings import Settings


@pytest.fixture(scope="module")
def read(data, tmp_path_factory):
    """Each arm's settings, data and configuration."""
    found = {}
    for arm in arms(data):
        output = tmp_path_factory.mktemp(arm.name)
        given = configuration(data, arm, seed=0, steps=3, limit=2, output=output)
        settings = Settings.model_validate(given)
        known = read_data(settings)
        found[arm.name] = settings, known, build_config(settings, known)
    return found


def ranks_of(config, row):
    by_feature = config.ranks
    return [by_feature[feature] for feature in config.registry.encode([row]).names(0)]


def test_loras_match_the_mixture_in_compute_and_in_parameters(data, read):
    flix, parameters, compute = arms(data)
    config = {name: found[2] for name, found in read.items()}
    row = {"language": "ka", "task": "num2en"}
    assert sum(ranks_of(config["flix"], row)) == flix.active() == 1 + 4 + 4 + 4
    assert sum(config["flix"].ranks.values()) == flix.total(data) == 14 + 4 * 7 + 4 * 4 + 4
    assert sum(ranks_of(config["lora-compute"], row)) == compute.total(data) == flix.active()
    assert sum(ranks_of(config["lora-parameters"], row)) == parameters.total(data) == flix.total(data)  # fmt: skip
    for lora in ("lora-compute", "lora-parameters"):
        acting = [feature for feature, rank in config[lora].ranks.items() if rank]
        assert acting == [("shared", "all")]


def test_a_task_brings_its_family_and_the_shared_feature(data, read):
    for _, known, config in read.values():
        routing = config.registry.encode([{"language": "ka", "task": "num2en"}])
        assert set(routing.names(0)) == {
            ("language", "ka"),
            ("task", "num2en"),
            ("family", "number"),
            ("shared", "all"),
        }
        assert set(known.groups) == {"language", "task"}


def test_all_arms_see_the_same_rows_and_never_a_held_out_pair(data, read):
    sizes = {cell.name: len(cell.train) for cell in data.trained()}
    drawn = []
    for _, known, _ in read.values():
        cells = [dict(cell) for cell in known.mixture.trained_cells()]
        names = [f"{cell['language'][0]}/{cell['task'][0]}" for cell in cells]
        assert dict(zip(names, known.mixture.sizes.values(), strict=True)) == sizes
        rows = known.mixture.run(64).__getitems__(range(64))
        drawn.append([(row["source"], row["target"]) for row in rows])
    assert drawn[0] == drawn[1] == drawn[2]
    held_out = {(cell.language, cell.task) for cell in data.zero_shot()}
    for row in read["flix"][1].mixture.run(5000).__getitems__(range(5000)):
        assert (row["language"], row["task"]) not in held_out


def test_pairs_are_drawn_by_the_root_of_their_sizes(data, read):
    mixture = read["flix"][1].mixture
    roots = {name: size**0.5 for name, size in mixture.sizes.items()}
    for name, share in mixture.probabilities.items():
        assert share == pytest.approx(roots[name] / sum(roots.values()))


def test_the_language_alone_is_dropped_in_training(read):
    config = read["flix"][2]
    routing = config.registry.encode([{"language": "ka", "task": "num2en"}] * 2000)
    dropped = config.feature_dropout(routing, seed=0, step=0)
    languages = set(config.registry.ids_of("language"))
    gone = (dropped.ids < 0).mean(axis=0)
    for entry, feature in enumerate(routing.ids[0].tolist()):
        assert gone[entry] == pytest.approx(0.5 if feature in languages else 0.0, abs=0.05)


def test_arms_differ_in_their_ranks_and_learning_rates_alone(data, tmp_path):
    given = [configuration(data, arm, seed=1, steps=9, limit=None, output=tmp_path) for arm in arms(data)]  # fmt: skip
    assert [one.pop("ranks")["shared"] for one in given] == [4, FLIX.total(data), FLIX.active()]
    assert all(one["training"].pop("learning_rate") > 0 for one in given)
    assert given[0] == given[1] == given[2]

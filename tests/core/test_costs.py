"""The closed forms against counting by hand, and the two matched ranks."""

from __future__ import annotations

import pytest

import flix
from flix.core import costs
from flix.core.adapter.adapter import LayerShape

LAYERS = {
    "q": LayerShape(d_in=10, d_out=20),
    "up": LayerShape(d_in=10, d_out=40),
    "e": LayerShape(d_in=100, d_out=10, kind="embedding"),
}


def config(**kwargs: object) -> flix.FlixConfig:
    registry = flix.FeatureRegistry(
        {"language": ["hau", "swa"], "task": ["ner", "pos"], "shared": ["all"]},
        {("task", "*"): [("shared", "all")]},
    )
    defaults: dict[str, object] = {"ranks": flix.ranks.by_group(language=1, task=2, shared=4)}
    return flix.FlixConfig(registry=registry, **{**defaults, **kwargs})  # type: ignore[arg-type]


def test_costs_by_hand() -> None:
    cost = costs.lora_cost(LAYERS, 3)
    assert cost.parameters == 3 * (30 + 50 + 110)
    assert cost.flops == 2 * 3 * 30 + 2 * 3 * 50 + 2 * 3 * 10
    feature = costs.feature_cost(config(), LAYERS, ("task", "pos"))
    assert (feature.rank, feature.parameters) == (2, 2 * 190)


def test_plan_matches_both_loras() -> None:
    plan = costs.plan(config(), LAYERS, [{"language": "hau", "task": "ner"}, {"task": "pos"}])
    assert plan.mixture.rank == 1 + 2 + 4 == plan.compute_matched.rank
    assert plan.parameter_matched.rank == 1 + 1 + 2 + 2 + 4
    assert plan.mixture.parameters == plan.parameter_matched.parameters == 10 * 190
    assert plan.mixture.flops == plan.compute_matched.flops
    assert plan.base_flops == 2 * 10 * 20 + 2 * 10 * 40
    assert plan.datasets == 2
    assert plan.to_dict()["compute_matched_lora"]["rank"] == 7


def test_unknown_datasets_take_one_feature_a_group() -> None:
    rows = costs.every_combination(config().registry)
    assert len(rows) == 4 and all(set(row) == {"language", "task"} for row in rows)
    assert costs.plan(config(), LAYERS).mixture.rank == 7


def test_many_groups_do_not_explode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_MOST_COMBINATIONS", 3)
    rows = costs.every_combination(config().registry)
    assert {row["language"] for row in rows} == {"hau", "swa"}


def test_rank_pattern_counts() -> None:
    only = config(rank_pattern={"e": 0})
    plan = costs.plan(only, LAYERS, [{"language": "hau", "task": "ner"}])
    assert plan.mixture.parameters == 10 * 80
    assert plan.mixture.flops == 2 * 7 * 80
    # The least uniform rank that takes no less arithmetic, and the nearest in parameters.
    assert plan.compute_matched.flops >= plan.mixture.flops
    assert plan.compute_matched.rank == -(-2 * 7 * 80 // (2 * 90))
    assert plan.parameter_matched.rank == round(10 * 80 / 190)


def test_nothing_to_plan() -> None:
    with pytest.raises(flix.ConfigError, match="layer"):
        costs.plan(config(), {})
    with pytest.raises(flix.ConfigError, match="dataset"):
        costs.plan(config(), LAYERS, [])
    with pytest.raises(flix.FeatureError, match="hua"):
        costs.plan(config(), LAYERS, [{"language": "hua"}])

"""Feature dropout: rates, determinism, keep-one, rescaling."""

from __future__ import annotations

import numpy as np
import pytest

from flix import ConfigError, FeatureDropout, FeatureError, FeatureRegistry

REGISTRY = FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos"]})


def routing(rows=4000, **row):
    return REGISTRY.encode([row or {"language": "swa", "task": "ner"}] * rows, width=3)


def test_each_group_drops_with_its_rate_and_independently():
    dropped = FeatureDropout(0.5, per_group={"task": 0.1})(routing(), seed=1, step=2)
    gone = dropped.ids[:, :2] < 0
    assert gone.mean(axis=0) == pytest.approx([0.5, 0.1], abs=0.03)
    assert (gone[:, 0] & gone[:, 1]).mean() == pytest.approx(0.05, abs=0.015)
    assert (dropped.weights[dropped.ids < 0] == 0).all()
    assert (dropped.weights[dropped.ids >= 0] == 1).all()
    assert (dropped.ids[:, 2] == -1).all()


def test_the_mask_is_a_function_of_seed_step_row_and_id():
    dropout = FeatureDropout(0.5)
    whole = dropout(routing(64), seed=1, step=2)
    assert (dropout(routing(64), seed=1, step=2).ids == whole.ids).all()
    assert (dropout(routing(32), seed=1, step=2).ids == whole.ids[:32]).all()
    assert (dropout(routing(32), seed=1, step=2, first_row=32).ids == whole.ids[32:]).all()
    for seed, step in ((2, 2), (1, 3)):
        assert (dropout(routing(64), seed=seed, step=step).ids != whole.ids).any()
    # The place in the row plays no part, nor does what else is active.
    alone = dropout(routing(64, task="ner"), seed=1, step=2)
    assert ((alone.ids[:, 0] < 0) == (whole.ids[:, 1] < 0)).all()


def test_keep_one_keeps_exactly_one_drawn_uniformly():
    kept = FeatureDropout(1.0, keep_one=True)(routing(), seed=0, step=0)
    assert ((kept.ids >= 0).sum(axis=1) == 1).all()
    assert (kept.ids == 1).any(axis=1).mean() == pytest.approx(0.5, abs=0.03)
    nothing = REGISTRY.encode([])
    assert len(FeatureDropout(0.5, keep_one=True)(nothing, seed=0, step=0)) == 0
    empty = REGISTRY.encode([{}] * 3)
    assert (FeatureDropout(1.0, keep_one=True)(empty, seed=0, step=0).ids == -1).all()
    assert (FeatureDropout(1.0)(routing(), seed=0, step=0).ids == -1).all()


def test_rescaling_keeps_the_expected_weight():
    dropped = FeatureDropout(0.25, rescale=True)(routing(), seed=0, step=0)
    assert dropped.weights[:, :2].mean() == pytest.approx(1.0, abs=0.03)
    assert set(np.unique(dropped.weights)) == {np.float32(0), np.float32(1 / 0.75)}


def test_per_token_routing_drops_a_rows_feature_for_all_its_tokens():
    encoded = routing(50)
    tokens = type(encoded)(
        np.repeat(encoded.ids[:, None], 4, axis=1),
        np.repeat(encoded.weights[:, None], 4, axis=1),
        REGISTRY,
    )
    dropped = FeatureDropout(0.5)(tokens, seed=3, step=0)
    assert (dropped.ids == dropped.ids[:, :1]).all() and (dropped.ids[:, 0, 0] < 0).any()


def test_the_routing_is_not_changed():
    encoded = routing(16)
    ids, weights = encoded.ids.copy(), encoded.weights.copy()
    FeatureDropout(0.9)(encoded, seed=0, step=0)
    assert (encoded.ids == ids).all() and (encoded.weights == weights).all()


def test_bad_rates_are_refused():
    for p in (-0.1, 1.1, "0.5", True, float("nan")):
        with pytest.raises(ConfigError, match="must be a number from 0 to 1"):
            FeatureDropout(p)
        with pytest.raises(ConfigError, match=r"per_group\['task'\]"):
            FeatureDropout(0.1, per_group={"task": p})
    with pytest.raises(ConfigError, match="keep_one must be True or False"):
        FeatureDropout(0.1, keep_one=1)
    with pytest.raises(FeatureError, match="no feature group 'tasks'"):
        FeatureDropout(0.1, per_group={"tasks": 0.2})(routing(1), seed=0, step=0)


def test_keep_one_changes_nothing_where_no_row_lost_all():
    assert (
        FeatureDropout(0.0, keep_one=True)(routing(8), seed=0, step=0).ids == routing(8).ids
    ).all()
    rare = FeatureDropout(0.0, per_group={"task": 1.0}, keep_one=True)(routing(8), seed=0, step=0)
    assert (rare.ids[:, 0] == 1).all() and (rare.ids[:, 1:] == -1).all()

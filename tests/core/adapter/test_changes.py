"""Changes of a model's features, decided before they are made."""

from __future__ import annotations

import numpy as np
import pytest

import flix
from flix import Adapter, FeatureError, FeatureRegistry, FlixConfig, RankError
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.changes import fresh_pairs, growing, joining, removing, renaming

LAYERS = {"a.q": LayerShape(5, 3), "a.b.q": LayerShape(4, 2), "emb": LayerShape(7, 4, "embedding")}
RULES = {("task", "*"): [("shared", "all")]}


GROUPS = {"language": ["hau", "swa"], "task": ["ner", "pos"], "shared": ["all"]}


def adapter(seed: int = 0, groups=None, layers=LAYERS, implies=RULES, **changes) -> Adapter:
    features = FeatureRegistry(groups or GROUPS, implies)
    config = FlixConfig(registry=features, **{"ranks": 2, **changes})
    rng = np.random.default_rng(seed)
    tensors = {
        n: rng.normal(size=s).astype(np.float32) for n, s in expected_tensors(config, layers)
    }
    return Adapter(config, layers, tensors)


def test_changes_say_what_stays_and_what_comes():
    whole = adapter()
    removal = removing(whole.config, "language", "hau")
    assert ("language", "hau") not in removal.kept and not removal.arriving
    renamed = renaming(whole.config, "language", "hau", "ha")
    assert renamed.kept["language", "ha"] == ("language", "hau") and not renamed.arriving
    other = adapter(1, {"task": ["topic"], "domain": ["news"]}, {"new": LayerShape(2, 2)}, None)
    joined = joining(whole, other, {"domain": "news"})
    assert tuple(joined.arriving) == (("domain", "news"),)
    assert list(joined.layers or {}) == ["new"] and joined.config.rank("new", ("task", "ner")) == 0
    assert joined.pairs("a.q") == {}
    found, wanted = joined.pairs("new")["domain", "news"], other.pair("new", ("domain", "news"))
    assert np.array_equal(found[0], wanted[0])
    gone = flix.remove_feature(whole, "task", "pos")
    back = joining(gone, flix.select_features(whole, {"task": "pos"}))
    assert tuple(back.arriving) == (("task", "pos"),)
    assert back.config.registry.id("task", "pos") == whole.config.registry.id("task", "pos")


def test_tables_by_feature_follow_a_change():
    whole = adapter()
    table = {("language", "hau"): 1, ("task", "ner"): 2, ("task", "gone"): 3}
    assert renaming(whole.config, "language", "hau", "ha").keep(table) == {
        ("language", "ha"): 1,
        ("task", "ner"): 2,
    }
    assert removing(whole.config, "language", "hau").keep(table) == {("task", "ner"): 2}


def test_a_feature_grows_from_the_mean_of_all_its_origins_at_the_largest_rank_of_theirs():
    ranks = {"language": {"hau": 1, "swa": 0, "yor": 3}, "task": 2, "shared": 2}
    groups = {**GROUPS, "language": ["hau", "swa", "yor"]}
    config = FlixConfig(registry=FeatureRegistry(groups), ranks=ranks, alpha=4)
    growth = growing(config, "language", "new", init_from=["hau", "swa", "yor"])
    assert growth.config.ranks["language", "new"] == 3
    rng, shape = np.random.default_rng(0), LAYERS["a.q"]
    pairs = {
        ("language", name): (rng.normal(size=(rank, 5)), rng.normal(size=(3, rank)))
        for name, rank in (("hau", 1), ("yor", 3))
    }
    a, b = growth.change({"a.q": shape}, {"a.q": pairs}).pairs("a.q")["language", "new"]
    mean = sum(4 / len(x) * (y @ x) for x, y in pairs.values()) / 3
    np.testing.assert_allclose(
        4 / 3 * (b @ a), mean, rtol=1e-9
    )  # of three origins, one without an update
    wider = growing(config, "language", "new", 4, init_from="hau")
    a, b = wider.change({"a.q": shape}, {"a.q": pairs}).pairs("a.q")["language", "new"]
    assert (
        not b[:, 1:].any() and a[1:].any(1).all()
    )  # ranks that change nothing, and can be trained


def test_what_changes_leave_goes_on():
    said = {
        "feature_dropout": flix.FeatureDropout(0.25, {"task": 0.5}, keep_one=True, rescale=True),
        "unknown": {"ibo": "hau"},
        "scaling": "rslora",
        "exclude_modules": ("lm_head",),
    }
    whole = adapter(**said)
    changes = [
        renaming(whole.config, "language", "hau", "ha"),
        removing(whole.config, "language", "swa"),
        joining(whole, adapter(1, {"domain": ["news"]}, implies=None)),
    ]
    grown = growing(whole.config, "language", "new", 2).config
    for config in (*(change.config for change in changes), grown):
        kept = {name: getattr(config, name) for name in said}
        fallback = "ha" if ("language", "ha") in config.registry else "hau"
        assert kept.pop("unknown") in ({"ibo": fallback}, {"ibo": [fallback]})
        assert kept == {name: value for name, value in said.items() if name != "unknown"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, RankError, "add_feature needs a rank, or init_from to take it from"),
        ({"init_from": 5}, FeatureError, "init_from must be a name or names of group 'language', got 5"),
        ({"init_from": ["hua"]}, FeatureError, r"no feature 'hua' \(did you mean 'hau'"),
        ({"init_from": "ner"}, FeatureError, "no feature 'ner'"),
        ({"rank": 2, "implies": 5}, FeatureError, "what language=new implies must be a list of .*, got 5"),
        ({"rank": -1}, RankError, "rank must be a whole number of 0 or more, got -1"),
    ],
)  # fmt: skip
def test_growth_that_is_refused(given, error, message):
    config = FlixConfig(registry=FeatureRegistry(GROUPS), ranks=2)
    with pytest.raises(error, match=message):
        growing(config, "language", "new", **given)


def test_a_feature_starts_afresh_where_its_origin_has_no_pair():
    config = FlixConfig(registry=FeatureRegistry(GROUPS), ranks=2, rank_pattern={"emb": {"language": {"hau": 0}}})  # fmt: skip
    growth = growing(config, "language", "new", init_from="hau")
    whole = adapter(implies=None)
    pairs = {"a.q": {("language", "hau"): whole.pair("a.q", ("language", "hau"))}}
    change = growth.change({"a.q": LAYERS["a.q"], "emb": LAYERS["emb"]}, pairs)
    fresh = fresh_pairs(growth.config, "emb", LAYERS["emb"])["language", "new"]
    for found, wanted in zip(change.pairs("emb")["language", "new"], fresh, strict=True):
        np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(change.pairs("a.q")["language", "new"], pairs["a.q"]["language", "hau"], strict=True):  # fmt: skip
        np.testing.assert_array_equal(found, wanted)

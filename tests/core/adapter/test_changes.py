"""Changes of a model's features, decided before they are made."""

from __future__ import annotations

import numpy as np

import flix
from flix import Adapter, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.changes import joining, removing, renaming

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

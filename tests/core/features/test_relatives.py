"""Known features in the place of unknown ones."""

from __future__ import annotations

import pytest

import flix
from flix import ConfigError, FeatureError, FeatureRegistry, by_parents, by_vectors

REGISTRY = FeatureRegistry({"language": ["swa", "zul", "hau", "bantu", "por"], "task": ["ner"]})
TREE = {
    "zul": "nguni", "xho": "nguni", "nguni": "bantu", "swa": "bantu", "lug": "bantu", "bantu": "niger-congo",
    "hau": "chadic", "ngas": "chadic", "fra": "romance", "por": "romance", "gsw": "german",
}  # fmt: skip


def test_relatives_are_those_under_the_lowest_ancestor_that_has_any():
    found = by_parents(REGISTRY, "language", TREE)
    assert found["xho"] == ["zul"] and found["ngas"] == ["hau"] and found["fra"] == ["por"]
    assert found["lug"] == ["bantu"]  # the ancestor is a feature itself
    assert "gsw" not in found and "zul" not in found
    routing = REGISTRY.encode([{"language": "xho", "task": "ner"}], unknown=found)
    assert routing.names(0) == {("language", "zul"): 1.0, ("task", "ner"): 1.0}


def test_several_relatives_share_the_weight():
    registry = FeatureRegistry({"language": ["swa", "zul"]})
    found = by_parents(registry, "language", TREE)
    assert found["lug"] == ["swa", "zul"]
    names = registry.encode([{"language": "lug"}], unknown=found).names(0)
    assert names == {("language", "swa"): 0.5, ("language", "zul"): 0.5}


def test_circles_are_named():
    with pytest.raises(ConfigError, match="'a' go in a circle: a > b > a"):
        by_parents(REGISTRY, "language", {"a": "b", "b": "a"})


def test_the_nearest_by_vectors():
    vectors = {
        "swa": [1, 0, 1],
        "hau": [0, 1, 0],
        "zul": [1, 0, 0],
        "xho": [2, 0.1, 0],
        "kik": [1, 0, 0.9],
    }
    assert by_vectors(REGISTRY, "language", vectors) == {"kik": ["swa"], "xho": ["zul"]}
    assert by_vectors(REGISTRY, "language", vectors, count=2)["xho"] == ["zul", "swa"]
    assert flix.by_vectors is by_vectors


@pytest.mark.parametrize(
    "vectors,error,message",
    [
        ({"swa": [1], "xho": [1, 2]}, ConfigError, "of one length"),
        ({"swa": [0, 0]}, ConfigError, "not all 0"),
        ({"swa": [float("nan")]}, ConfigError, "finite"),
        ({"swa": "x"}, ConfigError, "list of numbers"),
        ({"xho": [1.0]}, FeatureError, "no known name of group 'language' has a vector"),
    ],
)
def test_mistakes_are_named(vectors, error, message):
    with pytest.raises(error, match=message):
        by_vectors(REGISTRY, "language", vectors)
    with pytest.raises(FeatureError, match="langage"):
        by_vectors(REGISTRY, "langage", {})
    with pytest.raises(ConfigError, match="count"):
        by_vectors(REGISTRY, "language", {}, count=0)

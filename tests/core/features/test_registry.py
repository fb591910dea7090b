"""The registry: ids, groups, implications, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from flix import FeatureError, FeatureRegistry


def registry(**more):
    return FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos"]}, **more)


def test_ids_follow_the_order_and_are_append_only():
    first = registry()
    assert len(first) == 4 and first.groups == ("language", "task")
    assert first.features == (("language", "hau"), ("language", "swa"), ("task", "ner"), ("task", "pos"))  # fmt: skip
    grown = first.with_feature("language", "yor").with_group("domain", ["news"])
    assert len(first) == 4
    assert [grown.id(*feature) for feature in first.features] == [0, 1, 2, 3]
    assert grown.id("language", "yor") == 4 and grown.id("domain", "news") == 5
    assert grown.names("language") == ("hau", "swa", "yor")


def test_round_trips_keep_ids():
    grown = registry(implies={("task", "*"): [("language", "hau")]}).with_feature("task", "ñandú")
    text = json.dumps(grown.to_dict())
    for same in (FeatureRegistry.from_dict(json.loads(text)), copy.deepcopy(grown), pickle.loads(pickle.dumps(grown))):  # fmt: skip
        assert same == grown and same.features == grown.features
        assert same.encode([{"task": "ñandú"}]).ids.tolist() == [[0, 4]]


@pytest.mark.parametrize(
    "groups,message",
    [
        ({}, "at least one group"),
        ({"language": []}, "group 'language' is empty"),
        ({"language": "hau"}, "needs a list of feature names"),
        ({"language": ["hau", "hau"]}, "'hau' occurs twice in group 'language'"),
        ({"language": [""]}, "non-empty string"),
        ({"language": ["*"]}, "other than '\\*'"),
        ({"language": [3]}, "non-empty string"),
        ({"a.b": ["c"]}, "without '.'"),
        ({"": ["c"]}, "non-empty string"),
    ],
)
def test_ill_formed_registries_are_refused(groups, message):
    with pytest.raises(FeatureError, match=message):
        FeatureRegistry(groups)


def test_with_feature_refuses_duplicates_and_unknown_groups():
    with pytest.raises(FeatureError, match="'hau' occurs twice"):
        registry().with_feature("language", "hau")
    with pytest.raises(
        FeatureError, match=r"no feature group 'languages' .did you mean 'language'"
    ):
        registry().with_feature("languages", "yor")
    with pytest.raises(FeatureError, match="exists already"):
        registry().with_group("task", ["x"])


def test_implication_errors():
    with pytest.raises(FeatureError, match="cycle; got language:hau -> task:ner -> language:hau"):
        registry(implies={("language", "hau"): [("task", "ner")], ("task", "ner"): [("language", "hau")]})  # fmt: skip
    with pytest.raises(FeatureError, match=r"no feature 'nre' .did you mean 'ner'"):
        registry(implies={("language", "hau"): [("task", "nre")]})

"""Features that were removed: their ids stay reserved."""

from __future__ import annotations

import numpy as np
import pytest

import flix
from flix import FeatureError, FeatureRegistry

RULES = {("task", "*"): [("shared", "all")]}


GROUPS = {"language": ["hau", "swa"], "task": ["ner", "pos"], "shared": ["all"]}


def registry() -> FeatureRegistry:
    return FeatureRegistry(GROUPS, implies=RULES)


def test_a_removed_feature_keeps_its_id_for_itself():
    before = registry()
    after = before.without_feature("language", "hau")
    assert after.features == before.features and len(after) == len(before)
    assert ("language", "hau") not in after and ("language", "hau") not in after.live
    assert after.id("language", "swa") == 1 and after.names("language") == ("swa",)
    assert after.with_feature("language", "yor").id("language", "yor") == len(before)
    back = after.with_feature("language", "hau")
    assert back == before and back.id("language", "hau") == 0
    assert FeatureRegistry.from_dict(after.to_dict()) == after != before
    assert "removed" not in before.to_dict()  # files of before read as ever


def test_removed_features_are_refused_by_name_and_by_id():
    after = registry().without_feature("language", "hau")
    with pytest.raises(FeatureError, match=r"'hau' of group 'language' was removed .*has: swa"):
        after.id("language", "hau")
    with pytest.raises(FeatureError, match="row 1: group 'language' has no feature 'hau'"):
        after.encode([{"language": "swa"}, {"language": "hau"}])
    from flix.core.features.routing import check_routing

    with pytest.raises(flix.RoutingError, match=r"id 0 in row 1: language=hau, which was removed"):
        check_routing(np.array([[1], [0]]), None, after)
    assert after.encode([{"language": "x"}], "mean").ids.tolist() == [[1]]


def test_what_cannot_be_removed():
    with pytest.raises(FeatureError, match="'all' is the last feature of group 'shared'"):
        registry().without_feature("shared", "all")
    with pytest.raises(FeatureError, match=r"no feature 'hua' .did you mean 'hau'"):
        registry().without_feature("language", "hua")


def test_implications_go_with_a_feature():
    given = FeatureRegistry(
        {"language": ["fra", "ron"], "family": ["romance", "slavic"]},
        implies={
            ("language", "fra"): [("family", "romance")],
            ("language", "ron"): [("family", "romance")],
        },
    )
    assert given.without_feature("language", "fra").implies == {
        ("language", "ron"): (("family", "romance"),)
    }
    assert given.without_feature("family", "romance").implies == {}
    assert given.renamed("family", "romance", "latin").implies[("language", "fra")] == (
        ("family", "latin"),
    )


def test_what_implied_a_removed_feature_implies_the_rest_as_before():
    rules = {("language", "fra"): [("family", "romance"), ("family", "other"), ("task", "ner")]}
    given = FeatureRegistry(
        {"language": ["fra"], "family": ["romance", "other"], "task": ["ner"]}, implies=rules
    )
    left = given.without_feature("family", "romance")
    assert left.implies == {("language", "fra"): (("family", "other"), ("task", "ner"))}
    assert set(left.encode([{"language": "fra"}]).names(0)) == {
        ("language", "fra"),
        ("family", "other"),
        ("task", "ner"),
    }

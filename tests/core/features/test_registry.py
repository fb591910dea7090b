"""The registry: ids, groups, implications, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    with pytest.raises(FeatureError, match="cycle; got language=hau -> task=ner -> language=hau"):
        registry(implies={("language", "hau"): [("task", "ner")], ("task", "ner"): [("language", "hau")]})  # fmt: skip
    with pytest.raises(FeatureError, match=r"no feature 'nre' .did you mean 'ner'"):
        registry(implies={("language", "hau"): [("task", "nre")]})


MANY = 20_000


def _chain(length):
    features = [["g", f"n{i}"] for i in range(length)]
    return {
        "groups": ["g"],
        "features": features,
        "implies": [[features[i], [features[i + 1]]] for i in range(length - 1)],
    }


CROWDS = {
    "features": {"groups": ["g"], "features": [["g", f"n{i}"] for i in range(MANY)]},
    "groups": {
        "groups": [f"g{i}" for i in range(MANY)],
        "features": [[f"g{i}", "n"] for i in range(MANY)],
    },
    "removed": {
        "groups": ["g"],
        "features": [["g", f"n{i}"] for i in range(MANY)],
        "removed": [["g", f"n{i}"] for i in range(1, MANY)],
    },
    "chain": _chain(MANY),
    "star": {
        "groups": ["g", "h"],
        "features": [[g, f"n{i}"] for g in "gh" for i in range(MANY // 2)],
        "implies": [[["g", "*"], [["h", f"n{i}"] for i in range(MANY // 2)]]],
    },
    "look alike": {
        "groups": ["g"],
        "features": [["g", f(f"n{i}")] for i in range(MANY // 2) for f in (str.lower, str.upper)],
    },
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.filterwarnings("ignore:.*differ only in case")
@pytest.mark.timed
def test_a_registry_of_a_crowd_is_made_in_time_in_proportion_to_it(crowd):
    data = CROWDS[crowd]
    began = time.process_time()
    made = FeatureRegistry.from_dict(data)
    group, name = data["features"][0]
    assert len(made.encode([{group: name}] * 10)) == 10
    assert FeatureRegistry.from_dict(made.to_dict()) == made
    made.union(made).subset([(group, name)])
    made.with_feature(group, "one more").renamed(group, "one more", "another")
    assert made.implied_ids == {made.id(*t) for targets in made.implies.values() for t in targets}
    assert len(made.groups) == len(data["groups"]) and len(made.removed_ids) == len(made.removed)
    # 0.3 s on a quiet core; what grew with the square took minutes.
    assert time.process_time() - began < 5


def test_long_chains_and_wide_stars_imply_what_they_say():
    chain = FeatureRegistry.from_dict(_chain(3000))
    assert chain.implied(0) == tuple(range(1, 3000)) and chain.implied(2999) == ()
    assert (chain.encode([{"g": "n2990"}]).ids == range(2990, 3000)).all()
    data = _chain(3000)
    data["implies"].append([["g", "n2999"], [["g", "n2000"]]])
    with pytest.raises(FeatureError, match=r"cycle; got g=n2000 -> .* -> \.\.\. -> .* -> g=n2000"):
        FeatureRegistry.from_dict(data)
    star = FeatureRegistry.from_dict(CROWDS["star"])
    half = MANY // 2
    assert star.implied(7) == tuple(range(half, MANY)) and star.implied(half) == ()
    with pytest.raises(FeatureError, match="cycle; got g=b -> g=b"):
        FeatureRegistry({"g": ["a", "b"]}, {("g", "*"): [("g", "b")]})


names = st.integers(0, 7)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.one_of(names, st.sampled_from("xy")), st.lists(names, max_size=3), max_size=8))  # fmt: skip
def test_implications_are_followed_as_a_plain_search_follows_them(edges):
    groups = {"x": [str(i) for i in range(4)], "y": [str(i) for i in range(4, 8)]}
    features = [(g, n) for g, held in groups.items() for n in held]

    def named(source):
        return (source, "*") if isinstance(source, str) else features[source]

    declared = {named(source): [features[t] for t in targets] for source, targets in edges.items()}
    direct = {
        f: [t for source in (f, (f[0], "*")) for t in declared.get(source, ())] for f in features
    }
    reached = {f: set(direct[f]) for f in features}
    for _ in features:
        reached = {f: found.union(*(reached[t] for t in found)) for f, found in reached.items()}
    if any(f in found for f, found in reached.items()):
        with pytest.raises(FeatureError, match="cycle"):
            FeatureRegistry(groups, declared)
        return
    made = FeatureRegistry(groups, declared)
    for i, feature in enumerate(features):
        found = made.implied(i)
        assert {features[j] for j in found} == reached[feature] and len(found) == len(set(found))
    assert made.implied_ids == {features.index(t) for found in direct.values() for t in found}


@pytest.mark.parametrize(
    "change",
    [
        {"groups": None}, {"groups": 3}, {"groups": [3]}, {"groups": [["a"]]}, {"groups": ["a.b"]},
        {"groups": ["g", "g"]}, {"groups": ["g", "h"]}, {"features": None}, {"features": [3]},
        {"features": [["g"]]}, {"features": [["g", 3]]}, {"features": [["g", "*"]]},
        {"features": [["h", "a"]]}, {"features": [["g", "a"], ["g", "a"]]}, {"implies": 3},
        {"implies": [3]}, {"implies": [[["g", "a"]]]}, {"implies": [[["g", "a"], 3]]},
        {"implies": [[["g", "a"], [["g", "z"]]]]}, {"implies": [[["g", "a"], []], [["g", "a"], []]]},
        {"removed": [["g", "z"]]}, {"removed": 3}, {"removed": [["g", "a"], ["g", "b"]]},
    ],
)  # fmt: skip
def test_other_forms_of_a_registry_are_refused(change):
    good = {"groups": ["g"], "features": [["g", "a"], ["g", "b"]], "implies": []}
    FeatureRegistry.from_dict(good)
    with pytest.raises(FeatureError):
        FeatureRegistry.from_dict({**good, **change})
    for other in (None, 3, [], "x"):
        with pytest.raises(FeatureError):
            FeatureRegistry.from_dict(other)
    with pytest.raises(FeatureError):
        FeatureRegistry({"g": ["a"]}, {("g", "a"): "xy"})
    with pytest.raises(FeatureError):
        FeatureRegistry({"g": ["a"]}, ["g"])
    for group, name in ((3, "a"), ("g", 3), ("g", ["a"]), (["g"], "a"), (None, None)):
        assert (group, name) not in FeatureRegistry({"g": ["a"]})
        with pytest.raises(FeatureError):
            FeatureRegistry({"g": ["a"]}).id(group, name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.with_feature("task", "x", implies=5), "what task=x implies must be a list of .group, feature., got 5"),
        (lambda r: r.with_feature("task", "x", implies=None), "what task=x implies must be .*, got None"),
        (lambda r: r.with_feature("task", "x", implies="task=ner"), "what task=x implies must be .*, got 'task=ner'"),
        (lambda r: r.with_feature("task", "x", implies=("task", "ner")), "named as a pair .group, name., got 'task'"),
        (lambda r: r.subset(5), "the features of a subset must be a list of .group, feature., got 5"),
        (lambda r: r.subset("task"), "the features of a subset must be .*, got 'task'"),
        (lambda r: r.subset([("task",)]), r"named as a pair .group, name., got \('task',\)"),
        (lambda r: r.subset([]), "at least one feature, but none was chosen"),
        (lambda r: r.subset([("task", "nre")]), "no feature 'nre' .did you mean 'ner'"),
    ],
)  # fmt: skip
def test_features_that_are_named_in_no_form_there_is(call, message):
    with pytest.raises(FeatureError, match=message):
        call(registry())


def test_a_new_feature_implies_what_it_is_told_to():
    given = (pair for pair in [("language", "hau")])
    grown = registry().with_feature("task", "qa", implies=given)
    assert grown.encode([{"task": "qa"}]).ids.tolist() == [[0, 4]]


def test_equal_registries_hash_alike_and_are_equal_to_nothing_else():
    first, second = registry(), registry()
    assert first == second and hash(first) == hash(second) and len({first, second}) == 1
    assert first != registry().with_feature("task", "qa") and first != 3 and first != "registry"

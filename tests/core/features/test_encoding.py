"""Encoding rows: every form of a row, widths and weights, unknown features, errors by row."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest

import flix
from flix import FeatureError, FeatureRegistry, RoutingError


def registry(**more):
    return FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos"]}, **more)


def test_implications_act_once_transitively_and_may_be_named_alone():
    families = FeatureRegistry(
        {"language": ["fra", "ita", "hau"], "family": ["romance"], "shared": ["all"]},
        implies={
            ("language", "fra"): [("family", "romance")],
            ("language", "ita"): [("family", "romance")],
            ("family", "*"): [("shared", "all")],
        },
    )
    routing = families.encode(
        [
            {"language": "fra"},
            {"language": {"fra": 0.5, "ita": 0.5}},
            {"family": "romance"},
            {"language": "fra", "family": {"romance": 0.25}},
            {"language": "hau"},
        ]
    )
    assert routing.ids.tolist() == [[0, 3, 4, -1], [0, 1, 3, 4], [3, 4, -1, -1], [0, 3, 4, -1], [2, -1, -1, -1]]  # fmt: skip
    assert routing.weights.tolist() == [[1, 1, 1, 0], [0.5, 0.5, 1, 1], [1, 1, 0, 0], [1, 0.25, 1, 0], [1, 0, 0, 0]]  # fmt: skip
    later = families.with_feature("family", "bantu")
    assert later.encode([{"family": "bantu"}]).ids.tolist() == [[4, 5]]


def test_rows_in_all_forms():
    routing = registry().encode(
        [
            {"language": "swa", "task": "ner"},
            {"language": ["hau", "swa"]},
            {"language": {"hau": 0.3, "swa": -2}, "task": None},
            {},
            {"task": ["ner", "ner"]},
        ]
    )
    assert routing.ids.dtype == np.int32 and routing.weights.dtype == np.float32
    assert routing.ids.tolist() == [[1, 2], [0, 1], [0, 1], [-1, -1], [2, -1]]
    np.testing.assert_allclose(
        routing.weights, [[1, 1], [1, 1], [0.3, -2], [0, 0], [2, 0]], rtol=1e-7
    )
    assert routing.names(2) == {("language", "hau"): pytest.approx(0.3), ("language", "swa"): -2.0}
    assert len(routing[1:3]) == 2


def test_width_and_group_weights():
    routing = registry().encode([{"language": "hau", "task": "ner"}], width=4, group_weights={"language": 0.5})  # fmt: skip
    assert routing.ids.tolist() == [[0, 2, -1, -1]]
    assert routing.weights.tolist() == [[0.5, 1, 0, 0]]
    with pytest.raises(RoutingError, match=r"row 1: 2 features are active but width is 1; active: language:hau, task:ner"):  # fmt: skip
        registry().encode([{}, {"language": "hau", "task": "ner"}], width=1)
    for width in (0, -1, True, 1.5):
        with pytest.raises(RoutingError, match="width must be a whole number of 1 or more"):
            registry().encode([{}], width=width)
    with pytest.raises(FeatureError, match="no feature group 'lang'"):
        registry().encode([{}], group_weights={"lang": 1.0})
    with pytest.raises(RoutingError, match="weight of group 'task' must be a finite number"):
        registry().encode([{}], group_weights={"task": float("nan")})


def test_empty_batch():
    assert registry().encode([]).ids.shape == (0, 1)


def test_unknown_features_by_policy():
    rows = [{"language": "zul", "task": "ner"}]
    with pytest.raises(FeatureError, match=r"row 0: group 'language' has no feature 'zul'; it has: hau, swa"):  # fmt: skip
        registry().encode(rows)
    assert registry().encode(rows, unknown="skip").ids.tolist() == [[2]]
    mean = registry().encode(rows, unknown="mean")
    assert mean.ids.tolist() == [[0, 1, 2]] and mean.weights.tolist() == [[0.5, 0.5, 1]]
    assert registry().encode(rows, unknown={"zul": "swa"}).ids.tolist() == [[1, 2]]
    several = registry().encode(rows, unknown={"zul": ["hau", "swa"]})
    assert several.weights.tolist() == [[0.5, 0.5, 1]]
    with pytest.raises(FeatureError, match="no feature 'xho'"):
        registry().encode([{"language": "xho"}], unknown={"zul": "swa"})
    with pytest.raises(FeatureError, match="no feature 'nope'"):
        registry().encode(rows, unknown={"zul": "nope"})
    for policy in ("ignore", 3, {"zul": 4}, {"zul": []}):
        with pytest.raises(RoutingError, match="unknown must be"):
            registry().encode(rows, unknown=policy)
    # A mistyped group is an error under every policy.
    for policy in ("skip", "mean", {"zul": "swa"}):
        with pytest.raises(FeatureError, match=r"no feature group 'tsak' .did you mean 'task'"):
            registry().encode([{"tsak": "ner"}], unknown=policy)
        with pytest.raises(FeatureError, match="no feature group 'tsak'"):
            registry().encode([{"tsak": None}], unknown=policy)


@pytest.mark.parametrize(
    "row,message",
    [
        ("hau", "row 1: a row is a mapping"),
        ({"language": 3}, "row 1: group 'language' takes a feature name"),
        ({"language": [3]}, "row 1: group 'language': a feature's name is a string, got 3"),
        ({"language": {"hau": float("inf")}}, "row 1: the weight of language:hau must be a finite"),
        ({"language": {"hau": "1"}}, "row 1: the weight of language:hau must be a finite"),
        ({"language": "hua"}, "row 1: .*did you mean 'hau'"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises((FeatureError, RoutingError), match=message):
        registry().encode([{"language": "hau"}, row])


def test_rows_are_not_mutated():
    rows = [{"language": ["hau", "swa"], "task": {"ner": 0.5}}]
    before = copy.deepcopy(rows)
    registry().encode(rows)
    assert rows == before


def test_encoding_and_dropping_4096_rows_takes_under_5_ms():
    rng = np.random.default_rng(0)
    big = FeatureRegistry({"language": [f"l{i}" for i in range(100)], "task": [f"t{i}" for i in range(20)]})  # fmt: skip
    rows = [
        {"language": f"l{rng.integers(100)}", "task": f"t{rng.integers(20)}"} for _ in range(4096)
    ]
    dropout = flix.FeatureDropout(0.2, per_group={"task": 0.0})

    def once(step):
        start = time.perf_counter()
        dropout(big.encode(rows), seed=0, step=step)
        return time.perf_counter() - start

    # The best of many: other processes on the machine only ever add time.
    stop = time.perf_counter() + 20
    assert any(once(step) < 0.005 for step in range(30)) or any(
        once(step) < 0.005 for step in iter(lambda: int(time.perf_counter() > stop), 1)
    )

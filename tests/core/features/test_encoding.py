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
    with pytest.raises(RoutingError, match=r"row 1: 2 features are active but width is 1; active: language=hau, task=ner"):  # fmt: skip
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
    implied = registry().with_implications({("language", "swa"): [("task", "ner")]})
    assert implied.encode([{"language": "zul"}], unknown={"zul": "swa"}).ids.tolist() == [[1, 2]]
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
        ({"language": {"hau": float("inf")}}, "row 1: the weight of language=hau must be a finite"),
        ({"language": {"hau": "1"}}, "row 1: the weight of language=hau must be a finite"),
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


@pytest.mark.timed
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


class Table:
    """Rows as datasets give them: to be gone through, and no sequence."""

    def __init__(self, rows):
        self.rows, self.passes = rows, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.rows)


class OldStyle:
    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, i):
        return self.rows[i]


ROWS = [{"language": "hau"}, {"language": ["swa"], "task": {"ner": 0.5}}, {"task": "pos"}]


@pytest.mark.parametrize(
    "form",
    [list, tuple, iter, lambda r: (row for row in r), lambda r: map(dict, r), Table,
     OldStyle, lambda r: dict(enumerate(r)).values(), lambda r: np.array(r, object)],
)  # fmt: skip
def test_any_iterable_of_rows_is_gone_through_once(form):
    wanted = registry().encode(ROWS)
    given = form(ROWS)
    routing = registry().encode(given)
    assert routing.ids.tolist() == wanted.ids.tolist() == [[0, -1], [1, 2], [3, -1]]
    assert routing.weights.tolist() == wanted.weights.tolist()
    if isinstance(given, Table):
        assert given.passes == 1
    with pytest.raises(FeatureError, match=r"row 2: .*'typo'"):
        registry().encode(form([*ROWS[:2], {"task": "typo"}]))


def test_what_a_generator_raises_is_its_own():
    def rows():
        yield {"language": "hau"}
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        registry().encode(rows())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"language": "hau"}, r"got one mapping, .*give \[row\]"),
        ("hau", "rows must be an iterable"),
        (b"hau", "rows must be an iterable"),
        (None, "rows must be an iterable"),
        (3, "rows must be an iterable"),
        (np.array(3), "rows must be an iterable"),
        ([["hau"]], "row 0: a row is a mapping"),
        (np.zeros((2, 2)), "row 0: a row is a mapping"),
        ([{}, None], "row 1: a row is a mapping"),
        ([{}, [10**5000]], "row 1: a row is a mapping"),
    ],
)
def test_what_are_no_rows_is_refused(rows, message):
    with pytest.raises(RoutingError, match=message):
        registry().encode(rows)


ODD = [
    1e39, -1e39, 10**39, 10**400, -(10**5000), np.float64(1e300), float("nan"), float("-inf"), [1], {}, "1", True,
    np.array([1.0]), 1j, object(),
]  # fmt: skip


@pytest.mark.parametrize("weight", ODD, ids=lambda weight: type(weight).__name__)
def test_odd_weights_are_refused_with_their_row(weight):
    for row in ({"language": {"hau": weight}}, {"task": "ner", "language": {"swa": 1, "hau": weight}}):  # fmt: skip
        with pytest.raises(RoutingError, match="row 1: the weight of language=hau must be"):
            registry().encode([{"language": {"hau": 1}}, row], unknown="skip")
    with pytest.raises(RoutingError, match=r"weight of (group 'task'|task=ner)"):
        registry().encode([{"task": "ner"}], group_weights={"task": weight})


def test_weights_that_only_together_leave_float32_are_refused():
    big = {"language": {"hau": 3e38}}
    assert np.isfinite(registry().encode([big]).weights).all()
    with pytest.raises(RoutingError, match="row 1: the weight of language=hau must be finite in float32, got 6e"):  # fmt: skip
        registry().encode([big, big | {"language": {"hau": 3e38, "x": 3e38}}], unknown={"x": "hau"})
    with pytest.raises(RoutingError, match="row 0: the weight of language=hau must be finite in"):
        registry().encode([big], group_weights={"language": 1e10})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["hau", ["swa"]], "a feature's name is a string"),
        ([{"hau": 1}], "a feature's name is a string"),
        ({3: 1.0}, "a feature's name is a string"),
        ({("hau",): 1.0}, "a feature's name is a string"),
        ((("hau", 1.0),), "a feature's name is a string"),
        ({"hau": None}, "no name has a weight"),
        (b"hau", "takes a feature name"),
        (object(), "takes a feature name"),
        (iter(["hau"]), "takes a feature name"),
        (np.array([["hau"]]), "takes a feature name"),
        ("", "non-empty string"),
        ("*", "other than"),
    ],
)
def test_odd_values_are_refused_with_their_row(value, message):
    for before in ({"language": {"hau": 1.0}}, {"language": "hau"}):
        for policy in ("error", "skip", "mean"):
            with pytest.raises((FeatureError, RoutingError), match="row 1: .*" + message):
                registry().encode([before, {"language": value}], policy)


def test_a_number_of_too_many_digits_to_show_is_refused_like_any():
    with pytest.raises(
        RoutingError, match=r"row 0: .*takes a feature name.*got something of type int"
    ):
        registry().encode([{"language": 10**5000}])


def test_what_tables_and_arrays_hold_is_taken():
    rows = [
        {"language": {"hau": 0.5, "swa": None}},  # a struct column holds every row's names
        {"language": np.array(["hau", "swa"])},
        {"language": np.str_("swa")},
        {"language": frozenset(["swa"])},
        {"language": {"hau": np.float32(0.5), "swa": np.int64(2)}},
        {"language": []},
    ]
    routing = registry().encode(rows)
    assert routing.ids.tolist() == [[0, -1], [0, 1], [1, -1], [1, -1], [0, 1], [-1, -1]]
    assert routing.weights.tolist()[4] == [0.5, 2.0]
    # A weight that equals one is not therefore the same as one.
    with pytest.raises(RoutingError, match="row 1"):
        registry().encode([{"language": {"hau": 1.0}}, {"language": {"hau": True}}])


@pytest.mark.parametrize("width", [10**12, 10**30, 10**5000], ids=["large", "larger", "huge"])
def test_a_width_beyond_all_memory_is_refused(width):
    with pytest.raises(RoutingError, match="takes more memory than there is"):
        registry().encode([{}] * 100, width=width)


@pytest.mark.parametrize("factors", [3, "language", ["language"]])
def test_group_weights_of_another_form_are_refused(factors):
    with pytest.raises(RoutingError, match="group_weights must be"):
        registry().encode([], group_weights=factors)

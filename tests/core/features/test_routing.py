"""What of a routing is refused by its form alone, and how an input fits what is routed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flix
from flix.core.features.routing import as_array, check_form, check_routing, fits, unpacked
from tests.helpers.registry import registry


def array(*shape: Any, dtype: str = "int32") -> Any:
    """An array of which a framework knows this much."""
    return SimpleNamespace(shape=shape, dtype=SimpleNamespace(name=dtype))


UNKNOWN = SimpleNamespace(rank=None)


@pytest.mark.parametrize(
    ("ids", "weights", "match"),
    [
        (array(4, 2, dtype="float32"), None, "integer ids, got dtype float32; .*registry.encode"),
        (array(4, 2, dtype="bool"), None, "got dtype bool"),
        (array(3), None, r"\[batch, width\] or \[batch, length, width\], got \[3\]"),
        (array(1, 2, 3, 4), None, r"got \[1, 2, 3, 4\]"),
        (SimpleNamespace(shape=UNKNOWN, dtype="int32"), None, "got one of unknown rank"),
        (array(3, 2), None, "routes 3 rows, but the batch has 4 rows"),
        (array(4, 2), array(4, 2, dtype="int64"), "floating point, got dtype int64"),
        (array(4, 2), array(4, 3, dtype="float16"), r"flix_features, \[4, 2\], got \[4, 3\]"),
        (array(None, 2), array(4, 3, dtype="float16"), r"\[None, 2\], got \[4, 3\]"),
    ],
)
def test_the_form_of_routing(ids: Any, weights: Any, match: str) -> None:
    with pytest.raises(flix.RoutingError, match=match):
        check_form(ids, weights, batch=4)


def test_what_is_not_known_fits() -> None:
    check_form(array(None, None, dtype="uint8"), array(4, 7, dtype="bfloat16"), batch=4)
    check_form(array(4, 2), SimpleNamespace(shape=UNKNOWN, dtype="float32"))
    check_form(array(4, None, 2, dtype="int64"))
    check_form(array(2), dims=(1, 2, 3))


def test_weights_beside_a_routing_win() -> None:
    routing = registry().encode([{"language": "swa"}])
    ids, weights = unpacked(registry(), routing, None)
    assert ids is routing.ids and weights is routing.weights
    assert unpacked(registry(), routing, 3) == (routing.ids, 3)
    assert unpacked(registry(), "ids", "weights") == ("ids", "weights")
    other = flix.FeatureRegistry({"g": ["a"]})
    with pytest.raises(flix.RoutingError, match="encoded by another registry"):
        unpacked(other, routing, None)


def test_what_is_no_array() -> None:
    assert as_array("flix_features", [[1, 2]]).shape == (1, 2)
    with pytest.raises(
        flix.RoutingError, match=r"flix_weights must be an array .*\[\[0, 4\], \[1\]\]"
    ):
        as_array("flix_weights", [[0, 4], [1]])


@pytest.mark.parametrize(
    ("given", "lead", "lengths", "ways"),
    [
        ((4, 7), (4,), (), "rows"),
        ((4,), (4,), (), "rows"),
        ((4, 7, 2), (4, 7), (), "rows"),
        ((5, 7), (), (), "rows"),
        ((1, 7), (1,), (), "rows"),
        ((1, 7), (4,), (), "one"),
        ((1, 7), (0,), (), "one"),
        ((1, 7), (None,), (), "one"),
        ((1, 7), (4, 7), (), "one"),
        ((1, 6), (4, 7), (), ""),
        ((4, 6), (4, 7), (), ""),
        ((4,), (4, 7), (), ""),
        ((1,), (4, 7), (), ""),
        ((), (4,), (), ""),
        ((3, 7), (4,), (), ""),
        ((28,), (4,), (), ""),
        ((28,), (4,), (5, 7), "flat"),
        ((28,), (4, 7), (1,), "flat"),
        ((27,), (4,), (7,), ""),
        ((28, 2), (4,), (7,), ""),
        ((4,), (4,), (1,), "flat rows"),
        ((None,), (4,), (7,), "flat rows"),
        ((28,), (None,), (7,), "flat rows"),
        ((28,), (4,), (None,), "flat"),
        ((None, 7), (4,), (7,), "rows"),
        ((None, 7), (None, 6), (), ""),
    ],
)
def test_how_an_input_fits(given: Any, lead: Any, lengths: Any, ways: str) -> None:
    assert sorted(fits(given, lead, lengths)) == ways.split()


@pytest.mark.parametrize(
    ("ids", "lead"),
    [
        ((3, 2), (3,)),
        ((3, 2), (3, 7)),
        ((3, 7, 2), (3, 7)),
        ((3, 7, 2), (3, 7, 4)),
        ((0, 2), (0, 7)),
    ],
)
def test_ids_of_an_input_of_these_sizes(ids: Any, lead: Any) -> None:
    check_routing(np.zeros(ids, np.int32), None, registry(), lead=lead)


@pytest.mark.parametrize(
    ("ids", "lead", "named"),
    [
        ((3, 2), (4,), r"\[batch\] = \[3\].*\[4\]"),
        ((3, 7, 2), (3, 6), r"\[batch, length\] = \[3, 7\].*\[3, 6\]"),
        ((3, 7, 2), (3,), r"\[batch, length\] = \[3, 7\].*\[3\]"),
        ((3, 7, 2), (7, 3), r"\[batch, length\] = \[3, 7\].*\[7, 3\]"),
        ((3, 2), (), r"\[batch\] = \[3\].*\[\]"),
    ],
)
def test_ids_of_an_input_of_other_sizes_are_refused(ids: Any, lead: Any, named: str) -> None:
    with pytest.raises(flix.RoutingError, match=named):
        check_routing(np.zeros(ids, np.int32), None, registry(), lead=lead)


def test_weights_beyond_float32_are_refused() -> None:
    """They would be infinite where they are used."""
    ids, weights = np.array([[0], [1]]), np.array([[1.0], [-1e39]])
    beyond = r"got -1e\+39, beyond float32 in row 1 for language=swa"
    with pytest.raises(flix.RoutingError, match=beyond):
        check_routing(ids, weights, registry())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, -1], [1, 99]], r"the id 99 in row 1 \(position \[1, 1\]\); valid ids are 0 to {last}, and -1"),
        ([[[0], [-2]], [[0], [0]]], r"the id -2 in row 0 \(position \[0, 1, 0\]\); valid ids are 0 to {last}"),
    ],
)  # fmt: skip
def test_ids_beyond_the_registry_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(flix.RoutingError, match=message.format(last=len(registry()) - 1)):
        check_routing(np.array(ids), None, registry())


def test_ids_and_weights_that_break_no_rule_pass() -> None:
    group, name = registry().features[1]
    gone = registry().without_feature(group, name)
    ids = np.array([[0, -1], [2, 0]])
    check_routing(ids, np.ones((2, 2), np.float16), gone, batch=2)
    with pytest.raises(
        flix.RoutingError, match=rf"id 1 in row 1: {group}={name}, which was removed"
    ):
        check_routing(ids - np.array([[0], [1]]), None, gone)


def test_rows_of_a_routing_are_taken_by_number_slice_or_array() -> None:
    rows = [{group: name} for group, name in registry().features[:3]]
    whole = registry().encode(rows)
    for chosen, wanted in ((1, [1]), (np.int64(2), [2]), (slice(1, 3), [1, 2]), ([2, 0], [2, 0])):
        part = whole[chosen]
        np.testing.assert_array_equal(part.ids, whole.ids[wanted])
        np.testing.assert_array_equal(part.weights, whole.weights[wanted])
        assert part.registry is whole.registry

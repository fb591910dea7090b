"""What processes differ in is named, with their ranks."""

from __future__ import annotations

from flix.core.config.agreeing import digest, disagreement
from tests.helpers.registry import config


def test_equal_descriptions_do_not_differ() -> None:
    described = config().to_dict()
    assert disagreement([described, config().to_dict(), described]) is None
    assert digest(described) == digest(config().to_dict())


def test_one_differs_and_is_named() -> None:
    first, other = config().to_dict(), config(seed=3, alpha=2.0).to_dict()
    assert digest(first) != digest(other)
    found = disagreement([first, first, other])
    assert found is not None and found.startswith("rank 2 against rank 0: ")
    assert "seed: 3 against 0" in found and "alpha: 2.0 against {" in found


def test_ranks_that_differ_alike_are_named_together() -> None:
    first, other = {"layers": {"a": 1, "b": 2}}, {"layers": {"a": 1, "c": 2}}
    assert disagreement([first, other, first, other]) == "ranks 1, 3 against rank 0: layers: without 'b', with 'c'"  # fmt: skip
    assert disagreement([{"x": [1, 2]}, {"x": [2, 1]}]) == "rank 1 against rank 0: x: in another order"  # fmt: skip


def test_long_lists_are_cut() -> None:
    found = disagreement([{str(i): i for i in range(40)}, {str(i): -i - 1 for i in range(40)}])
    assert found is not None and found.endswith("and 34 more differences") and len(found) < 200


def test_what_is_missing_or_more_at_the_top_is_named_without_a_place() -> None:
    for other, found in (
        ({"a": 1, "b": 2}, "with 'b'"),
        ({}, "without 'a'"),
        ({"b": 1}, "without 'a', with 'b'"),
    ):
        assert disagreement([{"a": 1}, other]) == f"rank 1 against rank 0: {found}"


def test_what_a_list_lacks_or_has_more_is_named() -> None:
    found = disagreement([{"x": ["a", "b"]}, {"x": ["b", "c"]}])
    assert found == "rank 1 against rank 0: x: without 'a', with 'c'"


def test_a_list_that_has_an_entry_more_often_is_in_no_other_order() -> None:
    for first, other in (([1], [1, 1]), ([1, 1, 2], [1, 2, 2])):
        assert disagreement([{"x": first}, {"x": other}]) == f"rank 1 against rank 0: x: {other} against {first}"  # fmt: skip

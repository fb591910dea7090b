"""The words of errors: choices, near matches, values; and where warnings point."""

from __future__ import annotations

import warnings

import pytest

from flix import FlixError
from flix.core import errors
from flix.core.errors import listed, near, shown, warn


def test_choices_are_listed_and_cut() -> None:
    assert listed([]) == "none"
    assert listed(["a", 2]) == "a, 2"
    assert listed(range(5), 3) == "0, 1, 2, ... (5 in all)" and listed(range(3), 3) == "0, 1, 2"


def test_near_matches_are_suggested() -> None:
    assert near("lagnuage", ["task", "language"]) == " (did you mean 'language'?)"
    assert near("x", ["task"]) == "" and near("x", []) == ""
    # What differs in case or by compatibility alone is meant before what looks alike.
    assert near("HAU", ["hau1", "hau", "hal"]) == " (did you mean 'hau'?)"
    assert near("\ufb01n", ["fin", "fit"]) == " (did you mean 'fin'?)"
    assert near("name1", [f"name{i}" for i in range(2, 6)]).count("'") == 6
    assert near(7, ["7"]) == " (did you mean '7'?)"  # type: ignore[arg-type]


def test_long_texts_are_not_compared() -> None:
    """That takes time in proportion to the lengths' product."""
    text = "a" * 100
    assert near(text, [text + "b", text[1:] + "b"]) == f" (did you mean {text[1:] + 'b'!r}?)"
    assert near(text + "a", [text + "a"]) == ""
    assert near("hau", [*(str(i) for i in range(errors._MOST)), "hau"]) == ""


def test_values_are_shown_cut_whatever_they_are() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    assert shown("ab") == "'ab'" and shown("x" * 9, 8) == "'xxxx..."
    assert shown(Broken()) == "something of type Broken that cannot be shown"
    assert shown(10**5000) == "something of type int that cannot be shown"


def test_every_error_is_flixs_and_pythons() -> None:
    for name in errors.__dict__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, FlixError) and kind is not FlixError:
            assert kind.__mro__[-3] is Exception and len(kind.__bases__) in (1, 2)
            with pytest.raises(FlixError, match=r"^why$"):
                raise kind("why")


def test_a_warning_points_at_the_code_that_called_flix() -> None:
    inner: dict[str, object] = {"__name__": "flix.deep.inside", "warn": warn}
    exec("def f(): warn('odd')\ndef g(): f()", inner)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        inner["g"]()  # type: ignore[operator]
    assert [str(w.message) for w in found] == ["odd"] and found[0].filename == __file__

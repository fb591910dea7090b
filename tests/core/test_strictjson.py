"""JSON that anybody may have written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix import AdapterError
from flix.core.strictjson import parsed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(VALUES, st.booleans())
def test_what_json_writes_is_read(value: Any, plain: bool) -> None:
    text = json.dumps(value, ensure_ascii=plain)
    assert parsed(text, "f") == value
    if plain:
        assert parsed(text.encode(), "f") == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "the name 'c' occurs twice in an object"),
        ('{"a": 1, "b": 2, "a": 3, "b": 4}', "the name 'a' occurs twice in an object"),
        (
            json.dumps({"x" * 500: 1})[:-1] + ", " + json.dumps({"x" * 500: 2})[1:],
            f"the name '{'x' * 100}' occurs twice",
        ),
        ("[NaN]", "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ("[" * 100_000, "it nests too deeply"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        (b"\xff", "can't decode byte 0xff"),
        ("1" * 5000, "digits"),
    ],
)
def test_what_is_no_json_of_this_kind_is_damaged(text: str | bytes, why: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parsed(text, "'f.json'")
    assert str(caught.value).startswith("'f.json' is damaged: ") and why in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text('{}[]":,0a\\ -.eE', max_size=40))
def test_texts_of_its_signs_are_read_as_json_reads_them_or_refused(text: str) -> None:
    try:
        found = parsed(text, "f")
    except AdapterError:
        return
    assert found == json.loads(text)

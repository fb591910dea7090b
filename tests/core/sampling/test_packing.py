"""Packing short rows into long ones."""

from __future__ import annotations

from typing import Any

import pytest

import flix
from flix.core.sampling.packing import pack, segment_lengths


def row(first: int, tokens: int, **columns: Any) -> dict[str, Any]:
    return {"input_ids": list(range(first, first + tokens)), **columns}


def test_pack() -> None:
    rows = [
        row(10, 3, language="hau", task="ner"),
        row(20, 4, language=["swa", "eng"], task="pos"),
        row(30, 2, language=None, task="ner"),
        row(40, 1, language="yor", task="pos"),
    ]
    before = repr(rows)
    one, two = pack(rows, 6, pad_token_id=9)
    assert one["input_ids"] == [10, 11, 12, 40, 9, 9]
    assert one["position_ids"] == [0, 1, 2, 0, 0, 1]
    assert one["labels"] == [-100, 11, 12, -100, -100, -100]
    assert one["language"] == ["hau", "yor", None] and one["task"] == ["ner", "pos", None]
    assert two["input_ids"] == [20, 21, 22, 23, 30, 31]  # best fit: two tokens into the room of two
    assert two["position_ids"] == [0, 1, 2, 3, 0, 1]
    assert two["labels"] == [-100, 21, 22, 23, -100, 31]
    assert two["language"] == [["swa", "eng"], None] and set(two) == set(one)
    assert repr(rows) == before
    for packed in (one, two):
        assert len(packed["language"]) == len(segment_lengths(packed) or [])


def test_labels_at_their_own_positions() -> None:
    rows = [row(10, 2, labels=[5, 6], token_type_ids=[0, 1]), row(20, 2, labels=[7, -100], token_type_ids=[1, 1])]  # fmt: skip
    (packed,) = pack(rows, 5, causal=False)
    assert packed["labels"] == [5, 6, 7, -100, -100]
    assert packed["token_type_ids"] == [0, 1, 1, 1, 0]
    (given,) = pack([row(10, 3, labels=[-100, -100, 8])], 3)
    assert given["labels"] == [-100, -100, 8]


def test_nothing_is_lost() -> None:
    rows = [row(100 * i, 1 + (7 * i) % 11, number=i) for i in range(1, 40)]
    packed = pack(rows, 16)
    found = {
        number: tokens
        for each in packed
        for number, tokens in zip(each["number"], cut(each), strict=True)
        if number is not None
    }
    assert found == {r["number"]: r["input_ids"] for r in rows}
    assert all(len(each["input_ids"]) == 16 for each in packed)
    assert len(packed) <= 1.25 * sum(len(r["input_ids"]) for r in rows) / 16 + 1
    assert pack([], 4) == []


def cut(packed: dict[str, Any]) -> list[list[int]]:
    found, start = [], 0
    for length in segment_lengths(packed) or []:
        found.append(packed["input_ids"][start : start + length])
        start += length
    return found


def test_segment_lengths() -> None:
    assert segment_lengths({"segments": [2, 3]}) == [2, 3]
    assert segment_lengths({"position_ids": [0, 1, 2, 0, 0, 1]}) == [3, 1, 2]
    assert segment_lengths({"position_ids": [4, 5, 6]}) == [3]
    assert segment_lengths({"input_ids": [1]}) is None
    with pytest.raises(flix.RoutingError, match="positive numbers"):
        segment_lengths({"segments": [2, 0]})


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        ([row(1, 5)], 4, "row 0 has 5 tokens; a packed row holds 1 to 4"),
        ([row(1, 2), row(1, 0)], 4, "row 1 has 0 tokens"),
        ([row(1, 2)], 0, "length must be a whole number of 1 or more"),
        ([row(1, 2, attention_mask=[1, 0])], 4, "row 0 is padded"),
        ([row(1, 2, labels=[1])], 4, "2 tokens and 1 labels"),
        ([{"text": "x"}], 4, "a row to pack has input_ids"),
        ([row(1, 2, a=1), row(1, 2)], 4, "row 1: packed rows need the same columns; 'a'"),
    ],
)
def test_mistakes(rows: Any, length: int, message: str) -> None:
    with pytest.raises(flix.RoutingError, match=message):
        pack(rows, length)
    if message.startswith("2 tokens"):
        with pytest.raises(flix.RoutingError, match="has labels"):
            pack([row(1, 2)], 4, causal=False)

"""Bytes as tokens."""

from __future__ import annotations

import numpy as np
import pytest

from tools import tokens

TEXTS = ["", "num: zwölf", "ქართული", "Ełk 北", "a" * 30]


def test_round_trip() -> None:
    ids, mask = tokens.encode(TEXTS)
    assert ids.shape == mask.shape == (5, 31)
    assert ids.dtype == mask.dtype == np.int64
    assert (ids[mask == 0] == tokens.PAD).all()
    assert tokens.decode(ids) == TEXTS
    assert mask.sum(axis=1).tolist() == [len(text.encode()) + 1 for text in TEXTS]


def test_labels_ignore_padding() -> None:
    ids, mask = tokens.encode(TEXTS)
    assert (tokens.labels(TEXTS) == np.where(mask == 1, ids, -100)).all()


def test_long_texts_are_cut_before_the_end_token() -> None:
    ids, _ = tokens.encode(["abcdef", "x"], max_length=4)
    assert ids.tolist() == [[100, 101, 102, 1], [123, 1, 0, 0]]


def test_no_texts() -> None:
    ids, mask = tokens.encode([])
    assert ids.shape == mask.shape == (0, 1)
    assert tokens.decode(ids) == []


def test_decode_stops_at_the_end_and_survives_anything() -> None:
    assert tokens.decode([[0, 100, 1, 101]]) == ["a"]
    assert tokens.decode([[tokens.FIRST_SENTINEL, 100, 2]]) == ["a"]
    assert tokens.decode([[0xC3 + 3, 1]]) == ["�"]
    assert tokens.VOCABULARY == tokens.FIRST_SENTINEL + tokens.SENTINELS


def test_pad() -> None:
    assert tokens.pad([[4, 5], [6]]).tolist() == [[4, 5], [6, 0]]


def test_agrees_with_byt5() -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.ByT5Tokenizer()
    batch = other(TEXTS, padding=True, return_tensors="np")
    ids, mask = tokens.encode(TEXTS)
    assert (batch["input_ids"] == ids).all()
    assert (batch["attention_mask"] == mask).all()
    special = (other.pad_token_id, other.eos_token_id, other.unk_token_id)
    assert special == (tokens.PAD, tokens.EOS, tokens.UNK)
    assert other.convert_tokens_to_ids("<extra_id_0>") == tokens.FIRST_SENTINEL

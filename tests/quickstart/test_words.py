"""Lists of words and their lemmas."""

from __future__ import annotations

import pytest

from flix.quickstart import words


def test_words() -> None:
    pytest.importorskip("wordfreq")
    german = words.words("de", 500)
    assert "und" in german[:20]
    welsh = words.words("cy", 300)
    assert len(welsh) == len(set(welsh)) == 300
    assert all(words.is_word(word) for word in german + welsh)
    assert words.lemma_dictionary("id").get("berambut") == "rambut"


def test_another_simplemma_layout_is_read_the_public_way(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary_factory = pytest.importorskip("simplemma.strategies.dictionaries.dictionary_factory")
    direct = list(words._records("id", 2000, 50))
    monkeypatch.delattr(dictionary_factory, "_read_decompressed")
    words.lemma_dictionary.cache_clear()
    table = {"a": "b", "c": "d", "e": "f"}
    monkeypatch.setattr(words, "lemma_dictionary", lambda language: table)
    assert len(direct) == 40
    assert list(words._records("id", 3, 2)) == [("a", "b"), ("e", "f")]

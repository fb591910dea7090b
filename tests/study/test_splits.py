"""A key is in one split; forms go with their lemmas; rows of two splits are in none."""

from __future__ import annotations

import random

import pytest

from flix.study.words.splits import key_of, make_splits, plain


def test_keys_ignore_case_and_where_marks_are_aside_marks():
    assert key_of("Été", "Latn") == "ete"
    assert key_of("שָׁלוֹם", "Hebr") == key_of("שלום", "Hebr")
    assert key_of("Straße", "Latn") == key_of("STRASSE", "Latn")
    assert key_of("はは", "Jpan") != key_of("ばば", "Jpan")
    assert key_of("कि", "Deva") != key_of("क", "Deva")


def test_plain_is_nfc_without_marks():
    assert plain("tiếng Việt") == "tieng Viet"
    assert plain("한국") == "한국"


def test_a_form_is_where_its_lemma_is():
    splits = make_splits("eng", "Latn", 0, [("walk", "walks", "dev")])
    for words in (["walks"], ["WALK"], ["walk", "walks"]):
        assert splits.split_of(splits.keys(words)) == "dev"


def test_a_row_of_two_splits_is_in_none():
    splits = make_splits("eng", "Latn", 0, [("see", "saw", "train"), ("saw", "saws", "test")])
    assert splits.split_of(splits.keys(["see", "saw"]), "train") is None
    assert splits.split_of(splits.keys(["saw"])) is None  # of both lemmas
    assert splits.split_of(splits.keys(["saws"])) == "test"
    assert splits.split_of(splits.keys(["see"])) == "train"


def test_what_a_shared_task_says_of_the_row_counts():
    splits = make_splits("eng", "Latn", 0, [("walk", "walks", "train")])
    assert splits.split_of(splits.keys(["walks"]), "train") == "train"
    assert splits.split_of(splits.keys(["walks"]), "test") is None


def test_sources_count_in_their_order_and_the_last_split_within_one():
    others = [[("walks", "test"), ("run", "dev")], [("run", "test"), ("go", "train"), ("go", "test")]]  # fmt: skip
    splits = make_splits("eng", "Latn", 0, [("walk", "walks", "train")], others)
    assert splits.split_of(splits.keys(["walks"])) == "train"
    assert splits.split_of(splits.keys(["run"])) == "dev"
    assert splits.split_of(splits.keys(["go"])) == "test"


def test_unclaimed_words_are_drawn_by_seed_and_language():
    def drawn(language: str, seed: int) -> list[str | None]:
        splits = make_splits(language, "Latn", seed, [])
        return [splits.split_of(splits.keys([f"word{number}"])) for number in range(2000)]

    assert drawn("eng", 0) == drawn("eng", 0)
    assert drawn("eng", 0) != drawn("eng", 1) != drawn("deu", 1)
    shares = {split: drawn("eng", 0).count(split) / 2000 for split in ("train", "dev", "test")}
    assert shares["train"] == pytest.approx(0.70, abs=0.04)
    assert shares["dev"] == pytest.approx(0.12, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_claimed_no_lemma_is_in_two_splits(seed: int):
    """Many homographs: rows of all kinds are split, and no word, nor a lemma of one, is in two splits."""
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(60)]
    parts = ("train", "dev", "test")
    of = {word: draw.choice(parts) for word in words}
    inflected = [(lemma, draw.choice(words), of[lemma]) for lemma in words for _ in range(2)]
    claims = [(draw.choice(words), draw.choice(parts)) for _ in range(40)]
    splits = make_splits("eng", "Latn", seed, inflected, [claims])
    lemmas = {word: {word} | {a for a, b, _ in inflected if b == word} for word in words}
    seen: dict[str, set[str]] = {split: set() for split in parts}
    rows = [((lemma, form), split) for lemma, form, split in inflected]
    rows += [((word,), None) for word in words]
    for shown, official in rows:
        split = splits.split_of(splits.keys(shown), official)
        if split is not None:
            assert official in (None, split)
            seen[split] |= set().union(*(lemmas[word] for word in shown))
    assert sum(map(len, seen.values())) > 10
    assert not seen["train"] & seen["test"] | seen["train"] & seen["dev"] | seen["dev"] & seen["test"]  # fmt: skip

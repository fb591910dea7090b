"""What each task asks, of which rows."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from flix.study.words.spoilt import spoil, spoilt_pairs
from flix.study.words.tasks import Texts, rows_of

TEXTS = Texts(
    inflected=[
        ("gehen", "V;PST", "ging", "train"),
        ("gehen", "V;NFIN", "gehen", "train"),
        ("gehen", "V;SBJV", "gehen", "train"),
        ("ging hin", "V;NFIN", "ging", "test"),
    ],
    segmented=[
        ("gehend", ("gehen", "end"), "train"),
        ("East Indian", ("East Indies", "ian"), "train"),
        ("rituximab", ("@@tu", "ximab"), "train"),
        ("pheneticist", ("pheno", "", "ist"), "train"),
        ("a|b", ("a|", "b"), "train"),
    ],
    spoken=[("Tür", "tyːɐ̯"), ("modern", "moˈdɛʁn"), ("modern", "ˈmoːdɐn"), ("a", "aː"), ("in se", "ɪnzə")],
)  # fmt: skip


def asked(task: str, accents: bool = True) -> dict[str, str]:
    return {row.source: row.target for row in rows_of(task, TEXTS, accents=accents)}


def test_forms_from_lemmas_and_back():
    assert asked("inflect")["gehen V;PST"] == "ging"
    assert asked("lemma") == {"gehen": "gehen"}, "ging has two lemmas"
    assert asked("tags") == {"ging < gehen": "V;PST", "ging < ging hin": "V;NFIN"}


def test_rows_show_lemma_and_form_and_keep_their_shared_tasks_split():
    for task in ("inflect", "tags"):
        rows = {row.words: row.official for row in rows_of(task, TEXTS, accents=False)}
        assert rows["gehen", "ging"] == "train"
        assert rows["ging hin", "ging"] == "test"


def test_segments_of_single_words_with_morphs_as_they_should_be():
    assert asked("segment") == {"gehend": "gehen|end"}


def test_words_with_one_pronunciation_and_back():
    assert asked("pron") == {"Tür": "tyːɐ̯"}
    assert asked("spell") == {"tyːɐ̯": "Tür"}


def test_accents_are_restored_where_they_are_worth_it():
    assert asked("accent")["Tur"] == "Tür"
    assert asked("accent", accents=False) == {}


def test_a_source_of_several_targets_is_left_out():
    texts = Texts(spoken=[("mare", "maʁ"), ("marre", "maʁ"), ("pêche", "pɛʃ"), ("pèche", "pɛʃe")])
    assert {row.source for row in rows_of("spell", texts, accents=True)} == {"pɛʃ", "pɛʃe"}
    assert {row.source for row in rows_of("accent", texts, accents=True)} == {"mare", "marre"}


@pytest.mark.parametrize("seed", range(20))
def test_spoilt_lines_differ_from_the_line_and_keep_most_of_it(seed: int):
    draw = random.Random(seed)
    for line in ("ab", "aaaa", "jihokorejský won", "გამარჯობა"):
        found = spoil(line, draw)
        assert found != line
        assert abs(len(found) - len(line)) <= max(1, round(0.3 * len(line)))
        assert found


def test_lines_are_of_the_words_and_the_same_for_a_seed():
    words = ["ein", "zwei", "drei"]
    some = list(islice(spoilt_pairs(words, random.Random("a")), 50))
    assert some == list(islice(spoilt_pairs(words, random.Random("a")), 50))
    assert some != list(islice(spoilt_pairs(words, random.Random("b")), 50))
    assert {word for pair in some for word in pair.target.split()} == set(words)
    assert {len(pair.target.split()) for pair in some} == {1, 2, 3}
    assert list(spoilt_pairs([], random.Random("a"))) == []

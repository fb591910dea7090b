"""Cells, and which of them are held out."""

from __future__ import annotations

import math
import warnings
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flix import FeatureError, FeatureRegistry
from flix.core.features.cells import (
    HeldOut,
    MixtureError,
    cell_name,
    cell_of,
    covering,
    features_of,
    names_of,
    read_cell,
)


def test_cells_of_rows():
    row = {"language": ["yor", "hau", "yor"], "task": "ner", "domain": None}
    cell = cell_of(row)
    assert cell == (("language", ("hau", "yor")), ("task", ("ner",)))
    assert cell_name(cell) == "language=hau+yor,task=ner"
    assert cell_name(cell_of(row, ["task", "language"])) == "task=ner,language=hau+yor"
    assert names_of("language", {"hau": 0.7, "yor": None, "swa": 0.0}) == ("hau", "swa")
    for wrong in (
        "",
        [],
        {},
        3,
        ["hau", ""],
        {"hau": "x"},
        {"hau": math.nan},
        {"hau": None},
        b"hau",
    ):
        with pytest.raises(FeatureError):
            names_of("language", wrong)


def test_features_that_others_imply_count():
    registry = FeatureRegistry(
        {"language": ["fra", "hau"], "family": ["romance"], "task": ["ner"]},
        {("language", "fra"): [("family", "romance")]},
    )
    cell = cell_of({"language": "fra", "task": "ner"})
    assert ("family", "romance") in features_of(cell, registry)
    held = HeldOut([{"family": "romance"}])
    assert held.covers({"language": "fra"}, registry)
    assert not held.covers({"language": "fra"}) and not held.covers({"language": "hau"}, registry)
    with pytest.raises(FeatureError, match="no feature 'frau'"):
        held.covers({"language": "frau"}, registry)


LANGUAGES, TASKS = ["hau", "swa", "yor"], ["ner", "topic"]
values = {
    "language": st.lists(st.sampled_from(LANGUAGES), min_size=1, max_size=3, unique=True),
    "task": st.lists(st.sampled_from(TASKS), min_size=1, max_size=2, unique=True),
}
entries = st.fixed_dictionaries(
    {}, optional={"language": st.sampled_from(LANGUAGES), "task": st.sampled_from(TASKS)}
).filter(bool)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(entries, max_size=3), st.lists(st.fixed_dictionaries(values), min_size=1, max_size=5)
)
def test_a_row_is_held_out_if_any_of_its_combinations_is(held, rows):
    found = HeldOut(held)
    matches = found.among([cell_of(row) for row in rows])
    assert matches.shape == (len(held), len(rows))
    for number, row in enumerate(rows):
        combinations = [dict(zip(row, names, strict=True)) for names in product(*row.values())]
        for entry, matched in zip(held, matches[:, number].tolist(), strict=True):
            assert matched == any(entry.items() <= c.items() for c in combinations)
        assert found.covers(row) == matches[:, number].any()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(entries, min_size=1, max_size=3),
    st.lists(st.fixed_dictionaries(values), min_size=1, max_size=5),
)
def test_entries_that_match_nothing_are_refused(held, rows):
    found, cells = HeldOut(held), [cell_of(row) for row in rows]
    unmatched = [n for n, some in enumerate(found.among(cells).any(axis=1)) if not some]
    assume(unmatched)
    with pytest.raises(MixtureError) as caught:
        found.check_matched(cells)
    assert f"held_out[{unmatched[0]}]" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"language": "hua"}, "no row has the language 'hua' .did you mean 'hau'.*there is: hau, swa"),
        ({"langage": "hau"}, "there is no group 'langage' .did you mean 'language'"),
        ({"language": "swa", "task": "topic"}, "never together; the nearest cells are: language=hau,task=topic"),
    ],
)  # fmt: skip
def test_the_reason_is_named(entry, message):
    cells = [
        cell_of({"language": language, "task": task})
        for language, task in (("hau", "ner"), ("hau", "topic"), ("swa", "ner"))
    ]
    with pytest.raises(MixtureError, match=r"held_out\[0\] .* matches no row: .*" + message):
        HeldOut([entry]).check_matched(cells)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([{}], r"held_out\[0\] is empty"),
        ([{"task": "ner"}, "swa"], r"held_out\[1\]: features are written as group=name"),
        ([""], r"held_out\[0\] is empty"),
        (['task="n\\er"'], r"held_out\[0\]: .* is not quoted as in JSON"),
        ([{"task": "ner"}, 3], r"held_out\[1\] must be"),
        ([{"task": ["ner"]}], r"held_out\[0\]: a feature's name"),
        (["task=ner+pos"], r"held_out\[0\]: a feature's name"),
        ([{"task": "ner "}], r"held_out\[0\]: .*ends with a blank"),
        ([{"ta\u200bsk": "ner"}], r"held_out\[0\]: .*U\+200B \(ZERO WIDTH SPACE\)"),
        (
            [{"größe": "a", "gro\u0308ße": "b"}],
            r"held_out\[0\]: .*given twice, in two Unicode forms",
        ),
        ({"task": "ner"}, "held_out is a list"),
        ("task=ner", "held_out is a list"),
        (3, "held_out is a list"),
    ],
)
def test_ill_formed_entries(cells, message):
    with pytest.raises(MixtureError, match=message):
        HeldOut(cells)


def test_covering_without_entries_or_cells():
    assert covering([], [{1}]).shape == (0, 1)
    assert covering([{1}], []).shape == (1, 0)
    assert covering([{1}, {2, 3}], [{1, 2}, {2, 3}]).tolist() == [[True, False], [False, True]]


NFC, NFD = "español", "espan\u0303ol"


def test_names_are_compared_in_nfc():
    assert names_of("language", [NFD, NFC]) == (NFC,)
    assert cell_of({"gro\u0308ße": NFD}) == cell_of({"größe": NFC}) == (("größe", (NFC,)),)
    for entry, row in ((NFC, NFD), (NFD, NFC)):
        held = HeldOut([{"language": entry}])
        assert held.covers({"language": row}) and held.covers({"language": ["hau", row]})
        assert held.among([cell_of({"language": row})]).all()
    with pytest.raises(FeatureError, match="ends with a blank"):
        HeldOut([{"language": "eng"}]).covers({"language": "eng "})


@pytest.mark.parametrize("name", ["ENG", "Eng", "ｅｎｇ"])
def test_names_that_are_almost_a_held_out_one_get_a_warning(name):
    held = HeldOut([{"language": "eng"}])
    with pytest.warns(UserWarning, match=f"'eng' and '{name}' differ only in case or by compat"):
        assert not held.covers({"language": name})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not held.covers({"language": name})  # once is enough
        assert held.covers({"language": "eng"}) and not held.covers({"task": name})


SIGNS = st.text(st.sampled_from('ab+,="\\é '), min_size=1, max_size=4).filter(
    lambda text: text == text.strip()
)
odd_cells = st.dictionaries(SIGNS, st.lists(SIGNS, min_size=1, max_size=3, unique=True), min_size=1, max_size=3)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(odd_cells)
def test_a_cells_name_can_be_read_back_so_no_two_cells_share_one(features):
    cell = cell_of(features)
    assert cell_of(read_cell(cell_name(cell))) == cell


def test_names_that_hold_the_signs_of_cells_are_quoted():
    assert cell_name(cell_of({"language": "eng+hin"})) == 'language="eng+hin"'
    assert cell_name(cell_of({"language": ["eng", "hin"]})) == "language=eng+hin"
    assert cell_name(cell_of({"a=b": 'c"d', "e": "f,g"})) == '"a=b"="c\\"d",e="f,g"'
    assert read_cell(" language = eng + hin , task=ner ") == {"language": ["eng", "hin"], "task": ["ner"]}  # fmt: skip
    assert HeldOut(["language=swa,task=ner"]).cells == ({"language": "swa", "task": "ner"},)


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "=b", "a=b,", "a=b+", "a=b=c", "a+b=c", 'a="b', "a=b,a=c", "a=b,,c=d"]
)
def test_texts_that_are_no_cells(text):
    with pytest.raises(FeatureError, match=r"written as group=name|given twice"):
        read_cell(text)


def test_entries_are_counted_shown_and_checked_against_the_cells():
    held = HeldOut([{"language": "hau", "task": "ner"}, "task=pos"])
    assert len(held) == 2
    assert repr(held) == "HeldOut([{'language': 'hau', 'task': 'ner'}, {'task': 'pos'}])"
    cells = [cell_of({"language": "hau", "task": task}) for task in ("ner", "pos")]
    held.check_matched(cells)
    with pytest.raises(MixtureError, match=r"held_out\[1\] \(task=pos\) matches no row"):
        held.check_matched(cells[:1])
    HeldOut([]).check_matched(cells)

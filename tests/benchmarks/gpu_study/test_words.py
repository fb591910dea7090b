"""A base may not be pretrained on words that the study asks."""

import pytest

from benchmarks.gpu_study.words import entries, read_unlabelled
from flix.data.errors import DataError
from flix.study.words import Cell, Pair, WordsData, write_words

LINES = {"deu": ("Haus gehen", "schön"), "fra": ("maison", "été aller")}


def data(extra=(), lines=LINES, tasks=("denoise",)):
    """Two languages of which one is small; ``extra`` are more cells."""
    cells = list(extra)
    for language, texts in lines.items():
        train = tuple(Pair(text.replace("e", "_"), text) for text in texts)
        test = (Pair("W_rt", "Wort"),)
        cells += [Cell(language, task, train, (), test) for task in tasks]
    families = {"denoise": "repair", "pron": "sound", "inflect": "word"}
    return WordsData(tuple(cells), families, {"deu": "germanic", "fra": "italic"}, fingerprint=SAID)


SAID = {"build": 1, "seed": 0, "denoise": True}


def test_rows_and_words_are_read(tmp_path):
    write_words(data(), tmp_path / "words")
    found = read_unlabelled(tmp_path / "words")
    assert found.rows["deu"] == (Pair("Haus g_h_n", "Haus gehen"), Pair("schön", "schön"))
    assert found.words() == {
        "deu": ["Haus", "gehen", "schön"],
        "fra": ["maison", "été", "aller"],
    }
    assert found.compared == 2 and len(found.digest) == 64


def test_languages_without_unlabelled_rows_are_named(tmp_path):
    some = [Cell("deu", "pron", (Pair("Haus", "haʊs"),) * 3, (), (Pair("Maus", "maʊs"),))]
    write_words(data(some, {"fra": LINES["fra"]}), tmp_path / "words")
    with pytest.raises(DataError, match=r"no unlabelled rows \(denoise\) in deu; .*--denoise"):
        read_unlabelled(tmp_path / "words")


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("half", [None, "test"])
def test_a_word_of_a_dev_or_test_row_is_named(tmp_path, split, half):
    asked = (Pair("SCHON V;PST", "ging"),)  # the key has neither case nor accents
    rows = {"dev": (), "test": (), split: asked}
    leaking = Cell("deu", "inflect", (), rows["dev"], rows["test"], half)
    write_words(data([leaking]), tmp_path / "words")
    with pytest.raises(DataError, match=r"of deu hold words .*'SCHON' \(inflect/deu\)"):
        read_unlabelled(tmp_path / "words")


def test_another_language_has_words_of_its_own(tmp_path):
    write_words(data([Cell("fra", "pron", (), (), (Pair("Haus", "os"),))]), tmp_path / "words")
    assert read_unlabelled(tmp_path / "words").compared == 3


def test_a_changed_folder_is_refused(tmp_path):
    write_words(data(), tmp_path / "words")
    file = tmp_path / "words" / "denoise" / "deu.test.jsonl.gz"
    file.write_bytes((tmp_path / "words" / "denoise" / "deu.train.jsonl.gz").read_bytes())
    with pytest.raises(DataError, match="not as it was written"):
        read_unlabelled(tmp_path / "words")


@pytest.mark.parametrize(
    ("task", "pair", "words"),
    [
        ("inflect", Pair("take off V;PST", "took off"), ["take off", "took off"]),
        ("lemma", Pair("took", "take"), ["took", "take"]),
        ("tags", Pair("took < take", "V;PST"), ["took", "take"]),
        ("segment", Pair("taken", "take|n"), ["taken"]),
        ("pron", Pair("take", "teɪk"), ["take"]),
        ("spell", Pair("teɪk", "take"), ["take"]),
        ("accent", Pair("ete", "été"), ["été"]),
        ("denoise", Pair("t_ke off", "take off"), ["take", "off"]),
        ("num2dig", Pair("twenty-one", "21"), ["twenty-one"]),
        ("name2en", Pair("Deutschland", "Germany"), ["Deutschland"]),
    ],
)
def test_the_words_of_a_row_are_those_of_its_split(task, pair, words):
    assert list(entries(task, pair)) == words

"""Cells of tiny clones: nothing tested is trained on, held-out cells have one half, and all is the same for a seed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flix.data.errors import DataError
from flix.study.words import HELD_OUT, WordsData, load_words, official_rows
from flix.study.words.build import check_cells, take
from flix.study.words.design import COPY_SHARE, QUICKSTART_TASKS
from flix.study.words.loading import read_texts
from flix.study.words.quickstart import borrowed
from flix.study.words.reading import find_language, find_repositories
from flix.study.words.splits import key_of, plain
from flix.study.words.tasks import Row
from flix.study.words.types import Cell
from tests.study.clones import (
    SOME,
    folder_of,
    inflected,
    made_up,
    make_clones,
    segmented,
    small_quickstart,
    write_lines,
)
from tests.study.oracle import assert_disjoint, words_by_split


def test_every_cell_that_the_files_have(data: WordsData):
    assert data.languages == SOME
    assert set(data.tasks) == {
        "inflect", "lemma", "tags", "segment", "pron", "spell", "accent", "denoise", *QUICKSTART_TASKS,
    }  # fmt: skip
    assert [c.language for c in data.cells if c.task == "inflect"] == ["dan", "deu", "eng", "fra", "spa"]  # fmt: skip
    assert [c.language for c in data.cells if c.task == "segment"] == ["ces", "eng", "fra", "lat", "mon", "spa"]  # fmt: skip
    assert [c.language for c in data.cells if c.task == "date2en"] == ["ces", "deu", "fra"]
    assert len({(c.language, c.task) for c in data.cells}) == len(data.cells)


def test_no_word_is_in_two_splits_of_a_language(data: WordsData):
    assert_disjoint(data)
    shown = {plain(word) for word in words_by_split(data)["deu"]["train"]}
    assert not shown & {plain(word) for word in words_by_split(data)["deu"]["test"]}


def test_what_is_trained_on_is_known(data: WordsData):
    for language, words in words_by_split(data).items():
        keys = {split: {key_of(word, "Latn") for word in words[split]} for split in words}
        assert keys["train"] <= data.trained[language]
        assert not (keys["dev"] | keys["test"]) & data.trained[language]


def test_the_check_of_splits_would_see_a_word_of_both(data: WordsData):
    cell = data.cell("pron", "deu")
    broken = Cell(
        "deu", "spell", cell.train, cell.dev, (cell.train[0],)
    )  # sounds and words swapped
    spoilt = WordsData((cell, broken), data.families, data.branches)
    with pytest.raises(AssertionError):
        assert_disjoint(WordsData((*spoilt.cells, Cell("deu", "pron", cell.test, (), ())), data.families, data.branches))  # fmt: skip


def test_held_out_cells_are_the_designs_and_the_quickstarts(data: WordsData):
    held = {(c.task, c.language): c.held_out for c in data.held_out()}
    there = {(c.task, c.language) for c in data.cells}
    assert held == {k: v for k, v in {**HELD_OUT, ("num2dig", "ces"): "test"}.items() if k in there}
    assert {c.held_out for c in data.held_out("tuning")} == {"tuning"}
    for cell in data.cells:
        sizes = [bool(cell.train), bool(cell.dev), bool(cell.test)]
        assert sizes == {None: [True] * 3, "tuning": [False, True, False], "test": [False, False, True]}[cell.held_out]  # fmt: skip


def test_rows_are_as_flix_data_takes_them(data: WordsData):
    row = next(row for row in data.rows("train") if row["task"] == "segment" and row["language"] == "eng")  # fmt: skip
    assert row == {
        "language": "eng", "task": "segment", "family": "word", "branch": "germanic", "shared": "all",
        "source": row["source"], "target": f"{row['source'][:4]}|{row['source'][4:]}",
    }  # fmt: skip
    count = sum(len(c.train) + len(c.dev) + len(c.test) for c in data.cells)
    assert sum(1 for split in ("train", "dev", "test") for _ in data.rows(split)) == count
    with pytest.raises(KeyError, match="no cell accent/eng"):
        data.cell("accent", "eng")


def test_few_rows_are_answered_by_copying(data: WordsData):
    for cell in data.cells:
        for split in ("train", "dev", "test"):
            pairs = cell.pairs(split)
            assert sum(p.source == p.target for p in pairs) <= COPY_SHARE * len(pairs), cell.name
            assert len({p.source for p in pairs}) == len(pairs) or cell.task == "denoise"
    first = [pair.source == pair.target for pair in data.cell("lemma", "fra").test][:3]
    assert not all(first)


def test_a_split_holds_few_copies_and_not_all_of_them_first():
    rows = [(Row(f"w{number}", f"w{number}" if number % 4 else "x", ()), set()) for number in range(400)]  # fmt: skip
    for size in (0, 19, 60, 100, 400):
        taken = take(rows, size, (0, "accent", "lat"))
        copies = [place for place, (row, _) in enumerate(taken) if row.source == row.target]
        assert len(taken) == min(size, 105) and len(copies) == int(min(size, 105) * COPY_SHARE)
        assert size < 60 or max(copies) > len(copies)
    assert [row for row, _ in take(rows, 60, (1,))] != [row for row, _ in take(rows, 60, (2,))]


def test_the_same_for_a_seed_and_other_for_another(clones: Path, data: WordsData):
    def load(seed: int) -> WordsData:
        return load_words(clones, languages=["dan", "deu", "eng"], quickstart=False, seed=seed)

    one, other = load(0), load(1)
    assert one == load(0)
    assert one.cell("pron", "eng") == data.cell("pron", "eng"), "other languages change nothing"
    assert one.cell("pron", "deu").test != other.cell("pron", "deu").test
    assert_disjoint(other)
    tested = {pair.source.split()[0] for pair in one.cell("inflect", "deu").test}
    assert tested <= set(made_up(48, 12)), "the shared task's own test lemmas, whatever the seed"


def test_a_number_that_is_tested_is_not_spelt_in_training(data: WordsData):
    """The quickstart tests "zwölf" in German, so that no German task trains on it; in French, any may."""
    assert any(p.source == "zwölf" for p in data.cell("num2dig", "deu").test)
    assert "zwolf" not in data.trained["deu"]


def test_unlabelled_text_is_off_by_default(clones: Path):
    cells = load_words(clones, languages=["lat"], quickstart=False).cells
    assert "denoise" not in {cell.task for cell in cells}


def test_complete_cells_train_on_all_that_is_there(clones: Path, data: WordsData):
    quickstart = borrowed(small_quickstart())
    full = load_words(clones, languages=SOME, quickstart=quickstart, complete=True)
    assert {(c.task, c.language) for c in full.held_out()} == {("num2dig", "ces")}
    words = made_up(0, 36)
    assert {(p.source, p.target) for p in full.cell("inflect", "spa").train} == {
        (f"{lemma} {tags}", form) for lemma, tags, form in (x.split("\t") for x in inflected(words))
    }
    copied = [pair.source == pair.target for pair in full.cell("lemma", "spa").train]
    assert sum(copied) == 36 and len(copied) == 4 * 36
    assert full.fingerprint["complete"] and not data.fingerprint["complete"]
    assert_disjoint(full)
    trained = {pair.source for pair in full.cell("segment", "eng").train}
    assert not trained & {row["source"] for row in official_rows(clones, full, "segment", "eng")}


def test_official_test_sets_are_whole_and_apart(clones: Path, data: WordsData):
    rows = list(official_rows(clones, data, "inflect", "deu"))
    assert [(r["source"], r["target"]) for r in rows] == [
        (f"{lemma} {tags}", form) for lemma, tags, form in (x.split("\t") for x in inflected(made_up(48, 12)))
    ]  # fmt: skip
    assert not any(row["trained_on"] for row in rows)
    rows = list(official_rows(clones, data, "segment", "eng"))
    assert len(rows) == 50 + 10 + 2
    words = {row["source"] for row in rows if row["trained_on"]}
    assert words and words <= {f"{lemma}ol" for lemma in made_up(0, 36)}
    trained = {pair.source for pair in data.cell("segment", "eng").train}
    assert "twice" in {row["source"] for row in rows}
    assert not trained & {row["source"] for row in rows}
    with pytest.raises(DataError, match="'spell' has no official test set; these have: inflect, segment, pron"):  # fmt: skip
        next(official_rows(clones, data, "spell", "deu"))
    with pytest.raises(DataError, match="no official test set for segment/deu"):
        next(official_rows(clones, data, "segment", "deu"))


@pytest.mark.parametrize("complete", [False, True])
def test_words_of_the_pronunciation_task_are_pronounced_and_spelled_in_no_training_row(clones: Path, complete: bool):  # fmt: skip
    made = load_words(clones, languages=SOME, quickstart=borrowed(small_quickstart()), complete=complete)  # fmt: skip
    rows = list(official_rows(clones, made, "pron", "fra"))
    asked = {row["source"] for row in rows}
    assert [row["source"] for row in rows] == [*made_up(500, 20), *made_up(0, 20), "nowhere"]
    assert rows[-1]["target"] == "NOWHERE"
    cells = made.cell("pron", "fra"), made.cell("spell", "fra")
    assert not asked & {pair.source for pair in cells[0].train + cells[0].dev}
    assert not asked & {pair.target for pair in cells[1].train + cells[1].dev}
    assert asked & {pair.source for pair in cells[0].test} or complete
    told = {row["source"] for row in rows if row["trained_on"]}
    assert told and told <= set(
        made_up(0, 20)
    )  # by the inflection task, which has them in its training file
    assert_disjoint(made)
    assert made.fingerprint["repositories"]["2021-task1"]["files"][0]["lines"] == 41


def test_the_clone_of_the_pronunciation_task_may_be_missing(clones: Path, tmp_path: Path):
    some = shutil.copytree(clones, tmp_path / "clones")
    shutil.rmtree(some / "2021-task1")
    made = load_words(some, languages=SOME, quickstart=borrowed(small_quickstart()))
    assert set(made.fingerprint["repositories"]) == {"2023InflectionST", "2022SegmentationST", "wikipron"}  # fmt: skip
    with pytest.raises(DataError, match="no official test set for pron/fra"):
        next(official_rows(some, made, "pron", "fra"))
    (some / "2021-task1").mkdir()
    with pytest.raises(DataError, match=r"2021-task1.* has another layout"):  # fmt: skip
        load_words(some, languages=["fra"], quickstart=False)
    (some / "2021-task1" / "data").mkdir()
    with pytest.raises(DataError, match=r"1 files of the study are not there: .*medium/fre_test\.tsv"):  # fmt: skip
        load_words(some, languages=["fra"], quickstart=False)


def test_a_word_of_the_official_test_set_is_read_from_no_other_file(clones: Path):
    files = find_language(find_repositories(clones), "eng")
    texts, _ = read_texts(files, "eng", 0, False)
    splits = {
        split: {word for word, _, of in texts.segmented if of == split}
        for split in ("train", "dev", "test")
    }
    assert {"twice", f"{made_up(0, 1)[0]}ol"} <= splits["test"]
    assert not splits["test"] & (splits["train"] | splits["dev"])
    assert min(map(len, splits.values())) > 50


def test_unknown_languages_and_commits_are_named(clones: Path):
    with pytest.raises(DataError, match="no language 'ger'"):
        load_words(clones, languages=["deu", "ger"])
    with pytest.raises(DataError, match="languages is empty"):
        load_words(clones, languages=[])
    with pytest.raises(DataError, match=r"'wikiprn' \(did you mean 'wikipron'\?\)"):
        load_words(clones, languages=["deu"], commits={"wikiprn": "1"})


def test_missing_files_are_named_or_left_out_on_demand(tmp_path: Path):
    root = make_clones(tmp_path / "clones", ("eng", "lat"))
    lost = [folder_of(root, "segmentation") / "eng.word.train.tsv", folder_of(root, "inflection") / "eng.tst"]  # fmt: skip
    for path in lost:
        path.unlink()
    with pytest.raises(DataError, match=r"2 files .*eng\.tst, .*eng\.word\.train\.tsv; get the whole clones"):  # fmt: skip
        load_words(root, languages=["eng", "lat"], quickstart=False)
    data = load_words(root, languages=["eng", "lat"], quickstart=False, allow_missing=True)
    assert data.fingerprint["missing"] == [
        "2023InflectionST/part1/data/eng.tst", "2022SegmentationST/data/eng.word.train.tsv",
    ]  # fmt: skip
    assert {c.task for c in data.cells if c.language == "eng"} == {"pron", "segment", "spell"}
    words = {line.split("\t")[0] for line in (folder_of(root, "segmentation") / "eng.word.dev.tsv").read_text().splitlines()}  # fmt: skip
    trained = {pair.source for pair in data.cell("segment", "eng").train}
    assert trained and trained <= words, "a part of the development file"
    assert_disjoint(data)


def test_too_few_rows_are_named(tmp_path: Path):
    root = make_clones(tmp_path / "clones", ("lat",))
    write_lines(folder_of(root, "segmentation") / "lat.word.dev.tsv", segmented(made_up(900, 5)))
    with pytest.raises(DataError, match=r"1 cells have too few rows: segment/lat \(dev: 5 of 10\)"):
        load_words(root, languages=["lat"], quickstart=False)
    data = load_words(root, languages=["lat"], quickstart=False, allow_missing=True)
    assert data.fingerprint["too_short"] == ["segment/lat (dev: 5 of 10)"]
    assert "segment" not in data.tasks


def test_a_held_out_cell_needs_its_task_and_its_language_elsewhere(clones: Path):
    with pytest.raises(DataError, match="cell segment/mon is held out, and no other cell trains the task 'segment'"):  # fmt: skip
        load_words(clones, languages=["mon"], quickstart=False)
    pair = (("a", "b"),)
    held = Cell("eng", "pron", (), (), pair, "test")  # type: ignore[arg-type]
    other = Cell("deu", "pron", pair, pair, pair)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="trains the language 'eng'"):
        check_cells([held, other])
    with pytest.raises(DataError, match="no rows for any cell"):
        check_cells([])


def test_the_fingerprint_says_what_went_in(clones: Path, data: WordsData, tmp_path: Path):
    said = data.fingerprint
    assert said["seed"] == 0 and said["denoise"] and said["packages"] == {"babel": "2.16"}
    assert said["missing"] == said["too_short"] == []
    files = said["repositories"]["2022SegmentationST"]["files"]
    assert len(files) == 6 * 3 and files[0]["name"] == "ces.word.train.tsv"
    assert {len(file["sha256"]) for file in files} == {64}
    assert all("CC BY-SA" in r["licence"] and r["commit"] is None for r in said["repositories"].values())  # fmt: skip
    root = shutil.copytree(clones, tmp_path / "clones")
    (root / "wikipron" / ".git").mkdir()
    (root / "wikipron" / ".git" / "HEAD").write_text("ab" * 20)

    def commits(**given: str) -> list[object]:
        found = load_words(root, languages=["lat"], quickstart=False, commits=given)
        return [r["commit"] for r in found.fingerprint["repositories"].values()]

    assert commits(wikipron="abab") == [None, None, "ab" * 20, None]
    assert commits(**{"2023InflectionST": "e7f1b32"}) == ["e7f1b32", None, "ab" * 20, None]
    with pytest.raises(DataError, match=r"wikipron is at commit abab.*, not at e7f1b32"):
        commits(wikipron="e7f1b32")


def test_a_quickstart_of_other_tasks_is_refused():
    other = small_quickstart()
    del other.family_of_task["num2en"]
    with pytest.raises(DataError, match="the quickstart has no task 'num2en'"):
        borrowed(SimpleNamespace(cells=[], family_of_task=other.family_of_task, sources={}))


@pytest.mark.slow
def test_the_quickstart_as_it_is(tmp_path: Path):
    """Its own data has the tasks and the form that the study takes."""
    for module in ("babel", "num2words", "simplemma", "wordfreq", "pyphen"):
        pytest.importorskip(module)
    from flix.quickstart.data import load_data

    taken = borrowed(load_data(tmp_path))
    assert {task for task, _ in taken.rows} == set(QUICKSTART_TASKS)
    assert len({language for _, language in taken.rows}) == 14
    assert set(taken.held_out.values()) == {"tuning", "test"}
    tags = ("num: ", "numen: ", "date: ", "daten: ", "name: ")
    assert not any(row.source.startswith(tags) for rows in taken.rows.values() for row in rows)

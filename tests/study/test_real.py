"""The repositories' own files, whole or cut; FLIX_DATA names the folder of real data."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from flix.study.words import (
    HELD_OUT,
    OFFICIAL,
    WordsData,
    load_words,
    official_languages,
    official_rows,
)
from tests.study.oracle import assert_disjoint

DATA = os.environ.get("FLIX_DATA")
pytestmark = [pytest.mark.slow, pytest.mark.data]


@pytest.fixture(scope="module")
def clones() -> Path:
    if not DATA:
        pytest.skip("FLIX_DATA does not name the folder of real data")
    found = Path(DATA) / "words" if (Path(DATA) / "words").is_dir() else Path(DATA)
    if not (found / "wikipron").is_dir():
        pytest.skip(f"FLIX_DATA={DATA} holds no folder words with the clones")
    for module in ("babel", "num2words", "simplemma", "wordfreq", "pyphen"):
        pytest.importorskip(module)
    return found


@pytest.fixture(scope="module")
def real(clones: Path) -> WordsData:
    return load_words(clones, allow_missing=True, denoise=True)


def test_real_words_are_in_one_split(real: WordsData):
    assert_disjoint(real)


def test_every_language_and_task_keeps_enough_trained_cells(real: WordsData):
    trained = [c for c in real.cells if c.held_out is None and c.task != "denoise"]
    languages, tasks = Counter(c.language for c in trained), Counter(c.task for c in trained)
    assert len(languages) == 48 and len(tasks) == 12
    assert min(languages.values()) >= 2 and min(tasks.values()) >= 5
    held = {(c.task, c.language) for c in real.held_out()}
    assert set(HELD_OUT) <= held
    assert len(real.held_out("tuning")) >= 20 and len(real.held_out("test")) >= 20
    sizes = sorted(len(cell.train) for cell in trained)
    assert sizes[-1] > 100 * sizes[0]


def test_real_official_test_sets_are_not_trained_on(clones: Path, real: WordsData):
    asked = {
        (task, language) for task in OFFICIAL for language in official_languages(clones, real, task)
    }
    assert len(asked) > 30
    for cell in (cell for cell in real.cells if (cell.task, cell.language) in asked):
        rows = list(official_rows(clones, real, cell.task, cell.language))
        assert len(rows) > (90 if cell.task == "pron" else 900)
        sources = {pair.source for pair in cell.train}
        assert not sources & {row["source"] for row in rows}, cell.name
        assert sum(row["trained_on"] for row in rows) <= 0.25 * len(rows), cell.name

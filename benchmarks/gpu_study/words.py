"""The unlabelled rows of a folder of ``flix.study.words``, which may not hold a word of any dev or test row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flix.core.errors import listed
from flix.data.errors import DataError
from flix.study.words import LANGUAGES, Pair, WordsData, read_words
from flix.study.words.splits import key_of
from flix.study.words.writing import FINGERPRINT

TASK = "denoise"


@dataclass(frozen=True)
class Unlabelled:
    """What the base is pretrained on.

    Attributes:
        rows: the training rows of ``denoise``, by language.
        digest: the SHA-256 of the folder's fingerprint, which names the SHA-256 of every file.
        compared: how many dev and test entries were compared with the words.
    """

    rows: dict[str, tuple[Pair, ...]]
    digest: str
    compared: int

    def words(self) -> dict[str, list[str]]:
        """The words of the rows' targets, each once, by language."""
        return {
            language: list(dict.fromkeys(word for row in rows for word in row.target.split(" ")))
            for language, rows in self.rows.items()
        }


def read_unlabelled(folder: Path) -> Unlabelled:
    """Read the folder, and compare its unlabelled words with the dev and test rows of every cell.

    Raises:
        DataError: no such folder, or a changed file; a language without unlabelled rows; or unlabelled words that are
            entries of dev or test rows. Languages and words are named.
    """
    data = read_words(folder)
    rows = {cell.language: cell.train for cell in data.cells if cell.task == TASK and cell.train}
    if lacking := [language for language in data.languages if language not in rows]:
        raise DataError(
            f"{folder} has no unlabelled rows ({TASK}) in {listed(lacking)}; write it with: "
            "python -m flix.study.words CLONES --out FOLDER --denoise"
        )
    compared = 0
    for language in data.languages:
        compared += check_apart(data, language)
    digest = hashlib.sha256((folder / FINGERPRINT).read_bytes()).hexdigest()
    return Unlabelled(rows, digest, compared)


def check_apart(data: WordsData, language: str) -> int:
    """Compare a language's unlabelled words with all its dev and test entries; returns how many there are.

    Two are the same if their keys are (docs/study.md), so that case and, in most scripts, accents do not count.

    Raises:
        DataError: some are in both; the words and their cells are named.
    """
    script, compared = LANGUAGES[language].script, 0
    trained = {
        key_of(word, script)
        for pair in data.cell(TASK, language).train
        for word in pair.target.split(" ")
    }
    both: dict[str, None] = {}
    for cell in data.cells:
        if cell.language != language:
            continue
        for word in (w for pair in (*cell.dev, *cell.test) for w in entries(cell.task, pair)):
            compared += 1
            if key_of(word, script) in trained:
                both[f"{word!r} ({cell.name})"] = None
    if both:
        raise DataError(
            f"the unlabelled training rows of {language} hold words of dev or test rows: {listed(both)}; a base that was "
            "pretrained on them would know what the study asks"
        )
    return compared


def entries(task: str, pair: Pair) -> Iterator[str]:
    """The words by which a row of a task is put in its split, in the row's language."""
    if task == "inflect":
        yield from (pair.source.rpartition(" ")[0], pair.target)
    elif task == "lemma":
        yield from pair
    elif task == "tags":
        yield from pair.source.split(" < ")
    elif task == TASK:
        yield from pair.target.split(" ")
    else:
        yield pair.target if task in ("spell", "accent") else pair.source

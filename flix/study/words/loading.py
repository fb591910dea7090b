"""The data from clones of the repositories and the quickstart's packages, language by language."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flix.core.checks import whole
from flix.core.errors import listed, near
from flix.data.errors import DataError
from flix.study.words.build import build_language, check_cells, families_of, splits_of
from flix.study.words.design import BUILD_VERSION, LANGUAGES, unit
from flix.study.words.quickstart import Borrowed, borrow
from flix.study.words.reading import (
    REPOSITORIES,
    Files,
    commit_of,
    describe,
    find_language,
    find_repositories,
    read_inflection,
    read_pronunciations,
    read_segmentation,
)
from flix.study.words.splits import Claim, key_of
from flix.study.words.tasks import (
    Inflected,
    Row,
    Segmented,
    Texts,
    inflect_row,
    pronounce_row,
    segment_row,
)
from flix.study.words.types import SPLITS, Cell, Split, WordsData

#: At most this many words of a segmentation file are used, drawn by the seed. The largest files have 750,000.
_MOST_SEGMENTED = 30_000

OFFICIAL = ("inflect", "segment", "pron")
"""Tasks that have official test sets."""


def load_words(
    folder: str | Path,
    *,
    seed: int = 0,
    languages: Sequence[str] | None = None,
    denoise: bool = False,
    complete: bool = False,
    quickstart: Borrowed | bool = True,
    allow_missing: bool = False,
    commits: Mapping[str, str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> WordsData:
    """The cells of the study.

    Words are split by lemma if the inflection task has them, otherwise by word. If a language's word is tested in one
    task, no other task of that language trains on it. The fingerprint lists what the data was made from: files with
    their SHA-256, commits, licences, packages, and what was missing.

    Args:
        folder: contains the clones ``2023InflectionST``, ``2022SegmentationST`` and ``wikipron``. If ``2021-task1`` is
            there too, the words of its test sets are test words here.
        seed: decides sizes, draws, and the splits that no source gives.
        languages: ISO 639-3; default: all of :data:`flix.study.words.LANGUAGES`.
        denoise: add a cell of unlabelled text in every language.
        complete: train every cell on all of its rows, held-out cells included, to compare with published systems. Only
            the cells that the quickstart holds out stay held out.
        quickstart: the quickstart's numbers, dates and names: load them (True), leave them out (False), or use these.
        allow_missing: leave out cells whose files are missing or too short. If only the training file of a segmentation
            is missing, it is trained on a part of its development file.
        commits: of the clones, by folder; default: read from their ``.git``.
        progress: called with (language, languages done, languages in all).

    Raises:
        DataError: a clone or a file is missing, a line is malformed, a cell has too few rows, a language is unknown.
        MissingFrameworkError: a package of the extra ``quickstart`` is not installed.
    """
    folder = Path(folder)
    seed = whole(seed, "seed", 0, DataError)
    chosen = _chosen(languages)
    found = find_repositories(folder)
    known = _commits(folder, commits or {})
    files = {language: find_language(found, language) for language in chosen}
    missing = [path for of in files.values() for path in of.missing]
    if missing and not allow_missing:
        raise DataError(
            f"{len(missing)} files of the study are not there: {listed(missing)}; get the whole clones, or leave out "
            "what they are for with allow_missing"
        )
    taken = quickstart if isinstance(quickstart, Borrowed) else None
    if taken is None:
        taken = borrow(seed=seed) if quickstart else Borrowed()
    cells: list[Cell] = []
    trained: dict[str, frozenset[str]] = {}
    short: list[str] = []
    for done, language in enumerate(chosen):
        if progress is not None:
            progress(language, done, len(chosen))
        texts, claims = read_texts(files[language], language, seed, complete)
        splits = splits_of(language, texts, taken, seed, claims)
        built = build_language(language, texts, splits, taken, denoise=denoise, complete=complete)
        cells += built.cells
        short += built.short
        trained[language] = frozenset(built.trained)
    if short and not allow_missing:
        raise DataError(f"{len(short)} cells have too few rows: {listed(short)}")
    check_cells(cells)
    fingerprint = {
        "build": BUILD_VERSION,
        "seed": seed,
        "languages": list(chosen),
        "denoise": denoise,
        "complete": complete,
        "repositories": {
            repository.folder: {
                "address": repository.address,
                "commit": known[repository.folder],
                "licence": repository.licence,
                "files": [
                    describe(path) for of in files.values() for source, path in of.all() if source == name
                ],
            }
            for name, repository in REPOSITORIES.items()
            if name in found
        },
        "packages": dict(taken.sources),
        "missing": [str(path.relative_to(folder)) for path in missing],
        "too_short": short,
    }  # fmt: skip
    branches = {language: LANGUAGES[language].branch for language in chosen}
    return WordsData(tuple(cells), families_of(taken), branches, seed, trained, fingerprint)


def official_rows(folder: str | Path, data: WordsData, task: str, language: str) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A shared task's own test set as rows of ``flix.data``, to compare with what its participants published.

    The set is whole and in its own order. None of its rows is in a training set of its task. Each row also has
    ``trained_on``: whether one of its words, or a form of it, is in the training rows of any task of the language. The
    participants had only their task's training set. So either say this beside the figures, or leave these rows out.

    Args:
        folder: contains the clones.
        data: the data that was made from them.
        task: one of :data:`OFFICIAL`.
        language: ISO 639-3.

    Raises:
        DataError: the task has no official test set in this language, or its file is missing or malformed.
    """
    if task not in OFFICIAL:
        raise DataError(f"{task!r} has no official test set; these have: {listed(OFFICIAL)}")
    path = _official_file(Path(folder), task, _chosen([language])[0])
    if path is None:
        raise DataError(f"the clones have no official test set for {task}/{language}")
    script, seen = LANGUAGES[language].script, data.trained.get(language, frozenset())
    for row in _official(task, path):
        trained_on = any(key_of(word, script) in seen for word in row.words)
        yield {**data.row(language, task, row.pair), "trained_on": trained_on}


def official_languages(folder: str | Path, data: WordsData, task: str) -> list[str]:
    """The languages of the data in which the clones have an official test set of a task.

    Raises:
        DataError: a clone is missing.
    """
    cells = [cell.language for cell in data.cells if cell.task == task]
    return [language for language in cells if _official_file(Path(folder), task, language)]


def _official_file(folder: Path, task: str, language: str) -> Path | None:
    files = find_language(find_repositories(folder), language)
    if task == "pron":
        return files.pronunciation_test
    return (files.inflection if task == "inflect" else files.segmentation).get("test")


def _official(task: str, path: Path) -> Iterator[Row]:
    if task == "inflect":
        for lemma, tags, form in read_inflection(path):
            yield inflect_row(lemma, tags, form, "test")
    elif task == "pron":
        for word, sounds in read_pronunciations(path):
            yield pronounce_row(word, sounds, "test")
    else:
        for word, morphs in read_segmentation(path):
            yield segment_row(word, morphs, "test")


def _chosen(languages: Sequence[str] | None) -> tuple[str, ...]:
    """The languages, in the order of the design.

    Raises:
        DataError: one is not in the design, or there is none.
    """
    if languages is None:
        return tuple(LANGUAGES)
    for language in languages:
        if language not in LANGUAGES:
            raise DataError(
                f"the study has no language {language!r}{near(str(language), LANGUAGES)}; it has: "
                f"{listed(LANGUAGES, len(LANGUAGES))}"
            )
    if not languages:
        raise DataError("languages is empty; take some, or None for all")
    return tuple(language for language in LANGUAGES if language in set(languages))


def _commits(folder: Path, given: Mapping[str, str]) -> dict[str, str | None]:
    """The commit of each clone.

    Raises:
        DataError: a given commit is for a folder that is no clone of the study, or the clone is at another commit.
    """
    folders = [repository.folder for repository in REPOSITORIES.values()]
    for name in given:
        if name not in folders:
            raise DataError(
                f"a commit is given for {name!r}{near(name, folders)}; clones are: {listed(folders)}"
            )
    found: dict[str, str | None] = {}
    for name in folders:
        at, said = commit_of(folder / name), given.get(name)
        if at is not None and said is not None and not (said and at.startswith(said)):
            raise DataError(f"{name} is at commit {at}, not at {said}")
        found[name] = at or said
    return found


def read_texts(
    files: Files, language: str, seed: int, complete: bool
) -> tuple[Texts, Iterator[Claim]]:
    """What a language's files contain, and the splits into which shared tasks put its words (without inflection)."""
    inflected: list[Inflected] = []
    if len(files.inflection) == len(SPLITS):
        inflected = [
            (*fields, split) for split in SPLITS for fields in read_inflection(files.inflection[split])
        ]  # fmt: skip
    has_train = "train" in files.segmentation

    def official(split: Split) -> Split | None:
        return split if has_train or split == "test" else None

    heard = files.pronunciation_test
    spoken_test = (
        frozenset(word for word, _ in read_pronunciations(heard)) if heard else frozenset()
    )

    def claims() -> Iterator[Claim]:
        yield from ((word, "test") for word in sorted(spoken_test))
        for name, path in files.segmentation.items():
            split = official(name)
            if split is not None:
                yield from ((word, split) for word, _ in read_segmentation(path))

    segmented: list[Segmented] = []
    # Some words are in several files. Words of the test file count only there.
    tested: set[str] = set()
    for split in reversed(SPLITS):
        if path := files.segmentation.get(split):
            found = (row for row in read_segmentation(path) if row[0] not in tested)
            some = found if complete else heapq.nsmallest(_MOST_SEGMENTED, found, key=lambda row: unit(seed, "read", language, row[0]))  # fmt: skip
            segmented += [(word, morphs, official(split)) for word, morphs in some]
            if split == "test":
                tested = {word for word, _ in read_segmentation(path)}
    spoken = list(read_pronunciations(files.pronunciation)) if files.pronunciation else []
    return Texts(inflected, segmented, spoken, spoken_test), claims()

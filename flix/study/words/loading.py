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
from flix.study.words.tasks import Inflected, Row, Segmented, Texts, inflect_row, segment_row
from flix.study.words.types import SPLITS, Cell, Split, WordsData

#: Words of a segmentation file that are looked at, drawn by the seed: the largest files have 750,000.
_MOST_SEGMENTED = 30_000

OFFICIAL = ("inflect", "segment")
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

    Splits are by lemma where the inflection task has the word, else by word; nothing that one task tests in a language
    is trained on in another task of it. The fingerprint says what the data was made of: files with their SHA-256,
    commits, licences, packages, what was missing.

    Args:
        folder: holds the clones ``2023InflectionST``, ``2022SegmentationST`` and ``wikipron``.
        seed: of the splits that nobody publishes, of sizes and draws.
        languages: ISO 639-3; default: all of :data:`flix.study.words.LANGUAGES`.
        denoise: with a cell of unlabelled text in every language.
        complete: train every cell on all rows that it has, held-out cells, too: for comparing with what others
            published. Only what the quickstart holds out stays so.
        quickstart: the quickstart's numbers, dates and names: loaded (True), left out (False), or as given.
        allow_missing: leave out cells whose files are missing or too short. Without its training file, a segmentation
            is trained on a part of its development file.
        commits: of the clones, by folder; default: what their ``.git`` says.
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
        },
        "packages": dict(taken.sources),
        "missing": [str(path.relative_to(folder)) for path in missing],
        "too_short": short,
    }  # fmt: skip
    branches = {language: LANGUAGES[language].branch for language in chosen}
    return WordsData(tuple(cells), families_of(taken), branches, seed, trained, fingerprint)


def official_rows(folder: str | Path, data: WordsData, task: str, language: str) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A shared task's own test set, whole and in its order, as rows of ``flix.data``, for comparing with what its
    participants published. No row of it is in a training set of its task.

    Each row has ``trained_on``, too: whether one of its words occurs in the training rows of some task of the language,
    or is the lemma of one that does. The participants had their task's training set alone: say so, or leave these rows
    out.

    Args:
        folder: of the clones.
        data: what was made of them.
        task: one of :data:`OFFICIAL`.
        language: ISO 639-3.

    Raises:
        DataError: the task has no official test set in this language, or its file is missing or malformed.
    """
    if task not in OFFICIAL:
        raise DataError(f"{task!r} has no official test set; these have: {listed(OFFICIAL)}")
    files = find_language(find_repositories(Path(folder)), _chosen([language])[0])
    path = (files.inflection if task == "inflect" else files.segmentation).get("test")
    if path is None:
        raise DataError(f"the clones have no official test set for {task}/{language}")
    script, seen = LANGUAGES[language].script, data.trained.get(language, frozenset())
    for row in _official(task, path):
        trained_on = any(key_of(word, script) in seen for word in row.words)
        yield {**data.row(language, task, row.pair), "trained_on": trained_on}


def _official(task: str, path: Path) -> Iterator[Row]:
    if task == "inflect":
        for lemma, tags, form in read_inflection(path):
            yield inflect_row(lemma, tags, form, "test")
    else:
        for word, morphs in read_segmentation(path):
            yield segment_row(word, morphs, "test")


def _chosen(languages: Sequence[str] | None) -> tuple[str, ...]:
    """The languages in the design's order.

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
        DataError: one is given for a folder that is no clone of the study, or is not the clone's.
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
    """What a language's files say, and the splits that the segmentation task puts its words in."""
    inflected: list[Inflected] = []
    if len(files.inflection) == len(SPLITS):
        inflected = [
            (*fields, split) for split in SPLITS for fields in read_inflection(files.inflection[split])
        ]  # fmt: skip
    has_train = "train" in files.segmentation

    def official(split: Split) -> Split | None:
        return split if has_train or split == "test" else None

    def claims() -> Iterator[Claim]:
        for name, path in files.segmentation.items():
            split = official(name)
            if split is not None:
                yield from ((word, split) for word, _ in read_segmentation(path))

    segmented: list[Segmented] = []
    # Some words are in several files; those of the test set are of it alone.
    tested: set[str] = set()
    for split in reversed(SPLITS):
        if path := files.segmentation.get(split):
            found = (row for row in read_segmentation(path) if row[0] not in tested)
            some = found if complete else heapq.nsmallest(_MOST_SEGMENTED, found, key=lambda row: unit(seed, "read", language, row[0]))  # fmt: skip
            segmented += [(word, morphs, official(split)) for word, morphs in some]
            if split == "test":
                tested = {word for word, _ in read_segmentation(path)}
    spoken = list(read_pronunciations(files.pronunciation)) if files.pronunciation else []
    return Texts(inflected, segmented, spoken), claims()

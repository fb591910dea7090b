"""Shows our figures on the shared tasks' own test sets beside those that others published, on the same rows.

Segmentation: F1 of morphs by language, in percent, from the shared task's repository, ``results/README.md`` at commit
6ab20a4 of https://github.com/sigmorphon/2022SegmentationST ("Part1: Word-level task results"; it calls them
preliminary). Pronunciation: the word error rate of the shared task's neural baseline on the test sets, from its
repository, ``README.md`` at commit 821bcde of https://github.com/sigmorphon/2021-task1 ("Baseline"). Inflection: the
shared task's paper (Goldman and others, SIGMORPHON-UniMorph 2023 Shared Task 0: Typologically Diverse Morphological
Inflection, https://aclanthology.org/2023.sigmorphon-1.13) has its baselines' accuracy by language. We could not check a
copy of that table, so none of it is repeated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flix.study.evidence import EvidenceError
from flix.study.tables import Table, count

SOURCE = "https://github.com/sigmorphon/2022SegmentationST/blob/6ab20a4f30617addcd5977b6d34a37458eea6b3b/results/README.md"

#: By system and language. The first three are the task's baselines, which learn without segmented words.
SEGMENTATION: dict[str, dict[str, float]] = {
    "WordPiece": {
        "ces": 20.42, "eng": 23.06, "fra": 12.66, "ita": 9.08, "lat": 8.84, "mon": 14.58, "hun": 24.00, "spa": 16.57,
    },
    "ULM": {
        "ces": 23.71, "eng": 32.32, "fra": 16.08, "ita": 10.65, "lat": 10.42, "mon": 25.82, "hun": 31.27, "spa": 19.58,
    },
    "Morfessor2": {
        "ces": 29.43, "eng": 37.65, "fra": 22.38, "ita": 9.02, "lat": 14.53, "mon": 37.80, "hun": 40.96, "spa": 20.64,
    },
    "Tü Seg": {
        "ces": 93.38, "eng": 90.51, "fra": 93.76, "ita": 95.73, "lat": 99.37, "mon": 97.02, "hun": 98.59, "spa": 97.93,
    },
    "CLUZH": {
        "ces": 93.81, "eng": 92.70, "fra": 94.80, "ita": 96.93, "lat": 99.37, "mon": 98.12, "hun": 98.54, "spa": 98.74,
    },
    "DeepSPIN-3": {
        "ces": 93.84, "eng": 93.63, "fra": 95.73, "ita": 97.43, "lat": 99.38, "mon": 98.51, "hun": 98.72, "spa": 99.04,
    },
}  # fmt: skip

PRONUNCIATION_SOURCE = "https://github.com/sigmorphon/2021-task1/blob/821bcdece5a47820872215969f275004b0abe80c/README.md"

#: By language: the word error rate of the baseline, an ensemble of neural transducers, and the words it learned from.
PRONUNCIATION: dict[str, tuple[float, int]] = {
    "ell": (21.0, 800), "fra": (8.5, 8000), "hun": (1.8, 8000), "ita": (19.0, 800), "jpn": (5.2, 8000),
    "mlt": (19.0, 800), "nld": (14.7, 8000), "vie": (2.5, 8000),
}  # fmt: skip


def morph_f1(pairs: Iterable[tuple[str, str]]) -> float:
    """F1 of morphs in percent, as the shared task counts them.

    A morph in an answer is right if it is among the word's morphs. Precision is over all morphs in answers,
    and recall is over all morphs in the references, both for all words together.

    Args:
        pairs: for each word, the answer and the reference, with morphs joined by ``|``.

    Raises:
        EvidenceError: there is no pair.
    """
    hits = answered = wanted = 0
    for answer, target in pairs:
        given, there = answer.split("|"), target.split("|")
        hits += sum(morph in there for morph in given)
        answered += len(given)
        wanted += len(there)
    if not answered:
        raise EvidenceError("F1 of morphs needs at least one word")
    precision, recall = hits / answered, hits / wanted
    return 100 * 2 * precision * recall / (precision + recall) if hits else 0.0


def _rounded(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.1f}" if known else "–"


def _notes(said: Mapping[str, Any]) -> str:
    told = f"Ours: {said['title']}, {len(said['runs'])} run{'s' * (len(said['runs']) != 1)}."
    if said.get("limit"):
        told += f" At most {said['limit']:,} rows of each language, evenly spaced, not its whole test set."
    return told


def _of(said: Mapping[str, Any], task: str) -> dict[str, Any]:
    found = said.get("tasks", {}).get(task) or {}
    if not found:
        raise EvidenceError(f"no official test set of {task} was answered")
    return dict(found)


def segmentation(said: Mapping[str, Any]) -> Table:
    """F1 of morphs by language, ours and what was published, from what :mod:`flix.study.official` wrote."""
    rows = []
    for language, entry in _of(said, "segment").items():
        theirs = [f"{of[language]:.1f}" if language in of else "–" for of in SEGMENTATION.values()]
        ours = _rounded([run.get("f1") for run in entry["runs"]])
        rows.append((language, count(entry["rows"]), count(entry["trained"]), _kind(entry), ours, *theirs))  # fmt: skip
    note = (
        f"F1 of morphs. {_notes(said)} Published: [the shared task's results]({SOURCE}), on its whole test sets. The first "
        "three are its baselines, which see no segmented words; the others learned from all of its training data."
    )
    return Table(("language", "rows", "trained on", "cell", "ours", *SEGMENTATION), rows, note)


def inflection(said: Mapping[str, Any]) -> Table:
    """Exact match by language on the official test sets, all rows and those of words that no task trained on."""
    rows = []
    for language, entry in _of(said, "inflect").items():
        told = [_rounded([run.get(key) for run in entry["runs"]]) for key in ("exact", "exact_new")]
        rows.append((language, count(entry["rows"]), count(entry["trained"]), _kind(entry), *told, count(entry["rows_new"])))  # fmt: skip
    note = (
        f"Exact match. {_notes(said)} New words: rows whose words and lemmas are in no task's training rows. The "
        "baselines' figures by language are in [the shared task's paper](https://aclanthology.org/2023.sigmorphon-1.13). "
        "We had no copy to check them against, so they are not repeated here."
    )
    return Table(("language", "rows", "trained on", "cell", "all", "new words", "rows of these"), rows, note)  # fmt: skip


def pronunciation(said: Mapping[str, Any]) -> Table:
    """Exact match by language on the pronunciation task's test sets, ours and its baseline's."""
    rows = []
    for language, entry in _of(said, "pron").items():
        told = [_rounded([run.get(key) for run in entry["runs"]]) for key in ("exact", "exact_new")]
        wrong, words = PRONUNCIATION[language]
        rows.append((language, count(entry["rows"]), count(entry["trained"]), _kind(entry), *told, count(entry["rows_new"]), f"{100 - wrong:.1f}", count(words)))  # fmt: skip
    note = (
        f"Exact match, which is 100 less the word error rate. {_notes(said)} New words: rows whose words are in no task's "
        f"training rows. Baseline: [the shared task's]({PRONUNCIATION_SOURCE}), an ensemble of neural transducers for each "
        "language. It learned from the task's own training set, ours from other words of a later WikiPron."
    )
    head = ("language", "rows", "trained on", "cell", "ours", "new words", "rows of these", "baseline", "it trained on")  # fmt: skip
    return Table(head, rows, note)


def _kind(entry: Mapping[str, Any]) -> str:
    return "trained" if entry["trained"] else "zero-shot"

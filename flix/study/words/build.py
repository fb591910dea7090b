"""From rows to cells: splits, sizes, and what is held out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from flix.core.errors import listed
from flix.data.errors import DataError
from flix.study.words.design import (
    COPY_SHARE,
    DEV_ROWS,
    FEWEST_EVALUATED,
    FEWEST_TRAIN,
    HELD_OUT,
    LANGUAGES,
    LOW_RESOURCE_BELOW,
    MAX_BYTES,
    TASKS,
    TEST_ROWS,
    train_size,
    unit,
)
from flix.study.words.quickstart import Borrowed
from flix.study.words.splits import Claim, Splits, make_splits
from flix.study.words.spoilt import spoilt_pairs
from flix.study.words.tasks import Row, Texts, rows_of
from flix.study.words.types import SPLITS, Cell, Half, Pair, Split


@dataclass
class Built:
    """Cells of one language.

    Attributes:
        cells: at most one for each task.
        trained: the keys of all words that the cells train on.
        short: cells with too few rows, each with the split that has too few. They are not in ``cells``.
    """

    cells: list[Cell] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    short: list[str] = field(default_factory=list)


def splits_of(
    language: str, texts: Texts, borrowed: Borrowed, seed: int, claims: Iterable[Claim] = ()
) -> Splits:
    """The splits of a language's words: by lemma if the inflection task has the word, otherwise by word.

    Args:
        language: ISO 639-3.
        texts: what the repositories have in this language.
        borrowed: the quickstart's cells. Their splits count after those of the inflection task.
        seed: draws the split of words that no source puts in one.
        claims: the words of the segmentation task with their splits, which count last.
    """
    inflected = [(lemma, form, split) for lemma, _, form, split in texts.inflected]
    others = [
        (word, row.official)
        for (_, other), rows in borrowed.rows.items()
        if other == language
        for row in rows
        if row.official is not None
        for word in row.words
    ]
    return make_splits(language, LANGUAGES[language].script, seed, inflected, [others, claims])


def build_language(
    language: str,
    texts: Texts,
    splits: Splits,
    borrowed: Borrowed,
    *,
    denoise: bool = False,
    complete: bool = False,
) -> Built:
    """The cells of a language.

    Args:
        language: ISO 639-3.
        texts: what the repositories have in this language.
        splits: of its words, from :func:`splits_of`.
        borrowed: the quickstart's cells.
        denoise: whether to add a cell of unlabelled text.
        complete: whether cells train on all of their rows, copies included. Held-out cells are then trained on too,
            except those that the quickstart holds out, which have no training rows.
    """
    built = Built()
    for task in (task for task in TASKS if task != "denoise"):
        rows = rows_of(task, texts, accents=LANGUAGES[language].accents)
        size, half = train_size(splits.seed, task, language), HELD_OUT.get((task, language))
        if complete:
            size, half = len(rows), None
        _add(built, task, language, rows, size, half, splits, 1.0 if complete else COPY_SHARE)
    for (task, other), rows in borrowed.rows.items():
        if other == language:
            half = borrowed.held_out.get((task, language))
            _add(built, task, language, rows, len(rows), half, splits)
    if denoise:
        _add_unlabelled(built, language, texts, splits)
    return built


def _add(
    built: Built,
    task: str,
    language: str,
    rows: Sequence[Row],
    size: int,
    half: Half | None,
    splits: Splits,
    copies: float = COPY_SHARE,
) -> None:
    """Add a cell of these rows if there are any, or note that they are too few."""
    if not rows:
        return
    parts: dict[Split, list[tuple[Row, set[str]]]] = {split: [] for split in SPLITS}
    for row in rows:
        if _fits(row.source, row.target):
            keys = splits.keys(row.words)
            split = splits.split_of(keys, row.official)
            if split is not None:
                parts[split].append((row, keys))
    wanted = _wanted(size, half)
    place = splits.seed, task, language
    taken = {split: take(parts[split], wanted[split], place, copies) for split in SPLITS}
    pairs = {s: tuple(row.pair for row, _ in taken[s]) for s in SPLITS}
    if _add_pairs(built, task, language, pairs, wanted, half):
        built.trained.update(*(keys for _, keys in taken["train"]))


def _wanted(size: int, half: Half | None = None) -> dict[Split, int]:
    if half is None:
        return {"train": size, "dev": DEV_ROWS, "test": TEST_ROWS}
    return {
        "train": 0,
        "dev": TEST_ROWS if half == "tuning" else 0,
        "test": TEST_ROWS if half == "test" else 0,
    }


def _add_pairs(
    built: Built,
    task: str,
    language: str,
    pairs: Mapping[Split, tuple[Pair, ...]],
    wanted: Mapping[Split, int],
    half: Half | None = None,
) -> bool:
    """Add a cell, or note that it has too few pairs. Returns whether it was added."""
    for split in SPLITS:
        fewest = FEWEST_TRAIN if split == "train" else FEWEST_EVALUATED
        if wanted[split] and len(pairs[split]) < fewest:
            built.short.append(f"{task}/{language} ({split}: {len(pairs[split])} of {fewest})")
            return False
    low = LANGUAGES[language].share < LOW_RESOURCE_BELOW
    cell = Cell(language, task, pairs["train"], pairs["dev"], pairs["test"], half, low)
    built.cells.append(cell)
    return True


def _fits(*texts: str) -> bool:
    return all(0 < len(text.encode()) <= MAX_BYTES for text in texts)


def take(
    rows: Sequence[tuple[Row, set[str]]],
    size: int,
    place: tuple[object, ...],
    share: float = COPY_SHARE,
) -> list[tuple[Row, set[str]]]:
    """Draw rows by the seed.

    Args:
        rows: the rows, with their keys.
        size: how many to draw; fewer if there are fewer.
        place: the seed and the cell, which decide what is drawn.
        share: at most this share of the drawn rows are copies; 1 means that any number may be.
    """
    order = sorted(rows, key=lambda r: unit(*place, "order", r[0].source, r[0].target))
    if share >= 1:
        return order[:size]
    changed = [r for r in order if r[0].source != r[0].target][:size]
    # of c copies and n others, c is within the share while c <= n * share / (1 - share)
    allowed = int(min(size * share, len(changed) * share / (1 - share)))
    copies = [r for r in order if r[0].source == r[0].target][:allowed]
    kept = {id(r) for r in (*changed[: max(0, size - len(copies))], *copies)}
    # In the first order, the few copies that are kept of many would all come first.
    found = [r for r in order if id(r) in kept]
    return sorted(found, key=lambda r: unit(*place, "place", r[0].source, r[0].target))


def _add_unlabelled(built: Built, language: str, texts: Texts, splits: Splits) -> None:
    """Add the cell of unlabelled text. The lines of a split contain only words of that split."""
    words: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for word in sorted(set(texts.words())):
        split = splits.split_of(splits.keys([word]))
        if split is not None and len(word) > 1:
            words[split].append(word)
    wanted = _wanted(train_size(splits.seed, "denoise", language))
    pairs: dict[Split, tuple[Pair, ...]] = {}
    for split in SPLITS:
        draw = random.Random(f"{splits.seed}/denoise/{language}/{split}")
        made = islice(spoilt_pairs(words[split], draw), 4 * wanted[split])
        fitting = (pair for pair in made if _fits(*pair) and pair.source != pair.target)
        pairs[split] = tuple(islice(dict.fromkeys(fitting), wanted[split]))
    if _add_pairs(built, "denoise", language, pairs, wanted):
        lines = {pair.target for pair in pairs["train"]}
        built.trained |= splits.keys({word for line in lines for word in line.split()})


def check_cells(cells: Sequence[Cell]) -> None:
    """Refuse data in which a held-out cell's language or task is trained nowhere.

    Raises:
        DataError: there is such a cell, or no cell at all.
    """
    if not cells:
        raise DataError("these files have no rows for any cell")
    trained = [cell for cell in cells if cell.held_out is None and cell.task != "denoise"]
    languages = Counter(cell.language for cell in trained)
    tasks = Counter(cell.task for cell in trained)
    for cell in cells:
        for known, name, what in (
            (tasks, cell.task, "task"),
            (languages, cell.language, "language"),
        ):
            if cell.held_out is not None and not known[name]:
                raise DataError(
                    f"cell {cell.name} is held out, and no other cell trains the {what} {name!r}; "
                    f"trained are: {listed(sorted(known))}; take more languages"
                )


def families_of(borrowed: Borrowed) -> Mapping[str, str]:
    """The family of each task; the study's own tasks come first."""
    return {**{task: info.family for task, info in TASKS.items()}, **borrowed.families}

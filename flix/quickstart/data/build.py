"""From pairs to cells: splits, caps and sizes."""

from __future__ import annotations

from collections.abc import Callable

from .design import (
    COPY_SHARE,
    DEV_ITEMS,
    HELD_OUT,
    LANGUAGES,
    MAX_BYTES,
    TASKS,
    TEST_ITEMS,
    is_low_resource,
    split_of,
    train_size,
)
from .sources import Pair, pairs_of
from .types import Cell, Example

#: Called with a label, the number of cells done and the number of cells in all.
Progress = Callable[[str, int, int], None]


def _fits(pair: Pair) -> bool:
    return 0 < len(pair.text.encode()) <= MAX_BYTES and 0 < len(pair.answer.encode()) <= MAX_BYTES


def _take(pairs: list[Pair], size: int, tag: str) -> list[Example]:
    """The first ``size`` pairs, of which at most a ``COPY_SHARE`` may be copies."""
    changed = [pair for pair in pairs if pair.text != pair.answer][:size]
    # of c copies and n others, c is within the share while c <= n * share / (1 - share)
    allowed = int(min(size * COPY_SHARE, len(changed) * COPY_SHARE / (1 - COPY_SHARE)))
    copies = [pair for pair in pairs if pair.text == pair.answer][:allowed]
    kept = set((changed[: max(0, size - len(copies))]) + copies)
    return [Example(f"{tag}: {pair.text}", pair.answer) for pair in pairs if pair in kept]


def build_cell(language: str, task: str, seed: int) -> Cell | None:
    """One cell, or None where the sources have nothing for it."""
    info = TASKS[task]
    parts: dict[str, list[Pair]] = {"train": [], "dev": [], "test": []}
    seen: set[str] = set()
    for pair in pairs_of(language, task, seed):
        if pair.text in seen or not _fits(pair):
            continue
        seen.add(pair.text)
        family = "lemma" if task == "lemma" else info.family
        parts[split_of(seed, family, pair.item)].append(pair)
    if not seen:
        return None
    held_out = HELD_OUT.get((language, task))
    size = 0 if held_out else train_size(seed, language, task)
    return Cell(
        language,
        task,
        train=_take(parts["train"], size, info.tag),
        dev=_take(parts["dev"], DEV_ITEMS, info.tag),
        test=_take(parts["test"], TEST_ITEMS, info.tag),
        held_out=held_out,
        low_resource=is_low_resource(language),
    )


def build_cells(seed: int, progress: Progress | None = None) -> list[Cell]:
    """All cells, language by language."""
    cells = []
    total = len(LANGUAGES) * len(TASKS)
    done = 0
    for language in LANGUAGES:
        for task in TASKS:
            cell = build_cell(language, task, seed)
            done += 1
            if cell is not None:
                cells.append(cell)
            if progress is not None:
                progress(f"{language}/{task}", done, total)
    return cells

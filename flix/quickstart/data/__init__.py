"""The quickstart's data: 14 languages x 7 tasks, built from installed packages and cached.

data = load_data()
for cell in data.trained():
    print(cell.language, cell.task, len(cell.train), cell.train[0])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from flix.core.sampling.schedule import shares

from .build import Progress, build_cells
from .cache import cache_file, default_cache_dir, package_versions, read_cells, write_cells
from .design import LANGUAGES, TASKS
from .types import Cell, Example, QuickstartData

__all__ = [
    "Cell",
    "Example",
    "Progress",
    "QuickstartData",
    "copy_baseline",
    "default_cache_dir",
    "load_data",
    "sampling_probabilities",
]


def load_data(
    cache_dir: str | Path | None = None, seed: int = 0, progress: Progress | None = None
) -> QuickstartData:
    """The data for a seed, from the cache where it is there and whole, built and cached otherwise.

    ``cache_dir`` defaults to ``$FLIX_CACHE`` or the platform's cache folder. ``progress`` is called
    with ``(label, done, total)`` as cells are built, and not at all when they come from the cache.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    path = cache_file(folder, seed)
    cells = read_cells(path)
    if cells is None:
        cells = build_cells(seed, progress)
        write_cells(path, cells)
    return QuickstartData(
        languages=tuple(LANGUAGES),
        tasks=tuple(TASKS),
        family_of_task={name: task.family for name, task in TASKS.items()},
        cells=tuple(cells),
        seed=seed,
        sources=package_versions(),
    )


def sampling_probabilities(sizes: Sequence[int], exponent: float = 0.5) -> np.ndarray:
    """Probabilities proportional to ``size ** exponent``; empty datasets are never drawn."""
    counts = np.asarray(sizes, dtype=np.float64)
    if counts.ndim != 1 or counts.size == 0:
        raise ValueError("sizes must be a non-empty list of numbers")
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        raise ValueError("sizes must be finite, not negative, and not all zero")
    return shares(counts, exponent)


def copy_baseline(examples: Iterable[Example]) -> float:
    """Exact match, in percent, of answering with the input text; NaN for no examples."""
    hits = [example.text == example.target for example in examples]
    return 100.0 * sum(hits) / len(hits) if hits else float("nan")

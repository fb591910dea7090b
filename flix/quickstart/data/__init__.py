"""The quickstart's data: 14 languages x 7 tasks, built from installed packages and cached.

data = load_data()
for cell in data.trained():
    print(cell.language, cell.task, len(cell.train), cell.train[0])
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .build import Progress, build_cells
from .cache import cache_folder, default_cache_dir, package_versions, read_cells, write_cells
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
]


def load_data(
    cache_dir: str | Path | None = None, seed: int = 0, progress: Progress | None = None
) -> QuickstartData:
    """The data for a seed, from the cache where it is there and whole, built and cached otherwise.

    ``cache_dir`` defaults to ``$FLIX_CACHE`` or the platform's cache folder. ``progress`` is called
    with ``(label, done, total)`` as cells are built, and not at all when they come from the cache.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache_folder(cache, seed)
    cells = read_cells(folder)
    if cells is None:
        cells = build_cells(seed, progress)
        write_cells(folder, cells)
    return QuickstartData(
        languages=tuple(LANGUAGES),
        tasks=tuple(TASKS),
        family_of_task={name: task.family for name, task in TASKS.items()},
        cells=tuple(cells),
        folder=folder,
        seed=seed,
        sources=package_versions(),
    )


def copy_baseline(examples: Iterable[Example]) -> float:
    """Exact match, in percent, of answering with the input text; NaN for no examples."""
    hits = [example.text == example.target for example in examples]
    return 100.0 * sum(hits) / len(hits) if hits else float("nan")

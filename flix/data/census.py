"""Which cells the rows of several sources are of, and how many rows each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core import rng
from flix.core.errors import FeatureError
from flix.core.features.cells import (
    Cell,
    HeldOut,
    MixtureError,
    cell_name,
    cell_of,
    features_of,
    quoted,
)
from flix.core.features.names import normal_group, warn_alike
from flix.core.features.registry import FeatureRegistry
from flix.data.columns import Table
from flix.data.sources import Source, stream_size


@dataclass(frozen=True)
class Census:
    """The cells of all sources.

    Attributes:
        cells: by first occurrence: those of the training tables, of the evaluation tables, of streams whose rows say
            what they activate.
        names: how each is written.
        sizes: int64 ``[cells]``, training rows, those of streams included.
        of_rows: int64, the cell of every training row that has a number.
        of_evaluation: int64, the cell of every evaluation row.
        of_streams: the cell of each stream.
    """

    cells: tuple[Cell, ...]
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    of_rows: NDArray[np.int64]
    of_evaluation: NDArray[np.int64]
    of_streams: tuple[int, ...]


def take_census(
    tables: Sequence[Table],
    streams: Sequence[Source],
    evaluation: Sequence[Table],
    columns: Sequence[str],
) -> Census:
    """Count; a stream counts as it says."""
    found: dict[Cell, int] = {}
    of_rows, of_evaluation = _numbered(tables, found), _numbered(evaluation, found)
    counts = np.bincount(of_rows, minlength=len(found)).tolist()
    names = [cell_name(cell) for cell in found]
    keys: list[Cell] = list(found)
    of_streams = []
    for source in streams:
        size = stream_size(source)
        cell = cell_of(source.features, columns)
        if set(source.features) == set(columns) and cell in found:
            place = found[cell]
            counts[place] += size
        else:
            place = len(keys)
            keys.append(cell)
            counts.append(size)
            if set(source.features) == set(columns):
                found[cell] = place
                names.append(cell_name(cell))
            else:  # which cells its rows are of is not known before they are read
                known = f"{cell_name(cell)}," if cell else ""
                names.append(f"{known}... ({quoted(str(source.name))})")
        of_streams.append(place)
    sizes = np.array(counts, np.int64)
    return Census(tuple(keys), tuple(names), sizes, of_rows, of_evaluation, tuple(of_streams))


def _numbered(tables: Sequence[Table], found: dict[Cell, int]) -> NDArray[np.int64]:
    """The cell of every row; cells that are new get the next numbers."""
    rows = []
    for table in tables:
        numbers = [found.setdefault(cell, len(found)) for cell in table.cells]
        rows.append(np.array(numbers, np.int64)[table.cell_codes])
    return np.concatenate([np.zeros(0, np.int64), *rows])


def registry_of(
    cells: Sequence[Cell], columns: Sequence[str], implies: Mapping[Any, Any] | None = None
) -> FeatureRegistry:
    """A registry of what occurs, groups in the order of the columns and names by occurrence, then what is implied."""
    groups: dict[str, dict[str, None]] = {normal_group(name): {} for name in columns}
    for cell in cells:
        for group, names in cell:
            groups[group].update(dict.fromkeys(names))
    for targets in (implies or {}).values():
        for group, name in targets:
            groups.setdefault(normal_group(group), {})[name] = None
    found = {group: list(names) for group, names in groups.items() if names}
    return FeatureRegistry(found, implies)


def warn_of_names(cells: Sequence[Cell]) -> None:
    """Warn of names that look alike."""
    names: dict[str, dict[str, None]] = {}
    for cell in cells:
        for group, members in cell:
            names.setdefault(group, {}).update(dict.fromkeys(members))
    for group, found in names.items():
        warn_alike(group, found)


def check_names(
    registry: FeatureRegistry,
    tables: Sequence[Table],
    streams: Sequence[Source],
    excluded: HeldOut,
) -> None:
    """Refuse what a registry does not have, with its source.

    Raises:
        FeatureError: a feature of a row or stream; the source is named.
        MixtureError: a feature of a held-out cell.
    """
    for number, entry in enumerate(excluded.cells):
        try:
            features_of(cell_of(entry), registry)
        except FeatureError as error:
            raise MixtureError(f"held_out[{number}]: {error}") from None
    for table in tables:
        for number, cell in enumerate(table.cells):
            try:
                features_of(cell, registry)
            except FeatureError as error:
                row = int(np.argmax(table.cell_codes == number))
                raise FeatureError(f"{table.source.label}, row {row}: {error}") from None
    for source in streams:
        try:
            features_of(cell_of(source.features), registry)
        except FeatureError as error:
            raise FeatureError(f"{source.label}: {error}") from None


def held_back(
    tables: Sequence[Table],
    of_rows: NDArray[np.int64],
    held: NDArray[np.bool_],
    names: Sequence[str],
    seed: int,
) -> NDArray[np.bool_]:
    """The rows that sources' ``eval_rows`` take out of training, drawn by the seed: bool ``[rows]``.

    Args:
        tables: the sources.
        of_rows: the cell of every row.
        held: which cells are held out; nothing more is taken from them.
        names: the cells'.
        seed: of the draw.

    Raises:
        MixtureError: a cell has too few rows.
    """
    back = np.zeros(len(of_rows), bool)
    start = 0
    for table in tables:
        rows = np.arange(start, start + len(table))
        start += len(table)
        wanted = table.source.eval_rows
        for cell in np.unique(of_rows[rows]).tolist() if wanted else ():
            if held[cell]:
                continue
            mine = rows[of_rows[rows] == cell]
            if len(mine) <= wanted:
                raise MixtureError(
                    f"{table.source.label}: {names[cell]} has {len(mine)} rows, too few to hold back "
                    f"eval_rows={wanted} and train on the rest"
                )
            draws = rng.bits(
                rng.key("evaluation rows", seed, names[cell]),
                np.arange(len(mine), dtype=np.int64),
            )
            back[mine[np.argsort(draws, kind="stable")[:wanted]]] = True
    return back

"""Rows that are trained on are not evaluated on, too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flix.core.features.cells import cell_name
from flix.data.columns import kept_features, read_table
from flix.data.errors import DataError
from flix.data.mixture import Mixture
from flix.data.sources import Source


@dataclass(frozen=True)
class Half:
    """What a data set trains on, or what it evaluates on.

    Attributes:
        name: the data set's.
        read: what its rows are read as: the kind, the columns, the features.
        files: as ``run.json`` has them.
        source: its rows.
    """

    name: str
    read: Any
    files: Sequence[Mapping[str, Any]]
    source: Source


def check_apart(trained: Iterable[Half], evaluated: Iterable[Half], mixture: Mixture) -> None:
    """Refuse rows that are evaluated on and, with the same features, trained on. A file may be in both halves if it is
    read for another task, or if all of its cells are held out.

    Raises:
        DataError: there are some; the file and the data sets are named.
    """
    for one in evaluated:
        for other in trained:
            if one.read != other.read or not (shared := _shared(one.files, other.files)):
                continue
            table = read_table(kept_features(one.source, mixture.columns), mixture.columns)
            if seen := [cell for cell in mixture.trained_cells() if cell in table.cells]:
                whose = "" if one.name == other.name else f", in the data set {other.name!r}"
                raise DataError(
                    f"dataset {one.name!r}: {shared} is for evaluation, and is trained on, too{whose} ({cell_name(seen[0])}); "
                    "give eval_files: or eval_split: other rows, or hold rows back with eval_rows:"
                )


def _shared(some: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> str:
    """The name of a file or split that two halves share; empty if there is none."""
    there = [place for file in others for place in _places(file)]
    for file in some:
        for *known, part in _places(file):
            for *place, other in there:
                whole = "[" not in part or "[" not in other
                if known == place and (part == other or (whole and _base(part) == _base(other))):
                    return str(file["name"])
    return ""


def _places(file: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Where rows are, at last the split of a hub's dataset."""
    if file["bytes"] is not None:
        yield os.path.realpath(file["name"]), file.get("features"), ""
        return
    hub, _, split = file["name"].partition(" [")
    for part in split.removesuffix("]").split("+"):
        yield hub, None, part


def _base(split: str) -> str:
    return split.partition("[")[0]

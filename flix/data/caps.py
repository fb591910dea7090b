"""Caps: the most rows that each cell counts for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import whole
from flix.core.errors import FeatureError, listed, near, shown
from flix.core.features.cells import Cell, MixtureError, cell_of, read_cell
from flix.core.features.names import normal

Cap = Union[int, Mapping[Any, Any], None]
"""A number for all cells, or numbers by group, by feature or by cell."""


def caps_of(
    cap: Cap, cells: Sequence[Cell], names: Sequence[str], occurring: Sequence[Cell]
) -> NDArray[np.float64]:
    """The cap of each cell, infinity where it has none; the least of those that apply.

    Args:
        cap: a number; or ``{group: number}`` (for each cell of the group), ``{group: {name: number}}``,
            ``{(group, name): number}``, ``{cell's name: number}``, which may be mixed.
        cells: the trained cells.
        names: their names.
        occurring: all cells, held-out ones included, whose groups and features may be named.

    Raises:
        MixtureError: a cap below 1, or one for what does not occur.
    """
    caps = np.full(len(cells), np.inf)
    if cap is None:
        return caps
    if not isinstance(cap, Mapping):
        return np.full(len(cells), float(whole(cap, "a cap", 1, MixtureError)))
    features: dict[str, dict[str, None]] = {}
    for cell in occurring:
        for group, members in cell:
            features.setdefault(group, {}).update(dict.fromkeys(members))
    for key, value in cap.items():
        if (place := _cell_place(key, cells, names)) is not None:
            _lower(caps, [i == place for i in range(len(cells))], value, f"the cap of {key}")
            continue
        pair = isinstance(key, tuple) and len(key) == 2
        group = _kept(key[0] if pair else key)
        if group not in features:
            choices = [*features, *names]
            raise MixtureError(
                f"cap: there is no group or trained cell {shown(group)}{near(str(group), choices)}; "
                f"the groups are: {listed(features)}; the cells are: {listed(names)}"
            )
        if not pair and not isinstance(value, Mapping):
            applies = [any(g == group for g, _ in cell) for cell in cells]
            _lower(caps, applies, value, f"the cap of {group}")
            continue
        for given, most in ({key[1]: value} if pair else value).items():
            name = _kept(given)
            if name not in features[group]:
                raise MixtureError(
                    f"cap: no row has the {group} {shown(name)}{near(str(name), features[group])}; "
                    f"there is: {listed(features[group])}"
                )
            applies = [any(g == group and name in members for g, members in cell) for cell in cells]
            _lower(caps, applies, most, f"the cap of {group}={name}")
    return caps


def _kept(name: object) -> Any:
    """A name in the form that cells hold it in; what is none, as it is: it will not be found."""
    try:
        return normal(name, "a cap") if isinstance(name, str) else name
    except FeatureError:
        return name


def _cell_place(key: object, cells: Sequence[Cell], names: Sequence[str]) -> int | None:
    """Which cell a key names, its groups in any order."""
    if not isinstance(key, str):
        return None
    if key in names:
        return list(names).index(key)
    try:
        wanted = {*cell_of(read_cell(key))}
    except FeatureError:
        return None
    return next((i for i, cell in enumerate(cells) if {*cell} == wanted), None)


def _lower(caps: NDArray[np.float64], applies: Sequence[bool], value: object, what: str) -> None:
    most = float(whole(value, what, 1, MixtureError))
    caps[np.asarray(applies, bool)] = np.minimum(caps[np.asarray(applies, bool)], most)

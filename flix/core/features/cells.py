"""Cells: the combinations of features that data comes in, and which of them are held out of training.

A *cell* is all rows that name the same features, such as ``language=hau,task=ner``. Rows of code-switched text, which
name several features of a group, form cells of their own: ``language=hau+yor,task=ner``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import finite
from flix.core.errors import FeatureError, FlixError, listed, near
from flix.core.features.names import Feature, check_group, check_name
from flix.core.features.registry import FeatureRegistry

Cell = tuple[tuple[str, tuple[str, ...]], ...]
"""``((group, (names, ascending)), ...)``; groups that the rows leave out are left out."""

_Id = TypeVar("_Id", bound=Hashable)


class MixtureError(FlixError, ValueError):
    """Data or settings that a mixture cannot be made of."""


class HeldOutError(FlixError, RuntimeError):
    """A row of a held-out cell was about to be trained on."""


def names_of(group: str, value: object) -> tuple[str, ...]:
    """The names in what a row says of one group, in their order; none for None.

    Args:
        group: the group, for messages.
        value: a name, a list of names, ``{name: weight}`` (entries of None do not count), or None.

    Raises:
        FeatureError: a value of another form, an empty one, or an ill-formed name.
    """
    names: list[object]
    if value is None:
        return ()
    if isinstance(value, str):
        names = [value]
    elif isinstance(value, Mapping):
        names = [name for name, weight in value.items() if weight is not None]
        for name in names:
            finite(value[name], f"the weight of {group}:{name}", FeatureError)
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        names = list(value)
    else:
        names = []
    if not names:
        raise FeatureError(
            f"the {group} of a row is a name, a list of names or {{name: weight}}, got {value!r}"
        )
    for name in names:
        check_name(group, name)
    return tuple(dict.fromkeys(str(name) for name in names))


def cell_of(features: Mapping[str, object], groups: Iterable[str] | None = None) -> Cell:
    """The cell of a row.

    Args:
        features: what the row activates, by group.
        groups: the groups in the order they are to be named in; default: the row's own.

    Raises:
        FeatureError: what :func:`names_of` refuses.
    """
    found = ((g, names_of(g, features.get(g))) for g in (features if groups is None else groups))
    return tuple((group, tuple(sorted(names))) for group, names in found if names)


def cell_name(cell: Cell) -> str:
    """A cell in words: ``language=hau,task=ner``."""
    return ",".join(f"{group}={'+'.join(names)}" for group, names in cell)


def features_of(cell: Cell, registry: FeatureRegistry | None = None) -> frozenset[Feature]:
    """The features of a cell; with a registry, those that they imply, too.

    Raises:
        FeatureError: a feature that the registry does not have.
    """
    named = [(group, name) for group, names in cell for name in names]
    if registry is None:
        return frozenset(named)
    ids = [registry.id(*feature) for feature in named]
    implied = (registry.features[i] for known in ids for i in registry.implied(known))
    return frozenset(named).union(implied)


def covering(wanted: Sequence[Set[_Id]], active: Sequence[Set[_Id]]) -> NDArray[np.bool_]:
    """Which held-out entries match which combinations: those all of whose features are active.

    Any one of a group's several active features serves, so a code-switched row is held out if one of its
    combinations of names is.

    Returns:
        bool ``[entries, combinations]``.
    """
    found = [[entry <= features for features in active] for entry in wanted]
    return np.array(found, bool).reshape(len(wanted), len(active))


class HeldOut:
    """The cells that are never trained on, declared in one place.

    A row is held out if it activates every feature of one of the entries; an entry that names some groups only holds
    out all cells that match. Of a code-switched row, one matching combination of names is enough.

    Args:
        cells: the entries, each ``{group: name}``.

    Raises:
        MixtureError: an entry that is not such a mapping, or an empty one.
        FeatureError: an ill-formed name.
    """

    def __init__(self, cells: Iterable[Mapping[str, str]] = ()) -> None:
        if isinstance(cells, Mapping | str):
            raise MixtureError(f"held_out is a list of {{group: name}}, got {cells!r}")
        self.cells: tuple[dict[str, str], ...] = tuple(
            _entry(number, cell) for number, cell in enumerate(cells)
        )
        self.wanted: tuple[frozenset[Feature], ...] = tuple(
            frozenset(cell.items()) for cell in self.cells
        )

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        return f"HeldOut({list(self.cells)!r})"

    def covers(
        self, features: Mapping[str, object], registry: FeatureRegistry | None = None
    ) -> bool:
        """Whether a row with these features is held out.

        Args:
            features: ``{group: name | [names] | {name: weight} | None}``; other keys must not be among them.
            registry: if given, features that others imply count.

        Raises:
            FeatureError: an ill-formed value, or a feature that the registry does not have.
        """
        active = features_of(cell_of(features), registry)
        return any(entry <= active for entry in self.wanted)

    def among(
        self, cells: Sequence[Cell], registry: FeatureRegistry | None = None
    ) -> NDArray[np.bool_]:
        """Which entries match which cells: bool ``[entries, cells]``.

        Raises:
            FeatureError: a feature that the registry does not have.
        """
        return covering(self.wanted, [features_of(cell, registry) for cell in cells])

    def check_matched(self, cells: Sequence[Cell], registry: FeatureRegistry | None = None) -> None:
        """Refuse entries that match none of the cells: most likely they are misspelt.

        Raises:
            MixtureError: there is one; near matches are named.
            FeatureError: a feature of a cell that the registry does not have.
        """
        matched = self.among(cells, registry).any(axis=1)
        for number in np.flatnonzero(~matched).tolist():
            active = [features_of(cell, registry) for cell in cells]
            raise MixtureError(
                f"held_out[{number}] ({cell_name(cell_of(self.cells[number]))}) matches no row: "
                f"{_reason(self.cells[number], cells, active)}"
            )


def _entry(number: int, cell: object) -> dict[str, str]:
    if not isinstance(cell, Mapping):
        raise MixtureError(f"held_out[{number}] must be {{group: name}}, got {cell!r}")
    if not cell:
        raise MixtureError(f"held_out[{number}] is empty: it would hold out every row")
    for group, name in cell.items():
        try:
            check_group(group)
            check_name(group, name)
        except FeatureError as error:
            raise MixtureError(f"held_out[{number}]: {error}") from None
    return dict(cell)


def _reason(
    entry: Mapping[str, str], cells: Sequence[Cell], active: Sequence[frozenset[Feature]]
) -> str:
    names: dict[str, dict[str, None]] = {}
    for feature in sorted(frozenset().union(*active)):
        names.setdefault(feature[0], {})[feature[1]] = None
    for group, name in entry.items():
        if group not in names:
            return (
                f"there is no group {group!r}{near(group, names)}; the groups are: {listed(names)}"
            )
        if name not in names[group]:
            return (
                f"no row has the {group} {name!r}{near(name, names[group])}; "
                f"there is: {listed(names[group])}"
            )
    best = max(len(set(entry.items()) & features) for features in active)
    close = [
        cell_name(cell)
        for cell, features in zip(cells, active, strict=True)
        if len(set(entry.items()) & features) == best
    ]
    return f"its features occur, but never together; the nearest cells are: {listed(close)}"

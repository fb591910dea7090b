"""Cells: the combinations of features that data comes in, and which of them are held out of training.

A *cell* is all rows that name the same features, such as ``language=hau,task=ner``. Rows of code-switched text, which
name several features of a group, form cells of their own: ``language=hau+yor,task=ner``. A name that holds a character
that cells are written with stands in double quotes, as JSON has it: ``language="hau+yor",task=ner`` is another cell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import finite
from flix.core.errors import FeatureError, FlixError, listed, near, shown
from flix.core.features.names import Feature, folded, normal_group, normal_name, warn_alike
from flix.core.features.registry import FeatureRegistry

Cell = tuple[tuple[str, tuple[str, ...]], ...]
"""``((group, (names, ascending)), ...)``; groups that the rows leave out are left out."""

_Id = TypeVar("_Id", bound=Hashable)


class MixtureError(FlixError, ValueError):
    """Data or settings from which no mixture can be made."""


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
            finite(value[name], f"the weight of {group}={shown(name)}", FeatureError)
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        names = list(value)
    else:
        names = []
    if not names:
        raise FeatureError(
            f"the {group} of a row is a name, a list of names or {{name: weight}}, got {shown(value)}"
        )
    return tuple(dict.fromkeys(normal_name(group, name) for name in names))


def cell_of(features: Mapping[str, object], groups: Iterable[str] | None = None) -> Cell:
    """The cell of a row.

    Args:
        features: what the row activates, by group.
        groups: the groups in the order they are to be named in; default: the row's own.

    Raises:
        FeatureError: what :func:`names_of` refuses, or an ill-formed group.
    """
    found: dict[str, set[str]] = {normal_group(g): set() for g in groups or ()}
    for given, value in features.items():
        group = normal_group(given)
        if groups is None or group in found:
            found.setdefault(group, set()).update(names_of(group, value))
    return tuple((group, tuple(sorted(names))) for group, names in found.items() if names)


# What a cell's name is written with: a part that holds one of these is quoted.
_SIGNS = re.compile(r'[+,="\\]')
_PART = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^"+,=\\]+)\s*([+,=]?)')


def cell_name(cell: Cell) -> str:
    """A cell in words: ``language=hau,task=ner``. Different cells have different names."""
    return ",".join(
        f"{quoted(group)}={'+'.join(quoted(name) for name in names)}" for group, names in cell
    )


def quoted(text: str) -> str:
    """A group or name as it stands in the name of a cell."""
    return json.dumps(text, ensure_ascii=False) if _SIGNS.search(text) else text


def read_cell(text: str) -> dict[str, list[str]]:
    """The groups and names in a cell's name: ``language=hau+yor,task=ner``.

    Raises:
        FeatureError: a text of another form, or a group twice.
    """
    found: dict[str, list[str]] = {}
    place, group = 0, ""
    sign = ","
    while sign:
        match = _PART.match(text, place)
        before, sign = sign, match[2] if match is not None else "?"
        if match is None or (sign == "=") != (before == ",") or (not sign) != (match.end() == len(text)):  # fmt: skip
            raise FeatureError(
                "features are written as group=name, joined by commas, several names of a group by '+'; "
                f"got {shown(text)}"
            )
        place = match.end()
        part = unquoted(match[1])
        if sign == "=":
            group = part
            if group in found:
                raise FeatureError(f"the group {group!r} is given twice in {shown(text)}")
            found[group] = []
        else:
            found[group].append(part)
    return found


def unquoted(part: str) -> str:
    """The group or name of a part.

    Raises:
        FeatureError: what stands in quotes is no text as JSON writes it.
    """
    if part[0] != '"':
        return part.strip()
    try:
        return str(json.loads(part))
    except ValueError as error:
        raise FeatureError(f"{shown(part)} is not quoted as in JSON: {error}") from None


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

    A row is held out if it activates every feature of one of the entries; an entry that names only some groups holds
    out all cells that match. For a code-switched row, one matching combination of names is enough.

    Names are compared in Unicode's NFC. If a row's name differs from an entry's only in case or by compatibility, it
    does not match, and a warning says so.

    Args:
        cells: the entries, each ``{group: name}`` or, in the form in which cells are shown,
            ``"group=name,group=name"``.

    Raises:
        MixtureError: an entry of another form, an empty one, or one with an ill-formed name.
    """

    def __init__(self, cells: Iterable[Mapping[str, str] | str] = ()) -> None:
        if isinstance(cells, Mapping | str | bytes) or not isinstance(cells, Iterable):
            raise MixtureError(f"held_out is a list of {{group: name}}, got {shown(cells)}")
        self.cells: tuple[dict[str, str], ...] = tuple(
            _entry(number, cell) for number, cell in enumerate(cells)
        )
        self.wanted: tuple[frozenset[Feature], ...] = tuple(
            frozenset(cell.items()) for cell in self.cells
        )
        self._folded = {(group, folded(name)): name for cell in self.cells for group, name in cell.items()}  # fmt: skip
        self._seen: set[Feature] = set()

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
            registry: if given, implied features count too.

        Raises:
            FeatureError: an ill-formed value, or a feature that the registry does not have.
        """
        active = self._active(cell_of(features), registry)
        return any(entry <= active for entry in self.wanted)

    def _active(self, cell: Cell, registry: FeatureRegistry | None) -> frozenset[Feature]:
        """A cell's features; warns of those that are called almost as one that is held out."""
        active = features_of(cell, registry)
        for group, name in active - self._seen if self.wanted else ():
            self._seen.add((group, name))
            if (other := self._folded.get((group, folded(name)), name)) != name:
                warn_alike(group, [other, name])
        return active

    def among(
        self, cells: Sequence[Cell], registry: FeatureRegistry | None = None
    ) -> NDArray[np.bool_]:
        """Which entries match which cells: bool ``[entries, cells]``.

        Raises:
            FeatureError: a feature that the registry does not have.
        """
        return covering(self.wanted, [self._active(cell, registry) for cell in cells])

    def check_matched(self, cells: Sequence[Cell], registry: FeatureRegistry | None = None) -> None:
        """Refuse entries that match none of the cells, because they are probably misspelt.

        Raises:
            MixtureError: there is such an entry; the error suggests similar names.
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
    place = f"held_out[{number}]"
    if not isinstance(cell, Mapping | str):
        raise MixtureError(
            f"{place} must be {{group: name}} or 'group=name,...', got {shown(cell)}"
        )
    if not cell:
        raise MixtureError(f"{place} is empty: it would hold out every row")
    entry: dict[str, str] = {}
    try:
        if isinstance(cell, str):
            cell = {group: names[0] if len(names) == 1 else names for group, names in read_cell(cell).items()}  # fmt: skip
        for given, name in cell.items():
            group = normal_group(given)
            if group in entry:
                raise FeatureError(f"the group {group!r} is given twice, in two Unicode forms")
            entry[group] = normal_name(group, name)
    except FeatureError as error:
        raise MixtureError(f"{place}: {error}") from None
    return entry


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

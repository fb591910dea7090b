"""The feature columns of sources: which there are, what the rows hold, and the cells that this makes."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import FeatureError, listed, near, shown
from flix.core.features.cells import Cell, MixtureError, cell_of, names_of
from flix.core.features.names import normal_group, normal_name
from flix.core.features.registry import FeatureRegistry
from flix.data.sources import Source, column_names


def feature_columns(
    sources: Sequence[Source], given: Sequence[str] | None, registry: FeatureRegistry | None
) -> tuple[str, ...]:
    """The names of a mixture's feature columns.

    Args:
        sources: the sources.
        given: the names, or None to go by the registry or the sources.
        registry: the registry, if there is one.

    Raises:
        MixtureError: none, or one twice.
        FeatureError: one that is not a group of the registry.
    """
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        if not names or len({normal_group(name) for name in names}) < len(names):
            raise MixtureError(f"columns must be names, each once, got {shown(given)}")
        if registry is not None:
            for name in names:
                registry.ids_of(name)
        return tuple(names)
    declared = list(dict.fromkeys(name for source in sources for name in source.features))
    present = set(declared).union(*(column_names(source) for source in sources))
    if registry is not None:
        by_group = {unicodedata.normalize("NFC", name): name for name in sorted(present)}
        groups = [by_group[group] for group in registry.groups if group in by_group]
        wanted = f"the registry's groups ({listed(registry.groups)})"
    else:
        usual = [name for name in ("language", "task") if name in present]
        groups = [*usual, *(name for name in declared if name not in usual)]
        wanted = "language or task"
    if not groups:
        raise MixtureError(
            f"no source has a column of {wanted}, or declares one; name the feature columns: columns=[...]"
        )
    return tuple(groups)


@dataclass(frozen=True)
class Column:
    """What the rows of a source say of one group.

    Attributes:
        values: the distinct values, by first occurrence.
        codes: int64 ``[rows]``, each row's place in them.
    """

    values: tuple[Any, ...]
    codes: NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """A source whose rows can be read by number.

    Attributes:
        source: the source.
        columns: its feature columns, declared or read.
        cells: the distinct cells, by first occurrence.
        cell_codes: int64 ``[rows]``, each row's place in them.
    """

    source: Source
    columns: dict[str, Column]
    cells: tuple[Cell, ...]
    cell_codes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cell_codes)

    def features(self, row: int) -> dict[str, Any]:
        """What a row activates, by column."""
        return {name: column.values[column.codes[row]] for name, column in self.columns.items()}


RESERVED = frozenset({"attention_mask", "input_ids", "labels", "position_ids", "token_type_ids"})
"""What models read of a batch; no group of features is called so."""


def check_group(group: str) -> None:
    """Refuse a group that is called as a column of a batch, or as one of flix's own.

    Raises:
        FeatureError: it is.
    """
    if group in RESERVED or group.startswith("flix_"):
        raise FeatureError(
            f"{group!r} is a name of flix's own columns (flix_..., {listed(sorted(RESERVED))}); give the group another one"
        )


def kept_features(source: Source, columns: Sequence[str]) -> Source:
    """The source with the names that it declares as registries keep them, by column.

    Raises:
        FeatureError: an ill-formed value or name.
        MixtureError: features are declared twice for a column, in two Unicode forms.
    """
    by_group = {unicodedata.normalize("NFC", name): name for name in columns}
    found: dict[str, Any] = {}
    for given, value in source.features.items():
        name = by_group.get(unicodedata.normalize("NFC", str(given)), given)
        if name in found:
            raise MixtureError(f"{source.label} declares {name!r} twice, in two Unicode forms")
        try:
            found[name] = kept_value(name, value)
        except FeatureError as error:
            raise FeatureError(f"{source.label}: {error}") from None
    return replace(source, features=found)


def kept_value(group: str, value: Any) -> Any:
    """What a row says of one group, with its names as registries keep them.

    Raises:
        FeatureError: what :func:`flix.core.features.cells.names_of` refuses.
    """
    names = names_of(group, value)
    if value is None or isinstance(value, str):
        return names[0] if names else None
    if not isinstance(value, Mapping):
        return list(names)
    kept: dict[str, float] = dict.fromkeys(names, 0.0)
    for name, weight in value.items():
        if weight is not None:
            kept[normal_name(group, name)] += weight
    return kept


def check_columns(source: Source, columns: Sequence[str]) -> None:
    """Refuse a source that does not say, once and only once, what its rows have of each feature column.

    Raises:
        MixtureError: a column that is missing, declared beside one of the dataset, or declared for no column.
    """
    present = column_names(source)
    for name in source.features:
        if name not in columns:
            raise MixtureError(
                f"{source.label} declares {name!r}, which is not a feature column{near(name, columns)}; "
                f"the feature columns are: {listed(columns)}"
            )
        if name in present:
            raise MixtureError(
                f"{source.label} declares {name!r} and has a column of that name; "
                "leave out one of the two"
            )
    for name in columns:
        if name not in source.features and name not in present:
            raise MixtureError(
                f"{source.label} lacks the feature column {name!r}{near(name, present)}; its columns "
                f"are: {listed(present)}. Declare what all its rows have: (dataset, {{{name!r}: ...}}), "
                "None for nothing"
            )


def read_table(source: Source, columns: Sequence[str]) -> Table:
    """The cells of a source, from its feature columns alone.

    Raises:
        MixtureError: a row without a value, or with one of a wrong type.
        FeatureError: an ill-formed name.
    """
    rows = len(source.dataset)
    found: dict[str, Column] = {}
    for name in columns:
        if name in source.features:
            found[name] = Column((source.features[name],), np.zeros(rows, np.int64))
        else:
            found[name] = _read_column(source, name)
    # The number of a row's combination of values, then the cell of that combination.
    number = np.zeros(rows, np.int64)
    for column in found.values():
        pairs = number * len(column.values) + column.codes
        _, number = np.unique(pairs, return_inverse=True)
    _, first = np.unique(number, return_index=True)
    cells: dict[Cell, int] = {}
    of_number = np.empty(len(first), np.int64)
    for place in np.argsort(first, kind="stable").tolist():
        row = int(first[place])
        features = {name: column.values[column.codes[row]] for name, column in found.items()}
        of_number[place] = cells.setdefault(cell_of(features, columns), len(cells))
    return Table(source, found, tuple(cells), of_number[number])


def _read_column(source: Source, name: str) -> Column:
    import pyarrow as pa  # type: ignore[import-untyped]

    # The column alone, past the dataset's own reading, which copies its description each time.
    chunks = source.dataset.data.column(name)
    if (chosen := source.dataset._indices) is not None:  # by select, shuffle or filter
        chunks = chunks.take(chosen.column(0))
    if chunks.null_count:
        row = int(np.argmax(chunks.is_null().to_numpy()))
        raise MixtureError(
            f"{source.label}, row {row}: the feature column {name!r} holds nothing; drop the row, "
            "name the feature, or declare None if no row of the source has any"
        )
    kind = chunks.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        coded = pa.chunked_array([chunks.combine_chunks()]).dictionary_encode().chunk(0)
        values = coded.dictionary.to_pylist()
        codes = coded.indices.to_numpy().astype(np.int64)
    elif pa.types.is_nested(kind):
        values, codes = _distinct(chunks.to_pylist())
    else:
        raise MixtureError(
            f"{source.label}: the feature column {name!r} must hold names, got {kind}"
            " (the numbers of a ClassLabel are turned into names with its int2str)"
        )
    for place, value in enumerate(values):
        try:
            values[place] = kept_value(name, value)
        except FeatureError as error:
            row = int(np.argmax(codes == place))
            raise FeatureError(f"{source.label}, row {row}: {error}") from None
    return Column(tuple(values), codes)


def _distinct(items: list[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct values and each item's place in them. Arrow gives every struct all keys: those of None go."""
    seen: dict[str, int] = {}
    values: list[Any] = []
    codes = np.empty(len(items), np.int64)
    for place, item in enumerate(items):
        value = item
        if isinstance(item, Mapping):
            value = {name: weight for name, weight in item.items() if weight is not None}
        key = repr(value)
        if key not in seen:
            seen[key] = len(values)
            values.append(value)
        codes[place] = seen[key]
    return values, codes

"""All rows of several sources as one dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flix.data.columns import Table
from flix.data.sources import datasets_library
from flix.data.streaming import not_alike


def joined(tables: Sequence[Table]) -> Any:
    """The rows of all sources, in order, with what the sources declare as columns: a ``datasets.Dataset``.

    Raises:
        MixtureError: columns of different types.
    """
    library = datasets_library()
    parts = [table.source.dataset for table in tables]
    declared = list(dict.fromkeys(name for table in tables for name in table.source.features))
    alike = all(len(table.source.features) == len(declared) for table in tables)
    try:
        if alike and all(part._indices is None for part in parts):
            # Every column once, for all rows: datasets describes the whole anew at each addition.
            whole = library.concatenate_datasets(parts)
            for name in declared:
                values = [t.source.features[name] for t in tables for _ in range(len(t))]
                whole = whole.add_column(name, values)
            return whole
        for place, table in enumerate(tables):
            for name, value in table.source.features.items():
                parts[place] = parts[place].add_column(name, [value] * len(table))
        return library.concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise not_alike(error) from error

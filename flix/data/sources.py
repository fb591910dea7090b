"""What a mixture is made of: datasets, and what they say of their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Union

from flix.core.checks import whole
from flix.core.errors import MissingFrameworkError, listed, shown
from flix.core.features.cells import MixtureError, cell_name, cell_of

if TYPE_CHECKING:
    import datasets

AnyDataset = Union["datasets.Dataset", "datasets.IterableDataset"]


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture.

    Attributes:
        dataset: a ``datasets.Dataset``, or an ``IterableDataset`` (then the mixture can only be streamed).
        features: what all of its rows activate, by column: a name, a list of names, ``{name: weight}``, or None if
            they activate nothing of that group. Feature columns that are not named here are read from the rows.
        name: its name in messages; default: its key or number.
        size: the rows of an ``IterableDataset``, which its share of the mixture follows; default: what the dataset's
            own information says.
        eval_rows: the number of rows of each trained cell that are kept for ``mixture.evaluation_rows()`` and not
            trained on.
    """

    dataset: AnyDataset
    features: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    size: int | None = None
    eval_rows: int = 0

    @property
    def label(self) -> str:
        """How messages start."""
        return f"source {self.name!r}"

    @property
    def described(self) -> str:
        """The label, with what all rows activate."""
        cell = cell_name(cell_of(self.features))
        return f"{self.label} ({cell})" if cell else self.label


def datasets_library() -> Any:
    """The ``datasets`` package.

    Raises:
        MissingFrameworkError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingFrameworkError(
            "flix.data needs datasets, which is not installed; "
            'install it with: pip install "flix-peft[transformers]"'
        ) from error
    return datasets


def as_sources(given: object) -> list[Source]:
    """Sources from any of the accepted forms: one dataset, a list, or a mapping by name.

    Raises:
        MixtureError: another form, no source, two of one name, or an empty dataset.
        MissingFrameworkError: ``datasets`` is not installed.
    """
    library = datasets_library()
    splits = (library.DatasetDict, library.IterableDatasetDict)
    if isinstance(given, Mapping) and not isinstance(given, splits):
        found = [
            _named(_source(item, str(name), library), str(name)) for name, item in given.items()
        ]
    else:
        several = isinstance(given, Sequence) and not _is_pair(given)
        items: Sequence[Any] = given if several else [given]  # type: ignore[assignment]
        found = [
            _named(_source(item, str(number), library), str(number))
            for number, item in enumerate(items)
        ]
    if not found:
        raise MixtureError("a mixture needs at least one source, got none")
    for name, count in Counter(source.name for source in found).items():
        if count > 1:
            raise MixtureError(f"there are {count} sources of the name {name!r}")
    return found


def _is_pair(item: object) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[1], Mapping)
        and not isinstance(item[0], tuple | Source)
    )


def _named(source: Source, name: str) -> Source:
    return source if source.name is not None else replace(source, name=name)


def _source(item: Any, name: str, library: Any) -> Source:
    if isinstance(item, Source):
        source = item
    elif _is_pair(item):
        source = Source(item[0], dict(item[1]))
    else:
        source = Source(item)
    label = _named(source, name).label
    if isinstance(source.dataset, library.DatasetDict | library.IterableDatasetDict):
        splits = listed(source.dataset)
        raise MixtureError(f"{label} is a DatasetDict; choose one of its splits: {splits}")
    if not isinstance(source.dataset, library.Dataset | library.IterableDataset):
        raise MixtureError(
            f"{label} must be a datasets.Dataset or IterableDataset, or a pair of one and its "
            f"features, got {type(source.dataset).__name__}"
        )
    if not isinstance(source.features, Mapping):
        raise MixtureError(
            f"{label}: features must be {{group: name}}, got {shown(source.features)}"
        )
    whole(source.eval_rows, f"{label}: eval_rows", 0, MixtureError)
    if is_streamed(source):
        if source.size is not None:
            whole(source.size, f"{label}: the size", 1, MixtureError)
        if source.eval_rows:
            raise MixtureError(f"{label} is streamed: rows cannot be held back from it")
    elif source.size is not None:
        raise MixtureError(f"{label} knows its size; size is for an IterableDataset")
    elif not len(source.dataset):
        raise MixtureError(f"{label} has no rows; a cell needs at least one row")
    return source


def is_streamed(source: Source) -> bool:
    """Whether the source's rows can only be read one after the other."""
    return not hasattr(source.dataset, "__len__")


def stream_size(source: Source) -> int:
    """The rows of a streamed source, held-out ones counted.

    Raises:
        MixtureError: they are not known.
    """
    if source.size is not None:
        return source.size
    info, split = source.dataset.info, source.dataset.split
    known = (info.splits or {}).get(str(split))
    if known is not None and known.num_examples:
        return int(known.num_examples)
    raise MixtureError(
        f"{source.label} is streamed and does not say how many rows it has; "
        "give it as Source(dataset, features, size=...)"
    )


def column_names(source: Source) -> list[str]:
    """The columns of a source; of a stream that does not know them, those of its first row.

    Raises:
        MixtureError: it would have to be read for that, and is empty.
    """
    names = source.dataset.column_names
    if names is None:
        names = next(iter(source.dataset), None)
        if names is None:
            raise empty(source)
    return list(names)


def empty(source: Source) -> MixtureError:
    """The error for a stream without rows."""
    return MixtureError(
        f"{source.described} is empty: its stream gives no row, so nothing of it can be drawn; leave it out"
    )

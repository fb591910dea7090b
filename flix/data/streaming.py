"""Mixtures as streams: cells and streamed sources interleaved by probability, held-out rows left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flix.core.errors import FeatureError, FlixError
from flix.core.features.cells import HeldOut, HeldOutError, MixtureError, cell_name, cell_of
from flix.core.features.registry import FeatureRegistry
from flix.data.sources import Source, datasets_library, empty

STOPPING = ("all_exhausted", "first_exhausted", "all_exhausted_without_replacement")


@dataclass(frozen=True)
class _Rule:
    """Which rows of a stream are held out; remembers the answer for each combination."""

    held_out: HeldOut
    registry: FeatureRegistry | None
    columns: tuple[str, ...]
    label: str

    def features(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.columns, values, strict=True))

    def holds_out(self, values: Sequence[Any]) -> bool:
        try:
            return self.held_out.covers(self.features(values), self.registry)
        except FeatureError as error:
            raise FeatureError(f"{self.label}: {error}") from None


@dataclass(frozen=True)
class KeepTrained(_Rule):
    """Keeps the rows that may be trained on; refuses rows without a feature."""

    declared: frozenset[str] = frozenset()

    def __call__(self, *values: Any) -> bool:
        for name, value in self.features(values).items():
            if value is None and name not in self.declared:
                raise MixtureError(
                    f"{self.label}: a row of the stream holds nothing in the feature column {name!r}"
                )
        return not self.holds_out(values)


@dataclass(frozen=True)
class KeepHeldOut(_Rule):
    """Keeps the held-out rows."""

    def __call__(self, *values: Any) -> bool:
        return self.holds_out(values)


@dataclass(frozen=True)
class Guard(_Rule):
    """The last thing before a row leaves the stream: raises if it is held out."""

    def __call__(self, *values: Any) -> bool:
        if self.holds_out(values):
            cell = cell_name(cell_of(self.features(values)))
            raise HeldOutError(
                f"{self.label}: a row of {cell} was drawn, which is held out; it is not returned"
            )
        return True


@dataclass(frozen=True)
class AddFeatures:
    """Puts what a source declares into its rows."""

    features: Mapping[str, Any]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **self.features}


def with_features(source: Source) -> Any:
    """A streamed source with what it declares as columns."""
    stream, declared = source.dataset, dict(source.features)
    if not declared:
        return stream
    known = stream.features
    if known is not None:
        library = datasets_library()
        columns = library.Dataset.from_dict({name: [v] for name, v in declared.items()}).features
        known = library.Features({**known, **columns})
    return stream.map(AddFeatures(declared), features=known)


def check_gives(source: Source, keep: KeepTrained, columns: Sequence[str]) -> None:
    """Refuse a streamed source without a row to train on: an interleaved stream would end there without a word.

    Raises:
        MixtureError: it is empty, or all of its rows are held out.
    """
    # A pipeline of its own, so that the one that is read later starts at the first row.
    kept = with_features(source).filter(keep, input_columns=list(columns))
    if next(iter(kept), None) is None:
        if next(iter(source.dataset), None) is None:
            raise empty(source)
        raise MixtureError(
            f"{source.described}: every row of the stream is held out; nothing of it can be drawn, leave it out"
        )


def interleave(
    streams: Sequence[Any],
    probabilities: Sequence[float],
    *,
    seed: int,
    stopping_strategy: str,
    shuffle_buffer: int,
) -> Any:
    """One stream of several, by probability.

    Raises:
        MixtureError: an unknown stopping strategy, or streams whose columns do not go together.
    """
    if stopping_strategy not in STOPPING:
        raise MixtureError(
            f"stopping_strategy must be one of {', '.join(STOPPING)}, got {stopping_strategy!r}"
        )
    try:
        mixed = datasets_library().interleave_datasets(
            list(streams),
            probabilities=list(probabilities),
            seed=seed,
            stopping_strategy=stopping_strategy,
        )
    except FlixError:  # of a row that was read to know the columns
        raise
    except ValueError as error:
        raise not_alike(error) from error
    return mixed.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else mixed


def chain(streams: Sequence[Any]) -> Any:
    """One stream after the other.

    Raises:
        MixtureError: streams whose columns do not go together.
    """
    try:
        return datasets_library().concatenate_datasets(list(streams))
    except FlixError:  # of a row that was read to know the columns
        raise
    except ValueError as error:
        raise not_alike(error) from error


def not_alike(error: Exception) -> MixtureError:
    """The error for sources that cannot become one dataset."""
    return MixtureError(
        "the sources cannot be put into one dataset, since a column has different types in two of "
        "them. Cast it (datasets.Dataset.cast_column); a feature column must hold names in all, or lists in "
        f"all: declare ['hau'] instead of 'hau'. mixture.train needs none of this. ({error})"
    )

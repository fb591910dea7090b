"""The mixture: cells of several datasets, drawn by temperature, some of them never."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from flix.core import rng
from flix.core.checks import whole
from flix.core.errors import listed
from flix.core.features.cells import Cell, HeldOut, MixtureError, cell_name, features_of
from flix.core.features.names import Feature
from flix.core.features.registry import FeatureRegistry
from flix.core.sampling.schedule import Schedule, probabilities, walk
from flix.data import streaming
from flix.data.caps import Cap, caps_of
from flix.data.census import check_names, held_back, registry_of, take_census, warn_of_names
from flix.data.chosen import ChosenRows
from flix.data.columns import Table, check_columns, feature_columns, kept_features, read_table
from flix.data.display import table_of
from flix.data.errors import missing_extra
from flix.data.joining import joined
from flix.data.rows import TrainRows
from flix.data.sources import Source, as_sources, is_streamed, stream_size

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import TrainerCallback

Stopping = Literal["all_exhausted", "first_exhausted", "all_exhausted_without_replacement"]


class Mixture:
    """Datasets mixed by cell, where a cell is all rows that name the same features.

    Cells are drawn with p ∝ min(rows, cap)^(1/temperature). An epoch takes its share of rows from each cell, and the
    next epoch continues where it stopped, so every row of a cell is seen before any is repeated. The rows of an epoch
    depend only on the seed and the epoch.

    Args:
        sources: a list, or a mapping by name, of ``datasets.Dataset`` or ``IterableDataset``, each alone (its columns
            then say what its rows activate), as a pair ``(dataset, {"language": "hau"})`` with what all its rows
            activate, or as a :class:`Source`. A single one is also accepted.
        columns: the feature columns; default: the registry's groups that some source has, else what the sources
            declare, together with the columns ``language`` and ``task`` if a source has them.
        temperature: 1 draws by size, larger values level the cells out, ``math.inf`` draws all cells equally often.
        cap: the most rows that a cell counts for: a number for all, or ``{group: number}``,
            ``{group: {name: number}}``, ``{(group, name): number}`` or ``{cell's name: number}``; the lowest cap that
            applies counts.
        held_out: cells that are never trained on, as ``{group: name}``; an entry that names only some groups holds
            out all cells that match. A row of several features in a group is held out if one of its combinations is.
        seed: the seed of the order of rows.
        epoch_size: the number of rows in an epoch; default: what the trained cells count for.
        registry: the features; default: those that occur. The features that they imply also count in ``held_out``.
        implies: without a registry, what features imply, as for :class:`flix.FeatureRegistry`.
        evaluation: sources that are only for evaluation, in any of these forms. A cell that occurs only there is
            never trained on, and may be named in ``held_out``.

    Raises:
        MixtureError: a source, column, cap, temperature or size that breaks its rule; a row without a feature; a
            held-out cell that matches nothing; or nothing left to train on.
        FeatureError: an ill-formed feature, or one that the registry does not have.
        MissingFrameworkError: ``datasets`` is not installed.
    """

    def __init__(
        self,
        sources: object,
        *,
        columns: Sequence[str] | None = None,
        temperature: float = 2.0,
        cap: Cap = None,
        held_out: HeldOut | Iterable[Mapping[str, str] | str] = (),
        seed: int = 0,
        epoch_size: int | None = None,
        registry: FeatureRegistry | None = None,
        implies: Mapping[Any, Any] | None = None,
        evaluation: object = (),
    ) -> None:
        given = as_sources(sources)
        others = as_sources(evaluation) if evaluation else []
        self.temperature = temperature
        self.seed: int = whole(seed, "seed", 0, MixtureError)
        self.columns: tuple[str, ...] = feature_columns([*given, *others], columns, registry)
        self.sources: tuple[Source, ...] = tuple(kept_features(s, self.columns) for s in given)
        others = [kept_features(s, self.columns) for s in others]
        for source in (*self.sources, *others):
            check_columns(source, self.columns)
        for source in filter(is_streamed, others):
            raise MixtureError(
                f"{source.label} is for evaluation and streamed; its rows need numbers"
            )
        self.excluded: HeldOut = held_out if isinstance(held_out, HeldOut) else HeldOut(held_out)
        self._given = registry
        self._tables = [read_table(s, self.columns) for s in self.sources if not is_streamed(s)]
        self._streams = [s for s in self.sources if is_streamed(s)]
        self._others = [read_table(s, self.columns) for s in others]
        census = take_census(self._tables, self._streams, self._others, self.columns)
        self._cells, self._names, self._cell_of_row = census.cells, census.names, census.of_rows
        self._census, self._cell_of_stream = census, census.of_streams
        self._settle_names(implies)
        if not self.opaque:
            self.excluded.check_matched(self._cells, self._given)
        held = np.asarray(self.excluded.among(self._cells, self._given).any(axis=0), bool)
        self._back = held_back(self._tables, self._cell_of_row, held, self._names, self.seed)
        self._held_rows: NDArray[np.bool_] = held[self._cell_of_row]
        self._sizes: NDArray[np.int64] = census.sizes - np.bincount(self._cell_of_row[self._back], minlength=len(held))  # fmt: skip
        held = held | (census.sizes == 0)  # a cell of evaluation alone
        trained = np.flatnonzero(~held)
        if not len(trained):
            raise MixtureError(
                f"held_out covers every cell ({listed(map(cell_name, self._cells))}); "
                "nothing is left to train on"
            )
        self.cells: tuple[str, ...] = tuple(self._names[i] for i in trained.tolist())
        self.held_out_cells: tuple[str, ...] = tuple(
            self._names[i] for i in np.flatnonzero(held).tolist()
        )
        sizes = self._sizes[trained]
        caps = caps_of(cap, [self._cells[i] for i in trained.tolist()], self.cells, self._cells)
        p = probabilities(sizes, temperature, caps, self.cells)
        self.sizes: dict[str, int] = dict(zip(self.cells, sizes.tolist(), strict=True))
        self.counted: dict[str, int] = {
            name: int(min(size, most))
            for (name, size), most in zip(self.sizes.items(), caps.tolist(), strict=True)
        }
        self.probabilities: dict[str, float] = dict(zip(self.cells, p.tolist(), strict=True))
        everything = sum(self.counted.values())
        self.epoch_size: int = whole(
            everything if epoch_size is None else epoch_size, "epoch_size", 1, MixtureError
        )
        self._trained = trained
        self._schedule = Schedule(
            sizes, p, length=self.epoch_size, seed=self.seed, names=self.cells
        )

    @property
    def streamed(self) -> bool:
        """Whether rows must be read with :meth:`stream`."""
        return bool(self._streams)

    @property
    def opaque(self) -> list[Source]:
        """Streamed sources whose rows' cells are not known before they are read."""
        return [s for s in self._streams if set(s.features) != set(self.columns)]

    def _settle_names(self, implies: Mapping[Any, Any] | None) -> None:
        """Make the registry that implications need; refuse what a registry lacks, and without one, warn of names that
        look alike."""
        if implies and self._given is not None:
            raise MixtureError("a mixture takes a registry or implies, not both")
        if self._given is None:
            warn_of_names(self._cells)
        if implies:
            self._need_known("give the mixture a registry")
            self._given = registry_of(self._cells, self.columns, implies)
        if self._given is not None:
            tables = [*self._tables, *self._others]
            check_names(self._given, tables, self._streams, self.excluded)

    def registry(self) -> FeatureRegistry:
        """The given registry, or one of all features that occur, in the order of the sources.

        Raises:
            MixtureError: a streamed source's rows say what they activate, and no registry was given.
        """
        if self._given is not None:
            return self._given
        self._need_known("give the mixture a registry")
        return registry_of(self._cells, self.columns)

    def _need_known(self, what: str) -> None:
        for source in self.opaque:
            raise MixtureError(f"{source.label} is streamed: what its rows activate is not known before they are read; {what}")  # fmt: skip

    def feature_sizes(self) -> dict[Feature, int]:
        """The training rows of every feature, for ``flix.ranks.proportional(sizes=...)``; implied ones counted.

        Raises:
            MixtureError: as for :meth:`registry`, or it is unknown what the rows of a streamed source activate.
        """
        for source in self.opaque:
            raise MixtureError(f"{source.label} is streamed: how many rows its features have is not known")  # fmt: skip
        registry = self.registry()
        totals = dict.fromkeys(registry.live, 0)
        for i in self._trained.tolist():
            for feature in features_of(self._cells[i], registry):
                totals[feature] += int(self._sizes[i])
        return totals

    def trained_cells(self) -> list[Cell]:
        """The cells that are trained on, in the order of :attr:`cells`."""
        return [self._cells[i] for i in self._trained.tolist()]

    def all_cells(self) -> list[tuple[str, Cell, int]]:
        """Every cell's name, features and rows in the training sources, without the rows kept for evaluation."""
        return list(zip(self._names, self._cells, self._sizes.tolist(), strict=True))

    def run(self, rows: int) -> TrainRows:
        """The rows of a complete run, epoch after epoch, as one map-style dataset of this length.

        Raises:
            MixtureError: a source is streamed, or a length below 1.
        """
        self._need_numbers("run")
        return self.train.of_length(whole(rows, "the rows of a run", 1, MixtureError))

    def drawn(self, rows: int) -> dict[str, int]:
        """How many rows of each trained cell are among the first ``rows`` of a run."""
        whole(rows, "the rows of a run", 0, MixtureError)
        epochs, rest = divmod(rows, self.epoch_size)
        counts = self._schedule.taken(epochs)
        if rest:
            ends = np.cumsum(self._schedule.sizes)
            last = self._schedule.rows(epochs)[:rest]
            places = np.searchsorted(ends, last, side="right")
            counts += np.bincount(places, minlength=len(counts))
        return dict(zip(self.cells, counts.tolist(), strict=True))

    @cached_property
    def train(self) -> TrainRows:
        """The training rows of the current epoch, read by position; ``set_epoch`` chooses the epoch.

        Raises:
            MixtureError: a source is streamed.
        """
        self._need_numbers("train")
        order = np.argsort(self._cell_of_row, kind="stable")
        order = order[~(self._held_rows | self._back)[order]]
        return TrainRows(
            self._tables, order, self._schedule, frozenset(self._cells[i] for i in self._trained)
        )

    def callback(self) -> TrainerCallback:
        """A callback for a ``transformers.Trainer`` that tells :attr:`train` the epoch.

        Raises:
            MissingFrameworkError: transformers is not installed.
        """
        try:
            from flix.data.callback import TellEpoch
        except ImportError as error:
            raise missing_extra("a mixture's callback", "transformers", error) from error
        return TellEpoch(self.train)

    def epoch(self, epoch: int) -> Dataset:
        """The rows of an epoch, in order, as a ``datasets.Dataset``. It uses indices, so no row is copied.

        Raises:
            MixtureError: a source is streamed, or the sources' columns have different types.
        """
        self._need_numbers("epoch")
        return self._joined.select(self.train.rows_of(epoch))

    @property
    def held_out(self) -> Dataset:
        """The rows of the held-out cells, for evaluation, as a ``datasets.Dataset``.

        Raises:
            MixtureError: as :meth:`epoch`.
        """
        self._need_numbers("held_out")
        return self._held_joined()

    def _held_joined(self) -> Any:
        return self._joined.select(np.flatnonzero(self._held_rows))

    def evaluation_rows(self) -> ChosenRows:
        """The rows to evaluate on: those of the evaluation sources, those kept for evaluation, and the rows of
        held-out cells that the evaluation sources do not cover."""
        covered = np.zeros(len(self._cells), bool)
        covered[self._census.of_evaluation] = True
        left = self._back | (self._held_rows & ~covered[self._cell_of_row])
        return self._numbered(left, self._others, self._census.of_evaluation)

    def training_rows(self) -> ChosenRows:
        """The rows that are trained on, each once, in the order of the sources; without streams."""
        return self._numbered(~self._held_rows & ~self._back, [], np.zeros(0, np.int64))

    def _numbered(
        self, mine: NDArray[np.bool_], others: list[Table], cells: NDArray[np.int64]
    ) -> ChosenRows:
        rows = np.flatnonzero(mine)
        numbers = np.concatenate([rows, len(self._cell_of_row) + np.arange(len(cells))])
        seen = np.isin(np.arange(len(self._cells)), self._trained)
        of = np.concatenate([self._cell_of_row[rows], cells])
        return ChosenRows([*self._tables, *others], numbers, of, self._names, seen)

    def stream(
        self,
        *,
        epoch: int = 0,
        shuffle_buffer: int = 0,
        stopping_strategy: Stopping = "all_exhausted",
    ) -> IterableDataset:
        """The training rows as a ``datasets.IterableDataset``: cells and streams, interleaved by probability.

        Cells whose rows have numbers are shuffled by (seed, epoch); a streamed source keeps its order. Resuming by
        ``state_dict`` is exact without a shuffle buffer (``datasets`` does not keep the buffer's rows).

        Args:
            epoch: another epoch draws in another order.
            shuffle_buffer: the size of a buffer that shuffles what is drawn; 0 for none.
            stopping_strategy: of ``datasets.interleave_datasets``; by default the stream ends when all rows were
                seen, those of small cells several times.

        Raises:
            MixtureError: an argument out of its range, columns of different types, or a streamed source with no row
                to train on (its first one is read to see).
        """
        whole(epoch, "an epoch", 0, MixtureError)
        whole(shuffle_buffer, "shuffle_buffer", 0, MixtureError)
        streams, p = [], []
        for i, name in zip(self._trained.tolist(), self.cells, strict=True):
            share = self.probabilities[name] / self._sizes[i]
            rows = np.flatnonzero((self._cell_of_row == i) & ~self._back)
            if len(rows):
                words = rng.key("mixture stream rows", self.seed, name)
                shuffled = rows[walk(len(rows), epoch * len(rows), len(rows), words)]
                streams.append(self._joined.select(shuffled).to_iterable_dataset())
                p.append(share * len(rows))
            for source, place in zip(self._streams, self._cell_of_stream, strict=True):
                if place == i:
                    keep = streaming.KeepTrained(
                        *self._rule(source.label), frozenset(source.features)
                    )
                    streaming.check_gives(source, keep, self.columns)
                    stream = streaming.with_features(source)
                    streams.append(stream.filter(keep, input_columns=list(self.columns)))
                    p.append(share * stream_size(source))
        words = rng.key("mixture stream", self.seed, epoch)
        mixed = streaming.interleave(
            streams,
            np.asarray(p) / np.sum(p),
            seed=int(rng.bits(words, np.zeros(1, np.int64))[0] >> np.uint64(33)),
            stopping_strategy=stopping_strategy,
            shuffle_buffer=shuffle_buffer,
        )
        guard = streaming.Guard(*self._rule("the mixture's stream"))
        return mixed.filter(guard, input_columns=list(self.columns))

    def stream_held_out(self) -> IterableDataset:
        """The held-out rows as a ``datasets.IterableDataset``, source after source. Streams whose rows say what they
        activate are read to their end.

        Raises:
            MixtureError: columns of different types.
        """
        streams = []
        if self._held_rows.any() or not self._streams:
            streams.append(self._held_joined().to_iterable_dataset())
        for source, place in zip(self._streams, self._cell_of_stream, strict=True):
            stream = streaming.with_features(source)
            if source in self.opaque:
                keep = streaming.KeepHeldOut(*self._rule(source.label))
                streams.append(stream.filter(keep, input_columns=list(self.columns)))
            elif place not in self._trained:
                streams.append(stream)
        if not streams:  # nothing is held out
            streams = [streaming.with_features(self._streams[0]).take(0)]
        return streaming.chain(streams)

    def _rule(self, label: str) -> tuple[HeldOut, FeatureRegistry | None, tuple[str, ...], str]:
        return self.excluded, self._given, self.columns, label

    @cached_property
    def _joined(self) -> Any:
        """All rows that have numbers, with the feature columns, as one dataset."""
        return joined(self._tables)

    def _need_numbers(self, what: str) -> None:
        for source in self._streams:
            raise MixtureError(
                f"mixture.{what} reads rows by number, and {source.label} is streamed; use "
                "mixture.stream(), and mixture.stream_held_out() for evaluation"
            )

    def __str__(self) -> str:
        counts = self._schedule.counts(0).tolist()
        rows = [
            (name, self.sizes[name], self.counted[name], self.probabilities[name], count)
            for name, count in zip(self.cells, counts, strict=True)
        ]
        held = [
            (self._names[i], int(self._sizes[i]))
            for i in range(len(self._names))
            if self._names[i] in self.held_out_cells
        ]
        return table_of(rows, held, temperature=self.temperature)

    def __repr__(self) -> str:
        return (
            f"Mixture({len(self.sources)} sources, {len(self.cells)} cells, "
            f"{len(self.held_out_cells)} held out, {self.epoch_size} rows an epoch)"
        )

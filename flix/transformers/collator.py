"""Rows with columns for their features, to batches with routing."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flix.core.checks import whole
from flix.core.config.config import FlixConfig
from flix.core.errors import ConfigError, FeatureError, RoutingError, listed, near
from flix.core.features.dropout import FeatureDropout
from flix.core.features.encoding import Unknown, check_policy
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import Routing
from flix.core.sampling.batching import (
    RowNumber,
    drop_numbered,
    implied_groups,
    usual_width,
    width_for,
)
from flix.core.sampling.packing import SEGMENTS, segment_lengths
from flix.transformers.numbering import NUMBER

_FROM_CONFIG: Any = object()
_PREFERENCES = "DataCollatorForPreference"  # TRL's: each row gives two
_KEYS = ("flix_features", "flix_weights")

Row = Mapping[str, Any]


class FlixCollator:
    """Turns the feature columns of rows into routing, and adds it to the batch that another collator makes.

    A batch gets ``flix_features``, int64 ``[batch, width]``, and ``flix_weights``, float32 of that shape. A row's
    column holds what ``FeatureRegistry.encode`` takes: a name, several names, ``{name: weight}``, or None, which
    leaves out the group. ``datasets`` may turn a column into structs; these may hold None for names that a row does
    not have.

    Feature dropout is keyed by (seed, micro-step, row), as :class:`flix.FeatureDropout` defines it. The collator does
    not count steps. Either rows carry their place in the run (``FlixTrainer`` and :func:`numbered` provide it), or
    the loop passes the step. So masks are the same with workers, with several processes and after resuming. Rows
    without a number are an error, unless :meth:`evaluation` says that no features are dropped.

    Args:
        config: a configuration, or a registry alone.
        collator: makes the rest of the batch; default: transformers' ``default_data_collator``. If it has a true
            attribute ``whole_rows``, it gets the rows with their feature columns; with ``needs_numbers`` it gets
            their place in the run.
        columns: the column of each group that rows name: ``{"language": "lang"}``; default: one column for each
            group, with the group's name. Rows may then leave out groups whose features are all implied by others.
        unknown: what to do with unknown features; default: the configuration's rule.
        width: the number of entries of a row; default: the number that a row activates if it names one feature of
            each group, including implied ones. A batch that needs more gets a multiple of it.
        per_token: rows hold several segments, as :func:`pack` makes them. Their columns are lists with one entry for
            each segment, and ``flix_features`` is ``[batch, length, width]``. The segments' lengths are read from a
            column ``segments``, or else from where ``position_ids`` start again; a row with neither is one segment.
        seed: the seed of feature dropout.
        feature_dropout: default: the configuration's; None switches it off.

    Raises:
        ConfigError: arguments of the wrong kind, or a width or column of the wrong form.
        FeatureError: columns for a group that does not exist.
        RoutingError: an ill-formed rule for unknown features.
    """

    def __init__(
        self,
        config: FlixConfig | FeatureRegistry,
        collator: Callable[[list[Any]], Any] | None = None,
        columns: Mapping[str, str] | None = None,
        *,
        unknown: Unknown | None = None,
        width: int | None = None,
        per_token: bool = False,
        seed: int = 0,
        feature_dropout: FeatureDropout | None = _FROM_CONFIG,
    ) -> None:
        if isinstance(config, FlixConfig):
            self.registry: FeatureRegistry = config.registry
            given, dropout = config.unknown, config.feature_dropout
        elif isinstance(config, FeatureRegistry):
            self.registry = config
            given, dropout = "error", None
        else:
            raise ConfigError(
                f"FlixCollator needs a FlixConfig or a FeatureRegistry, got {type(config).__name__}"
            )
        self.collator: Callable[[list[Any]], Any] = (
            collator if collator is not None else _default_collator()
        )
        if not callable(self.collator):
            raise ConfigError(f"collator must be callable or None, got {collator!r}")
        self.columns: dict[str, str] = _columns(self.registry, columns)
        self._optional = (
            frozenset(implied_groups(self.registry)) if columns is None else frozenset()
        )
        self.unknown: Unknown = given if unknown is None else unknown
        check_policy(self.unknown)
        self.width: int | None = None if width is None else whole(width, "width", 1)
        self.usual_width: int = usual_width(self.registry, self.columns) if width is None else width
        self.per_token = per_token
        self.seed = seed
        if feature_dropout is not _FROM_CONFIG:
            dropout = feature_dropout
        if dropout is not None and not isinstance(dropout, FeatureDropout):
            raise ConfigError(f"feature_dropout must be a FeatureDropout or None, got {dropout!r}")
        if dropout is not None:
            dropout.check(self.registry)
        self.feature_dropout = dropout
        self.group_weights: Mapping[str, float] | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the other collator, or None."""
        return getattr(self.collator, "tokenizer", None)

    @property
    def own_columns(self) -> tuple[str, ...]:
        """The columns that rows must keep for this collator, and for the other one if it names them."""
        others = getattr(self.collator, "own_columns", ())
        return (*self.columns.values(), NUMBER, *((SEGMENTS,) if self.per_token else ()), *others)

    def evaluation(self, group_weights: Mapping[str, float] | None = None) -> FlixCollator:
        """A collator like this one without dropout, around the other collator's ``evaluation()`` if it has one.

        Args:
            group_weights: a factor for every feature of a group, for example ``{"language": 0.0}`` to leave out
                languages; default: as in this collator.
        """
        other = copy.copy(self)
        other.feature_dropout = None
        if hasattr(self.collator, "evaluation"):
            other.collator = self.collator.evaluation()
        if group_weights is not None:
            other.registry.encode([], group_weights=group_weights)  # refuses unknown groups
            other.group_weights = group_weights
        return other

    @property
    def needs_numbers(self) -> bool:
        """Whether training rows must carry their place in the run, for dropout or for the other collator."""
        asked = getattr(self.collator, "needs_numbers", False)
        return self.feature_dropout is not None or bool(asked)

    def __call__(
        self, rows: Sequence[Row], *, step: int | None = None, first_row: int = 0
    ) -> dict[str, Any]:
        """Make a batch; the rows are not changed.

        Args:
            rows: mappings of columns.
            step: the number of the micro-step, for feature dropout in a loop of one's own.
            first_row: the number of the first row, where the batch is one part of a step's.

        Raises:
            RoutingError: rows that lack a feature column, that carry no numbers although features are to be dropped,
                or values of the wrong form.
            FeatureError: an unknown feature; the row is named.
        """
        rows = list(rows)
        self._check(rows)
        numbers = self._numbers(rows, step, first_row)
        batch = self.collator(self._rest(rows, numbers))
        routing, segments = self._encode(rows)
        if segments is not None:
            routing = _per_token(routing, segments, len(rows), _length_of(batch))
        elif type(self.collator).__name__ == _PREFERENCES and len(batch["input_ids"]) == 2 * len(
            rows
        ):
            routing = routing[
                [*range(len(rows)), *range(len(rows))]
            ]  # all that is chosen, all that is rejected
        if numbers is not None and self.feature_dropout is not None:
            routing = drop_numbered(self.feature_dropout, routing, numbers, seed=self.seed)
        batch["flix_features"] = torch.from_numpy(routing.ids.astype(np.int64))
        batch["flix_weights"] = torch.from_numpy(np.array(routing.weights, np.float32))
        return batch  # type: ignore[no-any-return]

    def _rest(self, rows: list[Row], numbers: list[RowNumber] | None) -> list[Any]:
        """What the other collator gets: the rows without this one's columns, unless it wants them whole."""
        if getattr(self.collator, "whole_rows", False):
            if numbers is None:
                return rows
            return [{**row, NUMBER: number} for row, number in zip(rows, numbers, strict=True)]
        own = {*self.own_columns}
        return [{name: value for name, value in row.items() if name not in own} for row in rows]

    def _check(self, rows: Sequence[Any]) -> None:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise RoutingError(
                    f"row {number}: FlixCollator takes rows that are mappings of columns, got "
                    f"{type(row).__name__}"
                )
            for key in _KEYS:
                if key in row:
                    raise RoutingError(
                        f"row {number} has a column {key!r} already; FlixCollator makes it from "
                        f"{listed(self.columns.values())}"
                    )
            missing = [
                column
                for group, column in self.columns.items()
                if column not in row and group not in self._optional
            ]
            if not missing:
                continue
            if not any(column in row for column in self.columns.values()):
                raise RoutingError(
                    f"row {number} has none of the feature columns {listed(self.columns.values())}; it has "
                    f"{listed(row)}. transformers' Trainer drops columns that the model's forward does not "
                    "name: use FlixTrainer, or TrainingArguments(remove_unused_columns=False)"
                )
            raise RoutingError(
                f"row {number} has no feature column {missing[0]!r}{near(missing[0], row)}; it has "
                f"{listed(row)}. Give it None to leave the group out of a row, or name the columns that "
                "there are: FlixCollator(..., columns={group: column})"
            )

    def _numbers(
        self, rows: Sequence[Row], step: int | None, first_row: int
    ) -> list[RowNumber] | None:
        """The number of each row, if it is needed."""
        if not self.needs_numbers:
            return None
        if step is not None:
            return [(step, first_row + i) for i in range(len(rows))]
        for number, row in enumerate(rows):
            if NUMBER not in row:
                raise RoutingError(
                    f"row {number} does not carry its place in the run, which {self._keyed} keyed by. "
                    "Use FlixTrainer, numbered(loader), or collator(rows, step=...); for evaluation, "
                    "collator.evaluation(); to train without it, FlixCollator(..., feature_dropout=None)"
                )
        return [(int(row[NUMBER][0]), int(row[NUMBER][1])) for row in rows]

    @property
    def _keyed(self) -> str:
        return "feature dropout is" if self.feature_dropout is not None else "what is masked is"

    def routing_of(self, rows: Sequence[Row]) -> Routing:
        """The routing of rows, with one composition for each row, without dropout."""
        return self._encode(rows)[0]

    def _encode(self, rows: Sequence[Row]) -> tuple[Routing, list[list[int]] | None]:
        """The routing of rows, or of all their segments in order, and then the segments' lengths."""
        named = [
            {group: _plain(row.get(column)) for group, column in self.columns.items()}
            for row in rows
        ]
        lengths: list[list[int]] | None = None
        if self.per_token:
            lengths = [_segments(row, number) for number, row in enumerate(rows)]
            named = [
                segment
                for number, (row, parts) in enumerate(zip(named, lengths, strict=True))
                for segment in _split(row, len(parts), number)
            ]
        factors = self.group_weights
        if self.width is not None:
            return self.registry.encode(named, self.unknown, width=self.width, group_weights=factors), lengths  # fmt: skip
        routing = self.registry.encode(named, self.unknown, group_weights=factors)
        short = width_for(routing.width, self.usual_width) - routing.width
        if short:
            around = ((0, 0), (0, short))
            routing = Routing(
                np.pad(routing.ids, around, constant_values=-1),
                np.pad(routing.weights, around),
                self.registry,
            )
        return routing, lengths


def _default_collator() -> Callable[[list[Any]], Any]:
    from transformers import default_data_collator

    return default_data_collator  # type: ignore[no-any-return]


def _columns(registry: FeatureRegistry, columns: Mapping[str, str] | None) -> dict[str, str]:
    if columns is None:
        return {group: group for group in registry.groups}
    if not isinstance(columns, Mapping) or not columns:
        raise ConfigError(f"columns must be {{group: column}}, got {columns!r}")
    found: dict[str, str] = {}
    for given, column in columns.items():
        group = unicodedata.normalize("NFC", given) if isinstance(given, str) else given
        if group not in registry.groups:
            raise FeatureError(
                f"columns names the group {group!r}{near(str(group), registry.groups)}; the groups are: "
                f"{listed(registry.groups)}"
            )
        if not isinstance(column, str) or not column or group in found:
            raise ConfigError(f"the column of group {group!r} must be a name, got {column!r}")
        found[group] = column
    return found


def _plain(value: Any) -> Any:
    """A column's value without the None that a struct holds for names that the row does not have."""
    if isinstance(value, Mapping):
        return {name: weight for name, weight in value.items() if weight is not None}
    return value


def _segments(row: Row, number: int) -> list[int]:
    try:
        return segment_lengths(row) or [0]
    except (RoutingError, TypeError, ValueError) as error:
        raise RoutingError(f"row {number}: {error}") from None


def _split(row: Row, parts: int, number: int) -> list[dict[str, Any]]:
    """What each segment of a row names; one entry for a row of one segment may stand without a list."""
    columns = {}
    for group, value in row.items():
        if parts == 1 and not isinstance(value, list | tuple):
            value = [value]
        if value is None:
            value = [None] * parts
        if not isinstance(value, list | tuple) or len(value) != parts:
            raise RoutingError(
                f"row {number}: with per_token=True, the column of group {group!r} needs one entry for each "
                f"of the row's {parts} segments, got {value!r}"
            )
        columns[group] = [_plain(entry) for entry in value]
    return [{group: values[i] for group, values in columns.items()} for i in range(parts)]


def _length_of(batch: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "labels"):
        if isinstance(batch.get(name), torch.Tensor) and batch[name].dim() >= 2:
            return int(batch[name].shape[1])
    raise RoutingError(
        f"per_token=True needs a batch with input_ids [batch, length]; the collator made {listed(batch)}"
    )


def _per_token(
    routing: Routing, segments: Sequence[Sequence[int]], batch: int, length: int
) -> Routing:
    """Each segment's routing at each of its tokens: ids and weights ``[batch, length, width]``."""
    which = np.empty((batch, length), np.int64)
    first = 0
    for row, lengths in enumerate(segments):
        if len(lengths) == 1:
            which[row] = first  # one segment: its padding, on either side, is routed like it
        elif sum(lengths) == length:
            which[row] = np.repeat(np.arange(first, first + len(lengths)), lengths)
        else:
            raise RoutingError(
                f"row {row} has segments of {sum(lengths)} tokens in all, but the batch is {length} long; rows of "
                "several segments must have the batch's length (pack(rows, length) fills them up)"
            )
        first += len(lengths)
    return Routing(routing.ids[which], routing.weights[which], routing.registry)

"""Routing: which features act in each row of a batch, and how strongly (docs/specification.md §2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import RoutingError
from flix.core.features.names import written
from flix.core.features.table import FeatureTable


@dataclass(frozen=True, eq=False)
class Routing:
    """The active features of each row.

    Attributes:
        ids: int32 ``[batch, width]`` (or ``[batch, length, width]`` for per-token routing); -1 pads.
        weights: float32 in the shape of ``ids``; 0 where ids is -1.
        registry: the registry that the ids belong to.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    registry: FeatureTable

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def width(self) -> int:
        """The number of entries in a row."""
        return int(self.ids.shape[-1])

    def __getitem__(self, rows: Any) -> Routing:
        """The routing of some rows (a slice, or an array of row numbers)."""
        if isinstance(rows, int | np.integer):
            rows = [rows]
        return Routing(self.ids[rows], self.weights[rows], self.registry)

    def names(self, row: int) -> dict[tuple[str, str], float]:
        """The features of a row with their weights; for messages and inspection."""
        ids, weights = self.ids[row].ravel(), self.weights[row].ravel()
        return {
            self.registry.features[i]: float(w)
            for i, w in zip(ids.tolist(), weights.tolist(), strict=True)
            if i >= 0
        }


def unpacked(registry: FeatureTable, features: Any, weights: Any) -> tuple[Any, Any]:
    """The ids and weights of a call that may have been given a :class:`Routing`; weights given beside it win.

    Raises:
        RoutingError: the routing of another registry.
    """
    if not isinstance(features, Routing):
        return features, weights
    if features.registry != registry:
        raise RoutingError(
            f"the routing was encoded by another registry ({features.registry}) than the model's "
            f"({registry})"
        )
    return features.ids, features.weights if weights is None else weights


def as_array(what: str, value: Any) -> NDArray[Any]:
    """What a call was given as ids or weights, as a numpy array; a framework's array must be one that numpy can read.

    Args:
        what: how a message calls it: ``"flix_features"`` or ``"flix_weights"``.
        value: a list or an array ``[batch, width]`` or ``[batch, length, width]``.

    Raises:
        RoutingError: it is no array.
    """
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise RoutingError(f"{what} must be an array [batch, width], got {value!r}") from error


def check_form(
    ids: Any, weights: Any = None, *, batch: int | None = None, dims: Sequence[int] = (2, 3)
) -> None:
    """Refuse routing by its shapes and dtypes: all that is known of it while a framework traces a program.

    Args:
        ids: an array of any framework; a size that is not known is None, and fits any.
        weights: None, or another.
        batch: the number of rows expected, if known.
        dims: how many dimensions ids may have.

    Raises:
        RoutingError: a wrong dtype, number of dimensions, shape or batch size.
    """
    name = _dtype(ids)
    if "int" not in name:
        raise RoutingError(
            f"flix_features must hold integer ids, got dtype {name}; make them with "
            "registry.encode(rows)"
        )
    shape = _shape(ids)
    if shape is None or len(shape) not in dims:
        raise RoutingError(
            "flix_features must have the shape [batch, width] or [batch, length, width], "
            f"got {shape or 'one of unknown rank'}"
        )
    if not alike(shape[:1], [batch]):
        raise RoutingError(
            f"flix_features routes {shape[0]} rows, but the batch has {batch} rows; "
            "one row of ids is needed for each row of the batch"
        )
    if weights is None:
        return
    if "float" not in _dtype(weights):
        raise RoutingError(f"flix_weights must be floating point, got dtype {_dtype(weights)}")
    found = _shape(weights)
    if found is not None and not alike(found, shape):
        raise RoutingError(
            f"flix_weights must have the shape of flix_features, {shape}, got {found}"
        )


def _dtype(array: Any) -> str:
    return str(getattr(array.dtype, "name", array.dtype))


def _shape(array: Any) -> list[Any] | None:
    """The sizes as far as they are known; None where not even their number is (TensorFlow)."""
    return None if getattr(array.shape, "rank", 0) is None else list(array.shape)


def alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether these can be the same sizes; None is not known, and fits any."""
    return len(a) == len(b) and all(
        x is None or y is None or x == y for x, y in zip(a, b, strict=True)
    )


def fits(given: Sequence[Any], lead: Sequence[Any], lengths: Sequence[Any] = ()) -> frozenset[str]:
    """How the positions of a layer's input can be those that are routed, from sizes; None is a size not known.

    Args:
        given: the input's leading sizes.
        lead: the routing's: batch, or batch and length.
        lengths: how many positions may share what is routed, for models that flatten both into one dimension before a
            layer; none if they may not.

    Returns:
        ``"rows"``, they begin with the routing's; ``"one"``, one row for all, as position ids have it; ``"flat"``, rows
        and their positions are one dimension. Empty where the input does not fit.
    """
    count = None if None in lead else math.prod(lead)
    flat = [[None if None in (n, count) else count * n] for n in lengths]  # type: ignore[operator]
    ways = {"flat"} if any(alike(given, size) for size in flat) else set()
    if given and lead and given[0] is not None and given[0] == 1 != lead[0]:
        begin = ("one", [1, *lead[1:]])
    else:
        begin = ("rows", [*lead])
    if alike(given[: len(lead)], begin[1]):
        ways.add(begin[0])
    return frozenset(ways)


def check_routing(
    ids: NDArray[Any],
    weights: NDArray[Any] | None,
    registry: FeatureTable,
    *,
    batch: int | None = None,
    lead: Sequence[int] | None = None,
) -> None:
    """Refuse routing arrays that break the rules; backends call this on the host before they execute.

    Args:
        ids: integer ``[batch, width]`` or ``[batch, length, width]``, each -1 (padding) or a feature's id.
        weights: None, or floats in the shape of ``ids``, finite in float32.
        registry: the registry that the ids belong to.
        batch: the number of rows expected, if known.
        lead: a layer's input's sizes but for the last, its features; ids by token are then held to its positions, too.

    Raises:
        RoutingError: wrong dtype, rank, shape, range, batch size or length; the first bad row is named.
    """
    check_form(ids, weights, batch=batch)
    if lead is not None and not alike(ids.shape[:-1], lead[: ids.ndim - 1]):
        what = "[batch, length]" if ids.ndim == 3 else "[batch]"
        raise RoutingError(
            f"flix_features routes {what} = {list(ids.shape[:-1])}, but the input has the leading sizes {list(lead)}; "
            "one row of ids is needed for each row of the batch (and one for each position, where routing is per token)"
        )
    bad = (ids < -1) | (ids >= len(registry))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise RoutingError(
            f"flix_features has the id {int(ids[place])} in row {place[0]} (position {list(place)}); "
            f"valid ids are 0 to {len(registry) - 1}, and -1 for padding"
        )
    if registry.removed:
        _check_removed(ids, registry)
    if weights is None:
        return
    with np.errstate(over="ignore"):
        odd = ~np.isfinite(np.asarray(weights, np.float32))
    if odd.any():
        place = tuple(int(i) for i in np.argwhere(odd)[0])
        feature = int(ids[place])
        name = written(registry.features[feature]) if feature >= 0 else "padding"
        end = ", beyond float32" if np.isfinite(weights[place]) else ""
        raise RoutingError(
            f"flix_weights must be finite, got {weights[place]}{end} in row {place[0]} for {name}"
        )


def _check_removed(ids: NDArray[Any], registry: FeatureTable) -> None:
    found = np.isin(ids, registry.removed_ids)
    if found.any():
        place = tuple(int(i) for i in np.argwhere(found)[0])
        name = written(registry.features[int(ids[place])])
        raise RoutingError(
            f"flix_features has the id {int(ids[place])} in row {place[0]}: {name}, which was removed; "
            "make ids with registry.encode(rows)"
        )

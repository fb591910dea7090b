"""What an adapter's features share: norms, cosines of their updates, and an order that puts like beside like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter
from flix.core.adapter.similarity import cosines, inner_products
from flix.core.features.names import Feature

MOST = 60
"""How many features of a group a matrix shows."""


@dataclass(frozen=True)
class Matrix:
    """Cosines between the features of one group and those of another, or of the same.

    Attributes:
        rows, columns: names of the features, like beside like.
        overall: ``[rows, columns]``, all layers as one long vector; NaN where an update is 0.
        by_layer: ``[layers, rows, columns]``.
        groups: the groups of the rows and of the columns.
        left_out: features that are not shown, those with the smallest updates.
    """

    groups: tuple[str, str]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    overall: NDArray[np.float64]
    by_layer: NDArray[np.float64]
    left_out: int


@dataclass(frozen=True)
class Alike:
    """Two features of a group and the cosine between their updates over all layers."""

    group: str
    one: str
    other: str
    cosine: float


@dataclass(frozen=True)
class Updates:
    """What the features of an adapter share.

    Attributes:
        layers: the layers' paths.
        features: those that are shown.
        norms: ``[layers, features]``: the Frobenius norm of each update.
        totals: the norm of every feature's update over all layers, also of those that are not shown.
        matrices: of each group of two features or more, and of every two groups.
        alike: the most similar pair of each group.
        least: the least similar.
        untrained: features whose update is 0 everywhere.
    """

    layers: tuple[str, ...]
    features: tuple[Feature, ...]
    norms: NDArray[np.float64]
    totals: dict[Feature, float]
    matrices: tuple[Matrix, ...]
    alike: dict[str, Alike]
    least: dict[str, Alike]
    untrained: tuple[Feature, ...]


def compare(adapter: Adapter) -> Updates:
    """Norms and cosines of an adapter's features; no product B A is formed."""
    features = adapter.config.registry.live
    layers = tuple(adapter.layers)
    total = np.zeros((len(features), len(features)))
    squares = np.zeros((len(layers), len(features)))
    for number, layer in enumerate(layers):
        products = inner_products(adapter, layer, features)
        total += products
        squares[number] = np.diagonal(products)
    shown, left_out = _shown(features, np.diagonal(total))
    places = [features.index(f) for f in shown]
    overall = cosines(total)
    by_layer = np.stack(
        [cosines(inner_products(adapter, layer, shown)) for layer in layers]
    ) if layers else np.zeros((0, len(shown), len(shown)))  # fmt: skip
    best, least = {}, {}
    for group in adapter.config.registry.groups:
        of = [i for i, f in enumerate(features) if f[0] == group]
        if (
            ends := _ends(group, [features[i][1] for i in of], overall[np.ix_(of, of)])
        ) is not None:
            best[group], least[group] = ends
    return Updates(
        layers=layers,
        features=tuple(shown),
        norms=np.sqrt(np.maximum(squares[:, places], 0.0)),
        totals={f: float(np.sqrt(max(total[i, i], 0.0))) for i, f in enumerate(features)},
        matrices=tuple(_matrices(shown, overall[np.ix_(places, places)], by_layer, left_out)),
        alike=best,
        least=least,
        untrained=tuple(f for i, f in enumerate(features) if total[i, i] == 0),
    )


def _shown(
    features: Sequence[Feature], squares: NDArray[np.float64]
) -> tuple[list[Feature], dict[str, int]]:
    """Of each group those with the largest updates, in the registry's order; and how many of it are left out."""
    kept: list[int] = []
    left_out = {}
    for group in dict.fromkeys(f[0] for f in features):
        of = sorted((i for i, f in enumerate(features) if f[0] == group), key=lambda i: -squares[i])
        kept += of[:MOST]
        left_out[group] = len(of[MOST:])
    return [features[i] for i in sorted(kept)], left_out


def _ends(
    group: str, names: Sequence[str], found: NDArray[np.float64]
) -> tuple[Alike, Alike] | None:
    """The most and the least similar pair; None where no two features have an update."""
    pairs = np.where(np.triu(np.ones_like(found, bool), 1), found, np.nan)
    if np.isnan(pairs).all():
        return None

    def named(place: int) -> Alike:
        one, other = divmod(place, len(names))
        return Alike(group, names[one], names[other], float(pairs[one, other]))

    return named(int(np.nanargmax(pairs))), named(int(np.nanargmin(pairs)))


def _matrices(
    features: Sequence[Feature],
    overall: NDArray[np.float64],
    by_layer: NDArray[np.float64],
    left_out: dict[str, int],
) -> list[Matrix]:
    orders: dict[str, list[int]] = {}
    for group in dict.fromkeys(f[0] for f in features):
        of = [i for i, f in enumerate(features) if f[0] == group]
        orders[group] = [of[i] for i in clustered(overall[np.ix_(of, of)])]
    found = []
    groups = list(orders)
    for number, one in enumerate(groups):
        for other in groups[number:]:
            rows, columns = orders[one], orders[other]
            if one == other and len(rows) < 2:
                continue
            if one != other and len(rows) < len(columns):
                one_, other_, rows, columns = other, one, columns, rows
            else:
                one_, other_ = one, other
            found.append(
                Matrix(
                    (one_, other_),
                    tuple(features[i][1] for i in rows),
                    tuple(features[i][1] for i in columns),
                    overall[np.ix_(rows, columns)],
                    by_layer[:, rows][:, :, columns],
                    left_out[one] + (left_out[other] if other != one else 0),
                )
            )
    return sorted(found, key=lambda m: m.groups[0] != m.groups[1])


def clustered(similarity: NDArray[np.float64]) -> list[int]:
    """An order in which like stands beside like: the leaves of a tree built by average linkage.

    Each step joins the two clusters whose members are most similar on average (Sokal and Michener, 1958); of the two,
    the ends that are most similar are turned to each other.

    Args:
        similarity: ``[n, n]``, symmetric; NaN counts as less than everything.

    Returns:
        The numbers 0 to n - 1.
    """
    values = np.where(np.isnan(similarity), -2.0, similarity)
    clusters: dict[int, list[int]] = {i: [i] for i in range(len(values))}
    means = values.astype(np.float64).copy()
    np.fill_diagonal(means, -np.inf)
    while len(clusters) > 1:
        one, other = sorted(int(i) for i in np.unravel_index(np.argmax(means), means.shape))
        a, b = clusters[one], clusters.pop(other)
        means[one] = means[:, one] = (len(a) * means[one] + len(b) * means[other]) / (
            len(a) + len(b)
        )
        means[other] = means[:, other] = means[one, one] = -np.inf
        clusters[one] = _joined(a, b, values)
    return next(iter(clusters.values()), [])


def _joined(a: list[int], b: list[int], values: NDArray[np.float64]) -> list[int]:
    """Two orders as one, turned so that the most similar ends meet."""
    turns = [(x, y) for x in (a, a[::-1]) for y in (b, b[::-1])]
    x, y = max(turns, key=lambda turn: values[turn[0][-1], turn[1][0]])
    return x + y

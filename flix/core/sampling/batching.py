"""What a data collator decides: how wide a batch's routing is, and which dropout mask each row gets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from flix.core.features.dropout import FeatureDropout
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import Routing

RowNumber = tuple[int, int]
"""A training row's place in the run: (micro-step, row within the step's batch over all processes)."""

_COMBINATIONS = 10_000


def implied_groups(registry: FeatureRegistry) -> tuple[str, ...]:
    """The groups that rows need not name: some feature brings along each of their features."""
    implied = registry.implied_ids
    return tuple(g for g in registry.groups if implied.issuperset(registry.ids_of(g)))


def usual_width(registry: FeatureRegistry, groups: Iterable[str] | None = None) -> int:
    """The most features that a row can activate which names one feature of each group, with all they imply.

    Batches of this width have one shape whatever their rows name, so that compiled models are not traced again.

    Args:
        registry: the features.
        groups: the groups that rows name; default: all.

    Raises:
        FeatureError: no such group.
    """
    named = registry.groups if groups is None else tuple(groups)
    choices = []
    for group in named:
        # Of features that imply the same, one stands for all: what else they bring is themselves.
        distinct = {frozenset(registry.implied(f)): f for f in registry.ids_of(group)}
        choices.append([frozenset({f}) | implied for implied, f in distinct.items()])
    if math.prod(map(len, choices)) > _COMBINATIONS:
        bound = sum(max(map(len, options), default=0) for options in choices)
        return max(1, min(bound, len(registry)))
    return max(1, *(len(frozenset().union(*c)) for c in itertools.product(*choices)))


def width_for(needed: int, usual: int) -> int:
    """The smallest multiple of the usual width that holds the fullest row: few shapes, whatever rows come."""
    return usual * max(1, -(-needed // usual))


def drop_numbered(
    dropout: FeatureDropout, routing: Routing, numbers: Sequence[RowNumber], *, seed: int
) -> Routing:
    """Feature dropout of rows that carry their numbers: each gets the mask of its place in the run.

    Args:
        dropout: what is dropped.
        routing: the batch's routing.
        numbers: (micro-step, row) of each row of the batch.
        seed: the run's seed.

    Raises:
        ValueError: another number of numbers than of rows.
    """
    if len(numbers) != len(routing):
        raise ValueError(f"{len(routing)} rows need as many numbers, got {len(numbers)}")
    parts = []
    begin = 0
    for end in range(1, len(numbers) + 1):
        step, first = numbers[begin]
        if end < len(numbers) and numbers[end] == (step, first + end - begin):
            continue
        parts.append(dropout(routing[begin:end], seed=seed, step=step, first_row=first))
        begin = end
    if len(parts) == 1:
        return parts[0]
    return Routing(
        np.concatenate([routing.ids[:0], *(part.ids for part in parts)]),
        np.concatenate([routing.weights[:0], *(part.weights for part in parts)]),
        routing.registry,
    )

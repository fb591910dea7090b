"""Feature dropout: training leaves whole features out, so each update stands alone (docs/specification.md §2.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flix.core import rng
from flix.core.checks import rate
from flix.core.errors import ConfigError, shown
from flix.core.features.names import normal_group
from flix.core.features.routing import Routing
from flix.core.features.table import FeatureTable


@dataclass(frozen=True)
class FeatureDropout:
    """Drops each active feature of each row, independently, with its group's rate.

    Lin et al. (arXiv 2402.17934) drop features in training but fix neither rate nor rescaling; the defaults
    here are our choice. What worked in our trials: drop the language, keep the task.

    Attributes:
        p: the rate for groups that ``per_group`` does not name, in [0, 1].
        per_group: rates by group.
        keep_one: a row that would lose all of its features keeps one of them, drawn uniformly.
        rescale: divide the weights that stay by (1 - rate), so that the expected update is unchanged.

    Raises:
        ConfigError: a rate outside [0, 1], a group given twice, or a flag that is not a bool.
        FeatureError: an ill-formed name of a group.
    """

    p: float = 0.2
    per_group: Mapping[str, float] = field(default_factory=dict)
    keep_one: bool = False
    rescale: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", rate(self.p, "p"))
        if not isinstance(self.per_group, Mapping):
            raise ConfigError(f"per_group must be {{group: rate}}, got {shown(self.per_group)}")
        rates = {normal_group(g): rate(p, f"per_group[{g!r}]") for g, p in self.per_group.items()}
        if len(rates) < len(self.per_group):
            raise ConfigError("per_group names a group twice, in two Unicode forms")
        object.__setattr__(self, "per_group", rates)
        for name in ("keep_one", "rescale"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def check(self, registry: FeatureTable) -> None:
        """Refuse rates for groups that the registry does not have.

        Raises:
            FeatureError: an unknown group in ``per_group``.
        """
        for group in self.per_group:
            registry.ids_of(group)

    def rates(self, registry: FeatureTable) -> dict[str, float]:
        """The rate of every group of the registry."""
        self.check(registry)
        return {group: self.per_group.get(group, self.p) for group in registry.groups}

    def __call__(self, routing: Routing, *, seed: int, step: int, first_row: int = 0) -> Routing:
        """A new routing without the dropped features: their ids are -1 and their weights 0.

        The mask is a function of (seed, step, row, id): the same in every backend and in a resumed run. In
        per-token routing a feature is dropped for all tokens of a row, or for none.

        Args:
            routing: the batch's routing; it is not changed.
            seed: the run's seed.
            step: the number of the training step (of the micro-step, under gradient accumulation).
            first_row: the number of the first row, where this batch is one part of a larger one.
        """
        by_group = self.rates(routing.registry)
        rate = np.array([by_group[g] for g, _ in routing.registry.features] + [0.0])
        ids = routing.ids
        rows = np.arange(first_row, first_row + len(routing)).reshape(-1, *[1] * (ids.ndim - 1))
        words = rng.key("dropout", seed, step)
        # Padding draws too and is then kept: -1 points at the last rate, 0.
        keep = rng.uniform(words, rows, ids.astype(np.int64) + 1) >= rate[ids]
        active = ids >= 0
        keep &= active
        if self.keep_one and active.any():
            flat_active = active.reshape(len(routing), -1)
            lost = flat_active.any(axis=1) & ~keep.reshape(len(routing), -1).any(axis=1)
            if lost.any():
                keep = keep | self._revived(routing, lost, flat_active, seed, step, first_row)
        weights = routing.weights
        if self.rescale:
            kept = np.where(rate[ids] < 1.0, 1.0 - rate[ids], 1.0)
            weights = (weights / kept).astype(np.float32)
        return Routing(
            np.where(keep, ids, np.int32(-1)).astype(np.int32),
            np.where(keep, weights, 0.0).astype(np.float32),
            routing.registry,
        )

    @staticmethod
    def _revived(
        routing: Routing, lost: Any, flat_active: Any, seed: int, step: int, first_row: int
    ) -> Any:
        """For rows that lost everything: where the one feature stands that they keep."""
        revived = np.zeros(routing.ids.shape, dtype=bool)
        words = rng.key("dropout keep one", seed, step)
        draws = rng.uniform(words, np.arange(first_row, first_row + len(routing)))
        for row in np.flatnonzero(lost):
            choices = np.unique(routing.ids[row].ravel()[flat_active[row]])
            kept = choices[int(draws[row] * len(choices))]
            revived[row] = routing.ids[row] == kept
        return revived

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "p": self.p,
            "per_group": dict(self.per_group),
            "keep_one": self.keep_one,
            "rescale": self.rescale,
        }

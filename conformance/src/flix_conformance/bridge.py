"""Backends whose harness is of the first form, until they have primitives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import flix
from flix_conformance.harness import Array, Case, Feature, Pairs


@dataclass
class OldBackend:
    """A harness with a name, and with defaults for what it may leave out.

    Attributes:
        name: how it is called in the report.
        harness: the backend's.
    """

    name: str
    harness: Any
    dtypes: tuple[str, ...] = field(init=False)
    strategies: tuple[str, ...] = field(init=False)
    kinds: tuple[str, ...] = field(init=False)
    excluded: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        for attribute in ("dtypes", "strategies", "kinds"):
            setattr(self, attribute, tuple(getattr(self.harness, attribute)))
        self.forward = self.harness.forward
        self.gradients = self.harness.gradients
        self.train = self.harness.train
        self.merge = self.harness.merge
        self.initial = self.harness.initial
        self.save = self.harness.save
        self.load = self.harness.load

    def encode(
        self, config: flix.FlixConfig, rows: Sequence[Any], **options: Any
    ) -> tuple[Array, Array]:
        """(ids, weights) of a batch of rows; default: the registry's own encoding."""
        own = getattr(self.harness, "encode", None)
        if own is not None:
            ids, weights = own(config, rows, **options)
            return np.asarray(ids), np.asarray(weights)
        routing = config.registry.encode(rows, **{"unknown": config.unknown, **options})
        return routing.ids, routing.weights

    def dropout(
        self, config: flix.FlixConfig, ids: Array, weights: Array, **position: int
    ) -> tuple[Array, Array]:
        """(ids, weights) of a batch after ``config.feature_dropout``; default: the core's own."""
        own = getattr(self.harness, "dropout", None)
        if own is not None:
            ids, weights = own(config, ids, weights, **position)
            return np.asarray(ids), np.asarray(weights)
        assert config.feature_dropout is not None
        dropped = config.feature_dropout(
            flix.Routing(ids, weights, config.registry),
            seed=position["seed"],
            step=position["step"],
            first_row=position["first_row"],
        )
        return dropped.ids, dropped.weights

    def refuse(self, case: Case) -> Exception | None:
        """The error for malformed routing, or None if there was none; default: what ``forward`` raises.

        A backend gives its own where ``forward`` is compiled and its host-side entry point is what refuses.
        """
        try:
            getattr(self.harness, "refuse", self.forward)(case)
        except Exception as error:
            return error
        return None

    def lacks(self, methods: Sequence[str]) -> list[str]:
        """Those of some optional methods that the harness does not have."""
        return [name for name in methods if not callable(getattr(self.harness, name, None))]

    def adapted(self, case: Case) -> Any:
        """See :class:`Lifecycle`."""
        return self.harness.adapted(case)

    def state(self, model: Any) -> tuple[dict[Feature, int], Pairs]:
        """See :class:`Lifecycle`."""
        ids, pairs = self.harness.state(model)
        return dict(ids), dict(pairs)

    def _change(self, method: str, model: Any, *arguments: Any) -> Any:
        changed = getattr(self.harness, method)(model, *arguments)
        return model if changed is None else changed

    def add_feature(self, *arguments: Any) -> Any:
        return self._change("add_feature", *arguments)

    def remove_feature(self, *arguments: Any) -> Any:
        return self._change("remove_feature", *arguments)

    def rename_feature(self, *arguments: Any) -> Any:
        return self._change("rename_feature", *arguments)

    def load_features(self, *arguments: Any) -> Any:
        return self._change("load_features", *arguments)

    def save_features(self, *arguments: Any) -> Any:
        self.harness.save_features(*arguments)

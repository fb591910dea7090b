"""Weights of a new combination, found from examples, by their gradient or without (docs/specification.md §2.6)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from flix.backends.protocol import SupportsSearching
from flix.backends.verbs.shared import Shared
from flix.core.errors import ConfigError, shown
from flix.core.features.encoding import Row, Unknown
from flix.core.features.search import (
    BatchLoss,
    SearchedWeights,
    SearchSpace,
    Weights,
    descended,
    evolved,
)


class Searching(Shared):
    """What a model's features can serve without training."""

    def search_weights(
        self,
        model: Any,
        examples: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        row: Row,
        *,
        groups: Collection[str] | None = None,
        loss: BatchLoss | None = None,
        method: Literal["gradient", "evolution"] = "gradient",
        unknown: Unknown = "error",
        steps: int = 40,
        l1: float = 0.05,
        seed: int = 0,
    ) -> SearchedWeights:
        """Find the best weights of a model's features for a new combination, or for a new language.

        Only the weights are trained, and the model does not change::

            found = search_weights(model, batch, {"task": "ner"}, groups=["language"])
            routing = registry.encode([found.row] * 32)

        Args:
            model: an adapted model.
            examples: a batch as a mapping by name, or several; a few dozen rows, all of this combination. A torch
                model gets the whole batch; others get the entries that they have inputs for, and the rest is for the
                loss.
            row: what is known about it; the search starts there.
            groups: the groups whose features are all tried; default: all groups. Features that the row activates in
                other groups keep their weights.
            loss: ``loss(outputs, batch)``, the mean over a batch's rows; default: the outputs' ``loss``.
            method: ``"gradient"``, or ``"evolution"`` for losses without a gradient (for example, one minus the
                accuracy).
            unknown: as for ``encode``: ``"skip"`` for a row that names a language without a feature.
            steps: steps of the search, each with one forward and backward, or with 4 + 3 ln(n) forwards.
            l1: the price of the mean absolute weight.
            seed: the seed of the evolution.

        Raises:
            ConfigError: no examples, an unknown method, outputs without a loss, or a loss that is not finite.
            FeatureError, RoutingError: a row or groups that cannot be encoded.
            TargetError: the model is not adapted, or is a bank, which is never called.
        """
        config = self.config_of("search_weights", model)
        if method not in ("gradient", "evolution"):
            raise ConfigError(f"method must be 'gradient' or 'evolution', got {shown(method)}")
        batches = [examples] if isinstance(examples, Mapping) else list(examples)
        sizes = [_rows(batch) for batch in batches]
        space = SearchSpace(config.registry, row, groups, unknown)
        primitives = self.supporting(SupportsSearching, "search_weights")
        with primitives.asking(model, _loss_of if loss is None else loss) as ask:

            def mean(weights: Weights, sloped: bool) -> tuple[float, Weights]:
                total, slope = 0.0, np.zeros(len(weights))
                for batch, size in zip(batches, sizes, strict=True):
                    ids = np.repeat(space.ids[None], size, 0)
                    given = np.repeat(weights.astype(np.float32)[None], size, 0)
                    value, own = ask(batch, ids, given, sloped)
                    total += value * size / sum(sizes)
                    if own is not None:
                        slope += own.sum(0) * size / sum(sizes)
                return total, slope

            if method == "evolution":
                return evolved(lambda w: mean(w, False)[0], space, steps=steps, l1=l1, seed=seed)
            return descended(lambda w: mean(w, True), space, steps=steps, l1=l1)


def _rows(batch: Any) -> int:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"examples are batches of the model's inputs by name, got {shown(type(batch).__name__)}"
        )
    named = [key for key in ("flix_features", "flix_weights") if key in batch]
    if named:
        raise ConfigError(f"the search chooses the routing: leave {named[0]!r} out of the examples")
    size = next((len(value) for value in batch.values() if getattr(value, "ndim", 0)), 0)
    if not size:
        raise ConfigError("the examples hold no rows")
    return size


def _loss_of(outputs: Any, batch: Mapping[str, Any]) -> Any:
    del batch
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if found is None:
        raise ConfigError(
            f"the outputs ({type(outputs).__name__}) hold no loss: give loss=function(outputs, "
            f"batch), or, for a model that computes a loss, labels with the examples"
        )
    return found

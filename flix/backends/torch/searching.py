"""Weights of a new combination, found from examples, by their gradient or without (docs/specification.md §5.2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from flix.backends.torch.patches.models import state_of
from flix.core.errors import ConfigError, shown
from flix.core.features.encoding import Row, Unknown
from flix.core.features.search import SearchedWeights, SearchSpace, Weights, descended, evolved


def search_weights(
    model: nn.Module,
    examples: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    row: Row,
    *,
    groups: Collection[str] | None = None,
    loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
    method: Literal["gradient", "evolution"] = "gradient",
    unknown: Unknown = "error",
    steps: int = 40,
    l1: float = 0.05,
    seed: int = 0,
) -> SearchedWeights:
    """The weights with which a model's features serve a new combination, or a language without a feature, best.

    Nothing is trained but the weights, and the model is as before afterwards::

        found = search_weights(model, batch, {"task": "ner"}, groups=["language"])
        model(**batch, flix_features=registry.encode([found.row] * 32))

    Args:
        model: an adapted model.
        examples: a batch of the model's inputs, or several; some dozens of rows, all of the one combination.
        row: what is known of it; the search starts there.
        groups: the groups whose features are all tried, default all of them. What the row activates in other groups
            keeps its weight.
        loss: ``loss(outputs, batch)``, the mean over a batch's rows; default: the outputs' ``loss``.
        method: ``"gradient"``, or ``"evolution"`` for losses without a gradient (an accuracy's complement, say).
        unknown: as for ``encode``: ``"skip"`` for a row that names a language without a feature.
        steps: of the search; one forward and backward each, or 4 + 3 ln(n) forwards.
        l1: what the mean absolute weight costs.
        seed: of the evolution's draws.

    Raises:
        ConfigError: no examples, an unknown method, outputs without a loss, or a loss that is not finite.
        FeatureError, RoutingError: a row or groups that cannot be encoded.
        TargetError: the model is not adapted.
    """
    state = state_of("search_weights", model)
    if method not in ("gradient", "evolution"):
        raise ConfigError(f"method must be 'gradient' or 'evolution', got {shown(method)}")
    batches = [examples] if isinstance(examples, Mapping) else list(examples)
    sizes = [_rows(batch) for batch in batches]
    space = SearchSpace(state.config.registry, row, groups, unknown)
    training = {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.from_numpy(space.ids.astype(np.int64))

    def mean_loss(weights: Tensor) -> Tensor:
        total = weights.new_zeros(())
        for batch, size in zip(batches, sizes, strict=True):
            given = weights.to(torch.float32).expand(size, -1)
            outputs = model(**batch, flix_features=ids.expand(size, -1), flix_weights=given)
            value = _loss_of(outputs) if loss is None else loss(outputs, batch)
            total = total + value.to(total) * (size / sum(sizes))
        return total

    def asked(weights: Weights) -> float:
        with torch.no_grad():
            return float(mean_loss(torch.from_numpy(weights)))

    def sloped(weights: Weights) -> tuple[float, Weights]:
        point = torch.from_numpy(weights).requires_grad_(True)
        with torch.enable_grad():
            value = mean_loss(point)
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.numpy()

    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        if method == "evolution":
            return evolved(asked, space, steps=steps, l1=l1, seed=seed)
        return descended(sloped, space, steps=steps, l1=l1)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag


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


def _loss_of(outputs: Any) -> Tensor:
    value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"the outputs ({type(outputs).__name__}) hold no loss: give labels with the examples, or loss=function(outputs, batch)"
        )
    return value

"""The loss of a model's examples under weights, and its slope, for ``search_weights``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flix.core.errors import ConfigError
from flix.core.features.search import Ask, BatchLoss


@contextmanager
def asking(model: nn.Module, loss: BatchLoss) -> Iterator[Ask]:
    """See :class:`flix.backends.protocol.SupportsSearching`.

    Raises:
        ConfigError: sharded features outside of ``whole_features``: processes search for unequal times.
    """
    sharding: Any = model.flix_state.bank.sharding  # type: ignore[union-attr]
    if sharding is not None and sharding.kept is None:
        raise ConfigError(
            "the features are sharded: search under `with whole_features(model):`, which all processes enter, and each "
            "searches by itself"
        )
    training = {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]

    def ask(
        batch: Mapping[str, Any], ids: NDArray[Any], weights: NDArray[Any], sloped: bool
    ) -> tuple[float, NDArray[np.float64] | None]:
        point = torch.from_numpy(weights).requires_grad_(sloped)
        with torch.set_grad_enabled(sloped):
            outputs = model(**batch, flix_features=torch.from_numpy(ids), flix_weights=point)
            value = loss(outputs, batch)
        if not sloped:
            return float(value), None
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.double().numpy()

    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield ask
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag

"""The loss of a model's examples under weights, and its slope, for ``search_weights``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from flix.backends.keras.inputs import FEATURES, INPUTS, WEIGHTS, symbolic_inputs
from flix.backends.keras.static import hosts
from flix.core.features.search import Ask, BatchLoss


@contextmanager
def asking(model: Any, loss: BatchLoss) -> Iterator[Ask]:
    """See :class:`flix.backends.protocol.SupportsSearching`. Nothing is compiled."""
    struct = symbolic_inputs(model.base)
    names = struct if isinstance(struct, dict) else {INPUTS}

    def valued(weights: Any, batch: Mapping[str, Any], ids: Any) -> Any:
        own = {name: x for name, x in batch.items() if struct is None or name in names}
        return loss(model({**own, FEATURES: ids, WEIGHTS: weights}, training=False), batch)

    def ask(
        batch: Mapping[str, Any], ids: NDArray[Any], weights: NDArray[Any], sloped: bool
    ) -> tuple[float, NDArray[np.float64] | None]:
        given = keras.tree.map_structure(ops.convert_to_tensor, dict(batch))
        if not sloped:
            return float(valued(weights, given, ids)), None
        value, slope = hosts.slope(lambda point: valued(point, given, ids), weights)
        return float(value), np.asarray(ops.convert_to_numpy(slope), np.float64)

    yield ask

"""The engine of Keras's layers on TensorFlow (:class:`flix.backends.keras.engine.Engine`)."""

from __future__ import annotations

from collections.abc import Mapping

from flix.backends.tensorflow.inputs import (
    dense,
    grouped,
    known_broken,
    leading,
    length,
    rank,
    reads,
    shaped,
    spec,
    zeros,
)
from flix.backends.tensorflow.model import Extras, compiled, install, switch
from flix.backends.tensorflow.optimizers import RowOptimizer
from flix.backends.tensorflow.patches.captures import traced_function as frame
from flix.backends.tensorflow.patches.functions import tell_apart
from flix.backends.tensorflow.routing import (
    Kind,
    current,
    host_values,
    in_force,
    is_off,
    make_routing,
    route,
    sizes,
)
from flix.backends.tensorflow.searching import asking
from flix.backends.tensorflow.sums import routed_embedding, routed_linear

DEVICE = "tensorflow-cpu"
REFUSED: Mapping[str, str] = {}

__all__ = [
    "DEVICE", "REFUSED", "Extras", "Kind", "RowOptimizer", "asking", "compiled", "current", "dense", "frame", "grouped",
    "host_values", "in_force", "install", "is_off", "known_broken", "leading", "length", "make_routing", "rank", "reads",
    "route", "routed_embedding", "routed_linear", "shaped", "sizes", "spec", "switch", "tell_apart", "zeros",
]  # fmt: skip

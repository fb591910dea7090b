"""The classes of a model's layers.

What: a plain Dense, EinsumDense or Embedding gets the adapted class, in place, so that graphs, attributes and sharing
stay as they are; with it go attributes called ``flix_...``. When: as a layer becomes adapted. Undone: :func:`plain`
gives the layers their own classes back while a block runs; for good, ``merge`` gives a copy that never had others.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flix.backends.keras.layers import adaptable
from flix.core.errors import TargetError

_lock = threading.RLock()


def become(layer: Any, path: str) -> None:
    """Give a built plain layer its adapted class; it is to be described and attached next.

    Raises:
        TargetError: a layer that cannot be adapted.
    """
    target, reason = adaptable(layer)
    if target is None:
        raise TargetError(f"layer {path!r} cannot be adapted: {reason or type(layer).__name__}")
    layer.__class__ = target
    vars(layer).pop("quantize", None)  # the plain class's, which Keras puts on each layer
    # Keras keeps what it found out about the call's signature on the layer.
    layer._call_signature = inspect.signature(layer.call)
    names = list(layer._call_signature.parameters)
    layer.call_signature_parameters = names
    layer._call_has_training_arg = "training" in names
    layer._call_has_mask_arg = "mask" in names
    layer._call_has_context_arg = {arg: arg in names for arg in layer._call_context_args}


@contextmanager
def plain(layers: Iterable[Any]) -> Iterator[None]:
    """Inside, adapted layers have their plain classes, so that a model's configuration is the plain one's."""
    with _lock:
        held = [(layer, type(layer)) for layer in layers]
        for layer, cls in held:
            layer.__class__ = cls.flix_base
        try:
            yield
        finally:
            for layer, cls in held:
                layer.__class__ = cls

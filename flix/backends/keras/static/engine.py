"""The engine of Keras's layers on JAX and torch (:class:`flix.backends.keras.engine.Engine`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from flix.backends import messages
from flix.backends.keras.rows import RowOptimizer
from flix.backends.keras.static import hosts
from flix.backends.keras.static.hosts import JAX, changed, frame
from flix.backends.keras.static.routing import (
    ActiveRouting,
    current,
    host_values,
    in_force,
    is_off,
    make_routing,
    route,
    switch,
)
from flix.backends.keras.static.searching import asking
from flix.backends.keras.static.sums import known_broken, routed_embedding, routed_linear
from flix.core.errors import ConfigError, TargetError
from flix.core.features.routing import fits

DEVICE = "jax-cpu" if JAX else "torch-cpu"
REFUSED: Mapping[str, str] = {
    "fused": "the strategy 'fused' is compiled by TensorFlow; use 'auto', 'gather', 'masked' or "
    "'single', which JAX compiles together with the code around them"
}
if JAX:
    REFUSED = {
        **REFUSED,
        "remat": "keras.RematScope on JAX: adapted layers define their own gradients, which JAX "
        "cannot run again in a rematerialised function; leave it out, or rematerialise with "
        "flix.backends.jax",
    }


class Kind:
    """What calls are traced apart for: Keras's own functions alone, by the adapted model."""

    def __init__(self, state: Any) -> None:
        self.state = state


def _keeping(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with hosts.kept(self):
            return getattr(super(Extras, self), name)(*args, **kwargs)

    return functools.wraps(getattr(keras.Model, name))(call)


class Extras:
    """Mixed into the adapted model: a call that fails leaves its variables; what is TensorFlow's is refused by name."""

    fit = _keeping("fit")
    evaluate = _keeping("evaluate")
    predict = _keeping("predict")
    train_on_batch = _keeping("train_on_batch")
    test_on_batch = _keeping("test_on_batch")
    predict_on_batch = _keeping("predict_on_batch")

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            TargetError: always; a SavedModel is TensorFlow's.
        """
        raise TargetError(
            "export writes a SavedModel of TensorFlow's, with routing in its signature; save the model to a .keras file, "
            "open it with KERAS_BACKEND=tensorflow, and export it there. merge(model, row) gives "
            "a plain model, which Keras can export"
        )


def install(base: Any, state: Any) -> None:
    """Nothing is to be patched."""


def compiled(asked: Any) -> bool:
    """Whether ``compile(jit_compile=...)`` compiles: with JAX unless it is not wanted.

    Raises:
        ConfigError: it is asked for on torch.
    """
    if JAX:
        return True if asked == "auto" else bool(asked)
    if asked is True:
        raise ConfigError(
            "jit_compile=True on torch is torch.compile, which loses the routing of an adapted "
            "Keras model; "
            "leave it out, or adapt a torch model with flix.backends.torch, which it compiles"
        )
    return False


def dense(x: Any) -> Any:
    """A linear layer's input, made dense."""
    return ops.convert_to_tensor(x, sparse=False)


def rank(x: Any) -> int:
    """The number of dimensions."""
    return len(x.shape)


def length(x: Any) -> Any:
    """The second size of an input."""
    return x.shape[1]


def sizes(x: Any) -> list[int]:
    """The shape."""
    return list(x.shape)


def leading(x: Any, trailing: int) -> list[int]:
    """The sizes before the last ``trailing`` ones."""
    return list(x.shape[: len(x.shape) - trailing])


def grouped(
    x: Any, routing: ActiveRouting, trailing: int, lengths: Sequence[Any], name: str
) -> tuple[Any, tuple[Any, Any]]:
    """x, repeated where it has one row for all, and the rows N and the positions S a row that it holds.

    Raises:
        RoutingError: the leading dimensions are not the routing's.
    """
    lead, given = routing.lead, leading(x, trailing)
    ways = fits(given, lead, lengths)
    if not ways:
        raise messages.other_lead(name, given, lead)
    if "one" in ways:  # each row of the batch gets its own
        x = ops.repeat(x, lead[0], axis=0)
        given = leading(x, trailing)
    rows = math.prod(lead)
    return x, (rows, math.prod(given) // max(rows, 1))


def shaped(y: Any, like: Any) -> Any:
    """y in the shape of another tensor."""
    return ops.reshape(y, tuple(like.shape))


def reads(run: Callable[[], Any], kernels: Mapping[str, Any]) -> set[str]:
    """Which of some variables a call reads the values of, under what is in force."""

    def again() -> Any:
        with current.under(rerun=frame()):
            return run()

    return hosts.reads(again, kernels)


def spec(x: Any) -> Any:
    """An input's form for batches of any size."""
    shape = (None, *x.shape[1:]) if len(x.shape) else ()
    return keras.InputSpec(dtype=keras.backend.standardize_dtype(x.dtype), shape=shape)


def zeros(spec: Any) -> Any:
    """A batch of one row in such a form."""
    return np.zeros([1 if size is None else size for size in spec.shape], spec.dtype)


def tell_apart(layer: Any, kind: Any) -> None:
    """JAX compiles anew what this thread calls from now on."""
    changed()


__all__ = [
    "DEVICE", "REFUSED", "Extras", "Kind", "RowOptimizer", "asking", "compiled", "current", "dense", "frame", "grouped",
    "host_values", "in_force", "install", "is_off", "known_broken", "leading", "length", "make_routing", "rank", "reads",
    "route", "routed_embedding", "routed_linear", "shaped", "sizes", "spec", "switch", "tell_apart", "zeros",
]  # fmt: skip

"""No adapted layer that never acts (docs/specification.md §5.1.9): models that read a kernel and skip its layer.

While a routed model is called, its layers say that they ran, and that their kernels were asked for. A layer whose
kernel alone was asked for is looked into: the call is made once more, and shows whether it reads the kernel's values.
A look at a kernel's dtype or shape is none of these. Embeddings are not watched: who reads their table is mostly a
tied head, which keeps the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from keras import KerasTensor, tree

from flix.backends import messages
from flix.backends.keras.engine import engine


class Watch:
    """What a call does with the adapted layers of a model.

    Attributes:
        state: the model's.
        training: whether the model trains.
        read: paths of layers whose kernels were asked for.
    """

    def __init__(self, state: Any, training: bool) -> None:
        self.state, self.training = state, training
        self.read: set[str] = set()


_watch: ContextVar[Watch | None] = ContextVar("flix_watch", default=None)


class WatchedKernel:
    """Mixed in before a Keras layer's own class: its kernel says when it is asked for."""

    @property
    def kernel(self) -> Any:
        """The layer's own."""
        watch = _watch.get()
        if watch is not None and watch.state is self.flix_state:  # type: ignore[attr-defined]
            watch.read.add(self.flix_name)  # type: ignore[attr-defined]
        return super().kernel  # type: ignore[misc]


def ran(layer: Any) -> None:
    """Note that a layer runs."""
    watch = _watch.get()
    if watch is not None and watch.state is layer.flix_state:
        watch.state.acted.add((layer.flix_name, watch.training))


def run(model: Any, inputs: Any, training: Any, layers: Callable[[], Any]) -> Any:
    """The base's output under the routing in force, watched.

    Args:
        model: the adapted model.
        inputs: the base's.
        training: as the model was called.
        layers: gives the adapted layers with their paths.

    Raises:
        TargetError: adapted layers whose kernels the model uses without calling them.
    """
    symbolic = any(isinstance(x, KerasTensor) for x in tree.flatten(inputs))
    if symbolic or _watch.get() is not None:
        return model.base(inputs)
    # keras.RematScope has JAX trace it.
    watch = Watch(
        model.flix_state, training if isinstance(training, bool) else training is not None
    )
    token = _watch.set(watch)
    try:
        result = model.base(inputs)
    finally:
        _watch.reset(token)
    left = {name for name in watch.read if (name, watch.training) not in watch.state.acted}
    if left and (found := _used(model, inputs, {p: x for p, x in layers() if p in left})):
        raise messages.bypassed(found)
    return result


def _used(model: Any, inputs: Any, layers: dict[str, Any]) -> list[str]:
    """Which of some layers' kernels a call reads, by running or tracing it once more."""
    kernels = {path: layer._kernel for path, layer in layers.items()}
    with _losses_kept(model.base):
        read = engine.reads(lambda: model.base(inputs), kernels)
    return [path for path in layers if path in read]


@contextmanager
def _losses_kept(base: Any) -> Iterator[None]:
    """Inside, losses that layers add are forgotten."""
    held = [(layer, [*layer._losses]) for layer in base._flatten_layers()]
    try:
        yield
    finally:
        for layer, losses in held:
            layer._losses.clear()
            layer._losses.extend(losses)

"""What carries out the layers' sums and holds their routing, by the backend that Keras runs on.

TensorFlow has an engine of its own, whose shapes may be unknown and whose gradients are sparse
(:mod:`flix.backends.tensorflow.engine`). JAX and torch share one that is written in ``keras.ops`` alone
(:mod:`flix.backends.keras.static.engine`). Both are modules with the members of :class:`Engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

import keras

from flix.backends.forward import Forward
from flix.core.errors import ConfigError
from flix.core.features.registry import FeatureRegistry
from flix.core.features.search import Ask, BatchLoss

BACKEND: str = keras.backend.backend()
_MODULES = {
    "tensorflow": "flix.backends.tensorflow.engine",
    "jax": "flix.backends.keras.static.engine",
    "torch": "flix.backends.keras.static.engine",
}


class Engine(Protocol):
    """The members of an engine.

    Attributes:
        current: what is in force.
        DEVICE: the class of devices by which ``"auto"`` chooses a strategy.
        REFUSED: strategies that it does not have, and ``"remat"`` where that is none, each with the reason.
        Extras: mixed into the adapted model.
        Kind: gives what calls of a model with a state are traced apart for.
        RowOptimizer: what keeps absent features on an optimizer (:mod:`flix.backends.keras.rows`).
        route: see :func:`flix.backends.forward.by_hand`.
    """

    current: Forward
    DEVICE: str
    REFUSED: Mapping[str, str]
    Extras: type
    Kind: Any
    RowOptimizer: Any
    route: Any

    def install(self, base: Any, state: Any) -> None:
        """Patch what the engine needs patched, once and for a base that is being adapted."""

    def compiled(self, asked: Any) -> bool:
        """Whether ``compile(jit_compile=...)`` compiles; ``ConfigError`` where that would answer wrongly."""

    def make_routing(
        self,
        registry: FeatureRegistry,
        features: Any,
        weights: Any = None,
        *,
        batch: int | None = None,
        lengths: Sequence[Any] = (),
    ) -> Any:
        """Check routing and make it ready for a forward; ``RoutingError`` where it breaks a rule."""

    def host_values(self, what: str, value: Any) -> Any:
        """A value as a numpy array, or None if it is known only when a compiled function runs."""

    def in_force(self, name: str) -> Any:
        """The routing that a layer runs under; ``RoutingError`` where there is none, or a cache would keep it."""

    def is_off(self, state: Any, name: str) -> bool:
        """Whether a model is its base alone here."""

    def switch(self, state: Any, by: int) -> None:
        """Open a ``disable`` block (1), or close the last one (-1)."""

    def frame(self) -> Any:
        """The function that is being traced; None where values are computed."""

    def dense(self, x: Any) -> Any:
        """A linear layer's input, made dense."""

    def rank(self, x: Any) -> int | None:
        """The number of dimensions, if known."""

    def length(self, x: Any) -> Any:
        """The second size of an input: a number, or a scalar tensor."""

    def sizes(self, x: Any) -> list[Any]:
        """The shape: numbers where they are known, else scalar tensors."""

    def leading(self, x: Any, trailing: int) -> list[int | None]:
        """The sizes before the last ``trailing`` ones, as far as they are known."""

    def grouped(
        self, x: Any, routing: Any, trailing: int, lengths: Sequence[Any], name: str
    ) -> tuple[Any, tuple[Any, Any]]:
        """x, repeated where it has one row for all, and the rows N and the positions S a row that it holds."""

    def routed_linear(
        self, x: Any, base: Any, placed: Any, tables: Any, strategy: str, live: Any
    ) -> Any:
        """base ``[N, S, d_out]`` + Σ_slots scale · B_slot (A_slot x)."""

    def routed_embedding(
        self, tokens: Any, base: Any, placed: Any, tables: Any, strategy: str, live: Any
    ) -> Any:
        """base ``[N, S, d_out]`` + Σ_slots scale · B_slot A_slot[token]."""

    def shaped(self, y: Any, like: Any) -> Any:
        """y in the shape of another tensor."""

    def known_broken(self, y: Any) -> bool:
        """Whether values are known that are not finite."""

    def reads(self, run: Callable[[], Any], kernels: Mapping[str, Any]) -> Collection[str]:
        """Which of some variables a call reads the values of."""

    def asking(self, model: Any, loss: BatchLoss) -> AbstractContextManager[Ask]:
        """See :class:`flix.backends.protocol.SupportsSearching`."""

    def spec(self, x: Any) -> Any:
        """An input's form for batches of any size."""

    def zeros(self, spec: Any) -> Any:
        """A batch of one row in such a form."""

    def tell_apart(self, layer: Any, kind: Any) -> None:
        """Drop what a layer's own code has had compiled, and have it traced apart from now on."""


if BACKEND not in _MODULES:
    raise ConfigError(
        f"the Keras layers of flix run where Keras runs on tensorflow, jax or torch; it is configured for {BACKEND!r}. "
        "Set KERAS_BACKEND before Keras is imported"
    )
engine: Engine = import_module(_MODULES[BACKEND])  # type: ignore[assignment]

"""The seam between flix and a framework (docs/specification.md §5.1): what a backend provides.

A backend's entry point (group ``flix.backends``) names a module. Its attribute ``primitives``, a module or an object,
has every member of :class:`Backend`, and those of the ``Supports...`` protocols that its framework can offer. The verbs
that users call (``add_feature``, ``save``, ``merge``, ...) are :class:`flix.backends.verbs.Verbs` over them.
``flix.core`` and the verbs decide the rules that hold in every framework; a primitive executes and makes no
decisions.

A model is whatever the framework calls one: a torch module, a Keras model, an nnx module or a pair ``(config,
bank)``. A primitive that changes models in place returns the model that it was given. Values are numpy arrays: A
``[r, d_in]`` and B ``[d_out, r]``, whatever the framework's own kernels look like (``E`` experts: with E in front).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import LayerShape, Pair
from flix.core.adapter.base import Places
from flix.core.adapter.changes import Change
from flix.core.adapter.composition import Composition
from flix.core.adapter.described import Head
from flix.core.adapter.heads import Place
from flix.core.adapter.summary import Counts as Counts
from flix.core.config.config import FlixConfig
from flix.core.config.targets import LayerInfo
from flix.core.features.names import Feature
from flix.core.features.search import Ask, BatchLoss
from flix.core.peft.exporting import PeftFacts

M = TypeVar("M")
Pairs = Mapping[str, Mapping[Feature, Pair]]
"""Values by layer path and feature; features of rank 0 in a layer are left out."""
Values = Callable[[str, LayerShape], Mapping[Feature, Pair]]
"""The pairs that a layer starts with, by feature."""
Samples = Mapping[str, NDArray[Any]]
Updates = Callable[[str], NDArray[np.float64]]
"""A composition's update of a layer's kernel, ``[d_out, d_in]`` (``[E, d_out, d_in]``)."""


class Backend(Protocol):
    """What every backend provides."""

    # Models and their layers.

    def check_plain(self, model: Any) -> None:
        """Refuse models that cannot be adapted at all: not a model of the framework, not built, or already wrapped.
        The message of the TargetError says what to do. Adapted models are refused before this call."""

    def layers(self, model: Any) -> Sequence[LayerInfo] | None:
        """Every layer of a plain or adapted model, in the model's order, as the target rules see it.

        A layer that cannot be adapted says why; an adapted layer is reported as the plain layer that it was. None for
        an adapted model without kernels, which any layer may join: JAX's banks.
        """

    def attach(
        self, model: M, config: FlixConfig, paths: Sequence[str], strategy: str, values: Values
    ) -> M:
        """Adapt exactly these layers of a plain model, freeze the rest, and let its call take routing.

        Args:
            config: the configuration.
            paths: the layers.
            strategy: how their sums are computed.
            values: gives the pairs that each layer starts with, in float32. They stay in float32 whatever the
                kernels' dtype is, except float64, which pairs follow.

        Raises:
            TargetError: a layer that cannot be adapted.
            ConfigError: a strategy that cannot run here.
        """

    def adapted(self, model: Any) -> FlixConfig | None:
        """The configuration of an adapted model; None for anything else."""

    def shapes(self, model: Any) -> Mapping[str, LayerShape]:
        """Kind and sizes of each adapted layer, in the model's order."""

    # Values.

    def read(self, model: Any, features: Collection[Feature] | None = None) -> Pairs:
        """The pairs of some features (default: all) as arrays on the host, in the dtype in which they are kept.

        They may share memory with the model, so copy them before you keep or change them.
        """

    def write(self, model: M, pairs: Pairs) -> M:
        """Set pairs of existing features, with their ranks; values of others stay bit for bit."""

    def change(self, model: M, change: Change) -> M:
        """Give the model the configuration and the features of a change.

        Kept features keep their values, training state and whether they train, bit for bit, under their new names.
        New ones get the change's pairs, and train. Layers that become adapted use the strategy of the others.
        """

    # Training.

    def frozen(self, model: Any) -> Collection[Feature]:
        """The features that do not train."""

    def set_frozen(self, model: M, features: Collection[Feature]) -> M:
        """Freeze exactly these features, and let all others train."""

    def parameters(self, model: Any) -> Any:
        """Everything that trains, to pass to an optimizer, in the framework's own form."""

    def count(self, model: Any) -> Counts:
        """How many values the model has outside its pairs."""

    # Uses.

    def switch(self, model: Any, by: int) -> None:
        """Open a :func:`disable` context (1) in this thread or asyncio task, or close one (-1).

        While any is open there, the model is its base: no feature acts, and routing is neither needed nor read, not
        even the explicit routing of a call.

        Raises:
            TargetError: a model that is never called, such as a bank.
        """

    def merged(self, model: M, active: Composition, update: Updates) -> M:
        """A plain copy of the model with an update added to each adapted layer's kernel; the model stays as it is.

        Args:
            active: the composition, for messages of the copy.
            update: what to add to a layer's kernel; sum in float64 before rounding to the kernel's dtype.
        """


class SupportsHeads(Protocol):
    """Parameters of the base that are trained belong to the adapter (:mod:`flix.core.adapter.heads`)."""

    def head_places(self, model: Any) -> Mapping[str, Place]:
        """The base's parameters by all their names; ``kernel_of`` names layers that are or can be adapted."""

    def heads(self, model: Any, names: Collection[str] | None = None) -> Mapping[str, Head]:
        """Values of these parameters (default: heads, and those that train) on the host; they become heads."""

    def put_heads(self, model: M, heads: Mapping[str, Head]) -> M:
        """Give parameters these values, in the model's own dtypes, and let them train."""


class SupportsBase(Protocol):
    """The base that an adapter is trained on can be identified (:mod:`flix.core.adapter.base`)."""

    def base_name(self, model: Any) -> tuple[str | None, str | None]:
        """What the framework knows about the base's origin: its name or folder, and its revision."""

    def kernel_samples(self, model: Any, places: Mapping[str, Places]) -> Samples | None:
        """Values of the base's kernels ``[d_out, d_in]``, nothing folded in; None if one is unreadable."""


class SupportsDropout(Protocol):
    """Linear layers hide entries of their input from the features in training (docs/specification.md §1.8)."""

    def undropped(self, layers: Mapping[str, LayerShape]) -> Collection[str]:
        """Those of some layers that cannot do this."""


class SupportsFolding(Protocol):
    """A composition can be folded into the model's own kernels, and removed again bit for bit."""

    def fold(self, model: Any, row: Mapping[str, Any], update: Updates) -> None:
        """Add an update to each adapted layer's kernel; the model then takes no routing."""

    def folded(self, model: Any) -> Mapping[str, Any] | None:
        """The row that is folded in, or None."""

    def unfold(self, model: Any) -> None:
        """Restore every kernel's own bits."""


class SupportsDequantizing(Protocol):
    """Layers whose kernels are quantised are adapted, and can become plain ones."""

    def dequantized(self, model: M, active: Composition, update: Updates) -> M:
        """As ``merged``, with plain layers in place of quantised ones."""


class SupportsSearching(Protocol):
    """The loss of examples, and its gradient, can be computed (:mod:`flix.backends.verbs.searching`)."""

    def asking(self, model: Any, loss: BatchLoss) -> AbstractContextManager[Ask]:
        """A context that gives the function; inside, the model is in evaluation mode, and afterwards as before."""


class SupportsProcesses(Protocol):
    """Several processes can hold one model's values together."""

    def writing(self, model: Any) -> AbstractContextManager[bool]:
        """Whether this process writes the model's files; at the end of the context, all know the outcome."""


class SupportsPeft(Protocol):
    """Layers have the names that PEFT uses, so that a composition can be exported as a LoRA."""

    def peft_facts(self, model: Any) -> PeftFacts:
        """What the files say about the model."""


def members(protocol: type) -> tuple[str, ...]:
    """The names that a protocol asks for."""
    return tuple(name for name in vars(protocol) if not name.startswith("_"))


def lacking(primitives: Any, protocol: type = Backend) -> tuple[str, ...]:
    """Those of a protocol's members that some primitives do not have."""
    return tuple(n for n in members(protocol) if not callable(getattr(primitives, n, None)))

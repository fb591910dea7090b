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
    """What every backend gives."""

    # Models and their layers.

    def check_plain(self, model: Any) -> None:
        """Refuse what cannot be adapted as a whole: no model of the framework, not built, wrapped already. The message
        of the TargetError names the way out. An adapted model is refused before it comes here."""

    def layers(self, model: Any) -> Sequence[LayerInfo] | None:
        """Every layer of a plain or adapted model, in the model's order, as the target rules see it.

        A layer that cannot be adapted says why; one that is adapted is reported as what it was. None for an adapted
        model that holds no kernels, and which any layer may join: JAX's banks.
        """

    def attach(
        self, model: M, config: FlixConfig, paths: Sequence[str], strategy: str, values: Values
    ) -> M:
        """Adapt exactly these layers of a plain model, freeze the rest, and let its call take routing.

        Args:
            config: the configuration.
            paths: the layers.
            strategy: how their sums are computed.
            values: gives the pairs that each of them starts with, in float32. They are kept so, whatever the kernels
                are in; in float64 where kernels are.

        Raises:
            TargetError: a layer that cannot be adapted.
            ConfigError: a strategy that cannot run here.
        """

    def adapted(self, model: Any) -> FlixConfig | None:
        """An adapted model's configuration; None for whatever is not an adapted model."""

    def shapes(self, model: Any) -> Mapping[str, LayerShape]:
        """Kind and sizes of each adapted layer, in the model's order."""

    # Values.

    def read(self, model: Any, features: Collection[Feature] | None = None) -> Pairs:
        """The pairs of some features, by default of all, as arrays on the host in the dtype that they are kept in.

        They may share memory with the model: whoever keeps or changes them copies them first.
        """

    def write(self, model: M, pairs: Pairs) -> M:
        """Set pairs of features that the model has, in their ranks; values of others stay bit for bit."""

    def change(self, model: M, change: Change) -> M:
        """Give the model the configuration and the features that a change says.

        Kept features keep values, training state and whether they train, bit for bit, under their new names; arriving
        ones get the change's pairs and train. Layers that become adapted run by the strategy of the others.
        """

    # Training.

    def frozen(self, model: Any) -> Collection[Feature]:
        """The features that do not train."""

    def set_frozen(self, model: M, features: Collection[Feature]) -> M:
        """Let exactly these features train no more, and all others train."""

    def parameters(self, model: Any) -> Any:
        """What an optimizer is to get, in the framework's own form: all that trains."""

    def count(self, model: Any) -> Counts:
        """How many values the model has beside its pairs."""

    # Uses.

    def switch(self, model: Any, by: int) -> None:
        """Open a :func:`disable` context (1) in this thread or asyncio task, or close one (-1).

        While any is open there, the model is its base: no feature acts, and no routing is needed or looked at, explicit
        routing of a call included.

        Raises:
            TargetError: a model that is never called, such as a bank.
        """

    def merged(self, model: M, active: Composition, update: Updates) -> M:
        """A plain copy of the model with an update added to each adapted layer's kernel; the model stays as it is.

        Args:
            active: the composition, for messages of the copy.
            update: what is added to a layer's kernel, summed in float64 before it is rounded to the kernel's dtype.
        """


class SupportsHeads(Protocol):
    """Parameters of the base that are trained go with the adapter (:mod:`flix.core.adapter.heads`)."""

    def head_places(self, model: Any) -> Mapping[str, Place]:
        """The base's parameters by all their names; ``kernel_of`` names layers that are adapted or may be."""

    def heads(self, model: Any, names: Collection[str] | None = None) -> Mapping[str, Head]:
        """Values of these parameters (default: heads, and those that train) on the host; they are heads from now on."""

    def put_heads(self, model: M, heads: Mapping[str, Head]) -> M:
        """Give parameters these values, in the dtypes that the model has them in, and let them train."""


class SupportsBase(Protocol):
    """The base that an adapter is trained on can be told (:mod:`flix.core.adapter.base`)."""

    def base_name(self, model: Any) -> tuple[str | None, str | None]:
        """What the framework knows of where the base came from: its name or folder, and its revision."""

    def kernel_samples(self, model: Any, places: Mapping[str, Places]) -> Samples | None:
        """Values of the base's own kernels ``[d_out, d_in]``, whatever is folded in; None where one cannot be read."""


class SupportsDropout(Protocol):
    """Linear layers hide entries of their input from the features in training (docs/specification.md §1.8)."""

    def undropped(self, layers: Mapping[str, LayerShape]) -> Collection[str]:
        """Those of some layers in which that cannot be done."""


class SupportsFolding(Protocol):
    """A composition can be folded into the kernels of the model itself, and taken out again bit for bit."""

    def fold(self, model: Any, row: Mapping[str, Any], update: Updates) -> None:
        """Add an update to each adapted layer's kernel; the model then takes no routing."""

    def folded(self, model: Any) -> Mapping[str, Any] | None:
        """The row that is folded in, or None."""

    def unfold(self, model: Any) -> None:
        """Give every kernel its own bits back."""


class SupportsDequantizing(Protocol):
    """Layers whose kernels are quantised are adapted, and can become plain ones."""

    def dequantized(self, model: M, active: Composition, update: Updates) -> M:
        """As ``merged``, with plain layers in the place of quantised ones."""


class SupportsSearching(Protocol):
    """The loss of examples under weights can be asked, and its slope (:mod:`flix.backends.verbs.searching`)."""

    def asking(self, model: Any, loss: BatchLoss) -> AbstractContextManager[Ask]:
        """A way to ask, for which the model is evaluated; afterwards it is as before."""


class SupportsProcesses(Protocol):
    """Several processes can hold one model's values together."""

    def writing(self, model: Any) -> AbstractContextManager[bool]:
        """Whether this process is the one that writes the model's files; leaving it, all know how it went."""


class SupportsPeft(Protocol):
    """Layers are named as PEFT names them, so that a composition can be exported as a LoRA."""

    def peft_facts(self, model: Any) -> PeftFacts:
        """What the files say of the model."""


def members(protocol: type) -> tuple[str, ...]:
    """The names that a protocol asks for."""
    return tuple(name for name in vars(protocol) if not name.startswith("_"))


def lacking(primitives: Any, protocol: type = Backend) -> tuple[str, ...]:
    """Those of a protocol's members that some primitives do not have."""
    return tuple(n for n in members(protocol) if not callable(getattr(primitives, n, None)))

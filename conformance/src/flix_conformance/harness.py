"""What the kit asks of a backend: numpy in, numpy out, so that any framework fits.

A backend's entry point (group ``flix.backends``) names a module. The kit calls ``harness()`` in its submodule
``conformance``, or in the module itself, and expects an object with the attributes and methods of :class:`Harness`.
Nothing has to be subclassed, and a backend need not import the kit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import flix

Array = NDArray[Any]
Feature = tuple[str, str]
Pairs = dict[Feature, tuple[Array, Array]]
"""A_f ``[r, d_in]`` and B_f ``[d_out, r]`` by feature; features of rank 0 are left out."""


@dataclass(frozen=True, eq=False)
class Case:
    """One adapted layer, the batch that it gets, and how it is to compute.

    Attributes:
        config: the configuration; its only target is ``path``.
        path: the layer's path in a model that has no other layer.
        kind: ``"linear"`` or ``"embedding"``.
        kernel: W0 ``[d_in, d_out]``, or an embedding's table ``[vocabulary, d_out]``.
        bias: ``[d_out]``, or None.
        pairs: the features' values.
        x: ``[B, ..., d_in]``, or an embedding's tokens ``[B, ...]``, int32.
        ids: int32 ``[B, W]`` or ``[B, T, W]``.
        weights: float32 in the shape of ids, or None for 1.
        dtype: what kernel, bias and x are to be in; they hold only values that it has.
        strategy: how the sum is to be computed: one of the harness's.
        model: a model that the harness's ``adapted`` made, perhaps changed since, to be used in place of a new one; its
            features then count instead of ``config`` and ``pairs``. None in harnesses without ``adapted``.
    """

    config: flix.FlixConfig
    path: str
    kind: str
    kernel: Array
    bias: Array | None
    pairs: Pairs
    x: Array
    ids: Array
    weights: Array | None
    dtype: str
    strategy: str
    model: Any = None

    @property
    def registry(self) -> flix.FeatureRegistry:
        """The features."""
        return self.config.registry

    @property
    def d_in(self) -> int:
        """Input size; of an embedding, the vocabulary's."""
        return int(self.kernel.shape[0])

    @property
    def d_out(self) -> int:
        """Output size."""
        return int(self.kernel.shape[1])

    def but(self, **changes: Any) -> Case:
        """The same case with some attributes changed."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        ranks = {":".join(f): a.shape[0] for f, (a, _) in self.pairs.items()}
        weights = "None" if self.weights is None else np.array2string(self.weights, threshold=60)
        return (
            f"{self.kind} {self.d_in} -> {self.d_out}, {self.dtype}, strategy {self.strategy!r}, "
            f"x {list(self.x.shape)}, bias {self.bias is not None}, scaling {self.config.scaling!r}, "
            f"alpha {self.config.alpha}, ranks {ranks} of {len(self.registry)} features,\n"
            f"ids {np.array2string(self.ids, threshold=60)}\nweights {weights}"
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """One training step: the loss is Σ (y - target)² / (2 B), summed over everything but divided by B only.

    Attributes:
        x, ids, weights: as in :class:`Case`.
        target: in the shape of the output.
    """

    x: Array
    ids: Array
    weights: Array | None
    target: Array


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay, p <- p - lr (m̂ / (√v̂ + eps) + decay p), with a step count for each feature."""

    lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.1


class Harness(Protocol):
    """What a backend shows the kit. ``encode``, ``dropout`` and ``refuse`` are optional, see :class:`Backend`, and so
    is what a feature's life takes, see :class:`Lifecycle`.

    Attributes:
        dtypes: of ``"float32"``, ``"bfloat16"``, ``"float64"``, those that it computes in.
        strategies: names of ways to compute the same sum, ``"auto"`` among them.
        kinds: ``("linear",)`` or ``("linear", "embedding")``.
    """

    dtypes: Sequence[str]
    strategies: Sequence[str]
    kinds: Sequence[str]

    def forward(self, case: Case) -> tuple[Array, str]:
        """The output ``[B, ..., d_out]`` as any numpy floats, and the name of the dtype that it came in."""

    def gradients(self, case: Case, dy: Array) -> Mapping[str, Any]:
        """Gradients of Σ y · dy: ``x`` (None for tokens), ``weights`` (None without weights), ``pairs`` (features
        absent from the batch may be left out), ``base`` (of the kernel; None where it gets none)."""

    def train(self, case: Case, batches: Sequence[Batch], optimizer: AdamW) -> Mapping[str, Any]:
        """Train as a user would: ``pairs``, a list of the values after each step, and ``base``, the last kernel."""

    def merge(self, case: Case, row: Mapping[str, Any]) -> Array:
        """The kernel ``[d_in, d_out]`` with one composition folded in."""

    def initial(self, case: Case) -> Pairs:
        """The pairs of a newly adapted layer."""

    def save(self, case: Case, folder: Path) -> None:
        """Write the adapter of a model with the case's pairs."""

    def load(self, case: Case, folder: Path) -> Pairs:
        """Read an adapter into a plain model with the case's layer; the case's own pairs play no part."""


class Lifecycle(Protocol):
    """What a harness may have beyond :class:`Harness`. Checks that need what it lacks are not run; the report says so.

    A model is whatever ``adapted`` returns; the kit hands it back, here or as a case's ``model``. Methods that change
    one do so in place, or return the changed one.
    """

    def adapted(self, case: Case) -> Any:
        """An adapted model with the case's pairs."""

    def state(self, model: Any) -> tuple[Mapping[Feature, int], Pairs]:
        """The ids of the features that rows may name, and the pairs."""

    def add_feature(
        self, model: Any, group: str, name: str, rank: int, init_from: Sequence[str]
    ) -> Any:
        """Add a feature, with fresh values or from some of its group (``init_from``); the others train no more."""

    def remove_feature(self, model: Any, group: str, name: str) -> Any:
        """Remove a feature."""

    def rename_feature(self, model: Any, group: str, name: str, new: str) -> Any:
        """Give a feature another name."""

    def save_features(self, model: Any, folder: Path, features: Sequence[Feature]) -> None:
        """Write some of a model's features as an adapter's folder."""

    def load_features(self, model: Any, folder: Path) -> Any:
        """Take all features of an adapter's folder into a model that has others."""


@dataclass
class Backend:
    """A harness with a name, and with defaults for what it may leave out.

    Attributes:
        name: how it is called in the report.
        harness: the backend's.
    """

    name: str
    harness: Any
    dtypes: tuple[str, ...] = field(init=False)
    strategies: tuple[str, ...] = field(init=False)
    kinds: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        for attribute in ("dtypes", "strategies", "kinds"):
            setattr(self, attribute, tuple(getattr(self.harness, attribute)))
        self.forward = self.harness.forward
        self.gradients = self.harness.gradients
        self.train = self.harness.train
        self.merge = self.harness.merge
        self.initial = self.harness.initial
        self.save = self.harness.save
        self.load = self.harness.load

    def encode(
        self, config: flix.FlixConfig, rows: Sequence[Any], **options: Any
    ) -> tuple[Array, Array]:
        """(ids, weights) of a batch of rows; default: the registry's own encoding."""
        own = getattr(self.harness, "encode", None)
        if own is not None:
            ids, weights = own(config, rows, **options)
            return np.asarray(ids), np.asarray(weights)
        routing = config.registry.encode(rows, **{"unknown": config.unknown, **options})
        return routing.ids, routing.weights

    def dropout(
        self, config: flix.FlixConfig, ids: Array, weights: Array, **position: int
    ) -> tuple[Array, Array]:
        """(ids, weights) of a batch after ``config.feature_dropout``; default: the core's own."""
        own = getattr(self.harness, "dropout", None)
        if own is not None:
            ids, weights = own(config, ids, weights, **position)
            return np.asarray(ids), np.asarray(weights)
        assert config.feature_dropout is not None
        dropped = config.feature_dropout(
            flix.Routing(ids, weights, config.registry),
            seed=position["seed"],
            step=position["step"],
            first_row=position["first_row"],
        )
        return dropped.ids, dropped.weights

    def refuse(self, case: Case) -> Exception | None:
        """The error for malformed routing, or None if there was none; default: what ``forward`` raises.

        A backend gives its own where ``forward`` is compiled and its host-side entry point is what refuses.
        """
        try:
            getattr(self.harness, "refuse", self.forward)(case)
        except Exception as error:
            return error
        return None

    def lacks(self, methods: Sequence[str]) -> list[str]:
        """Those of some optional methods that the harness does not have."""
        return [name for name in methods if not callable(getattr(self.harness, name, None))]

    def adapted(self, case: Case) -> Any:
        """See :class:`Lifecycle`."""
        return self.harness.adapted(case)

    def state(self, model: Any) -> tuple[dict[Feature, int], Pairs]:
        """See :class:`Lifecycle`."""
        ids, pairs = self.harness.state(model)
        return dict(ids), dict(pairs)

    def change(self, method: str, model: Any, *arguments: Any) -> Any:
        """The model after one of the methods that change it."""
        changed = getattr(self.harness, method)(model, *arguments)
        return model if changed is None else changed

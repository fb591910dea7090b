"""What the kit asks of a backend beside its primitives and verbs: numpy in, numpy out, so that any framework fits.

A backend's entry point (group ``flix.backends``) names a module with ``primitives`` and the verbs made of them. Through
these the kit adapts, changes, saves, loads and merges as a user does. What they cannot do is to make a plain model, to
call it, to differentiate and to train: that is :class:`Harness`. The kit calls ``harness()`` in the module's submodule
``conformance``, or in the module itself. Nothing has to be subclassed, and a backend need not import the kit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import flix
from flix_conformance.table import Feature, Table, written

Array = NDArray[Any]
Pairs = dict[Feature, tuple[Array, Array]]
"""A_f ``[r, d_in]`` and B_f ``[d_out, r]`` by feature; features of rank 0 are left out."""


@dataclass(frozen=True, eq=False)
class Case:
    """One adapted layer, the batch that it gets, and how it is to compute.

    Attributes:
        config: the configuration; its only target is ``path``.
        table: what the kit itself knows of the features.
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
        model: an adapted model, perhaps changed since, to be used in place of a new one; ``config`` then is
            that which it began with.
        form: see :class:`Layer`.
    """

    config: flix.FlixConfig
    table: Table
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
    form: str = ""

    @property
    def d_in(self) -> int:
        """Input size; of an embedding, the vocabulary's."""
        return int(self.kernel.shape[0])

    @property
    def d_out(self) -> int:
        """Output size."""
        return int(self.kernel.shape[1])

    @property
    def layer(self) -> Layer:
        """The plain layer."""
        return Layer(self.path, self.kind, self.kernel, self.bias, self.dtype, self.form)

    @property
    def batch(self) -> Batch:
        """What the layer gets."""
        return Batch(self.x, self.ids, self.weights, self.dtype)

    def but(self, **changes: Any) -> Case:
        """The same case with some attributes changed."""
        return replace(self, **changes)

    def for_any_rows(self) -> Case:
        """The same case, in a strategy that takes rows that differ."""
        return self.but(strategy="auto") if self.strategy == "single" else self

    def __repr__(self) -> str:
        ranks = {written(f): a.shape[0] for f, (a, _) in self.pairs.items()}
        weights = "None" if self.weights is None else np.array2string(self.weights, threshold=60)
        return (
            f"{self.kind} {self.d_in} -> {self.d_out}, {self.dtype}, strategy {self.strategy!r}, "
            f"x {list(self.x.shape)}, bias {self.bias is not None}, scaling {self.table.scaling!r}, "
            f"alpha {self.table.alpha} {dict(self.table.alphas)}, ranks {ranks} of {len(self.table)} features,\n"
            f"ids {np.array2string(self.ids, threshold=60)}\nweights {weights}"
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """A plain layer.

    Attributes:
        path: its path in the model; a name without dots, unless the harness is ``nested``.
        kind: ``"linear"`` or ``"embedding"``.
        kernel: ``[d_in, d_out]``, or an embedding's table ``[vocabulary, d_out]``.
        bias: ``[d_out]``, or None.
        dtype: what kernel and bias are to be in; they hold only values that it has.
        form: which of the framework's layers it is to be, of the harness's ``forms``; empty for the plainest one.
    """

    path: str
    kind: str
    kernel: Array
    bias: Array | None = None
    dtype: str = "float32"
    form: str = ""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model gets in one call.

    Attributes:
        x, ids, weights: as in :class:`Case`; without ids and weights, a call without routing.
        dtype: what x is to be in, if it is not tokens.
        target: in the shape of the output, for a training step. The loss is Σ (y - target)² / (2 B), summed over
            everything but divided by B only.
    """

    x: Array
    ids: Any = None
    weights: Array | None = None
    dtype: str = "float32"
    target: Any = None


@dataclass(frozen=True, eq=False)
class Stack:
    """A model of several layers, one after another, and the batch that it gets.

    Attributes:
        layers: its layers, all linear and of one size.
        config: the configuration; its targets are some of the layers.
        pairs: the features' values in each of them, by path.
        batch: the batch, whose x and ids have two dimensions.
        strategy: how the sums are to be computed.
    """

    layers: tuple[Layer, ...]
    config: flix.FlixConfig
    pairs: Mapping[str, Pairs]
    batch: Batch
    strategy: str = "auto"


@dataclass(frozen=True, eq=False)
class Experts:
    """A plain mixture of experts, ``y = Σ_j share_j (silu(x G_e) * (x U_e)) D_e`` over the experts e that x is sent to.

    Where a position is sent depends on nothing but its place: position p of a batch, counted row by row, goes to the
    experts ``sent[p % P]``, each with its share ``share[p % P]``.

    Attributes:
        path: its path in the model, a name without dots.
        up: G and U, the one beside the other, of E experts: ``[E, d, 2 h]``.
        down: D, ``[E, h, d]``.
        sent: int64 ``[P, k]``, distinct in a row.
        share: float32 ``[P, k]``.
        dtype: what up and down are to be in; they hold only values that it has.
    """

    path: str
    up: Array
    down: Array
    sent: Array
    share: Array
    dtype: str = "float32"


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay, p <- p - lr (m̂ / (√v̂ + eps) + decay p), with a step count for each feature."""

    lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.1


class Harness(Protocol):
    """What a backend shows the kit. A model is whatever :meth:`plain` and the verbs return.

    Optional, where a backend has its own in place of the core's, or cannot do otherwise:

    - ``encode(config, rows, *, unknown, width, group_weights)`` gives ids and weights, and
      ``dropout(config, ids, weights, *, seed, step, first_row)`` ids and weights after feature dropout;
    - ``refuse(model, batch)`` raises for malformed routing, where ``call`` is compiled and cannot;
    - ``within(dtype)``, a context in which the framework computes in this dtype (JAX has no float64 outside of one);
    - ``excluded``, pairs ``(strategy, dtype)`` that do not exist, of those below;
    - ``id_dtypes``, the dtypes that ids may come in, ``("int32", "int64")`` if it is not there;
    - ``evaluated(model, batch)``, as ``call``, in evaluation mode where models have one, and ``call`` in training mode;
    - ``compiled_forward(model)``, a function of a :class:`Batch`, compiled once, that gives what ``call`` gives;
    - ``fit(model, batches, settings)``, which trains as ``trainer`` does, batch by batch, by a loop of the framework's
      own, or with what users combine: compiled steps, checkpointing, accumulated gradients;
    - ``ways()``, by name the other ways that users have to call a model (its copies, the framework's own files and
      transforms, layers by hand), functions of a model and a :class:`Batch` that give what ``call`` gives; and
      ``loops()``, by name the other ways to train one, with the arguments of ``fit``;
    - ``absent``, abilities that the backend does not have: ``"gradients"`` (``gradients`` then need not be there),
      ``"training"`` (nor ``trainer``), ``"merge"``, ``"files"``, ``"changes"`` of features. Whatever else is not there
      may raise NotImplementedError;
    - ``nested``, True where ``plain`` takes paths with dots, as modules inside of modules (layers of one module follow
      each other), and ``trainer`` models of several layers;
    - ``forms``, names of other layers of the framework that are linear maps: kernels that stand the other way, or have
      several axes. A :class:`Layer` of such a ``form`` has even sizes, each of which may be two axes. Its kernel
      ``[d_in, d_out]`` is what docs/specification.md §1.1 makes of the framework's own; the model takes and gives
      flat x and y, as with any layer;
    - ``experts(experts, x)``, a plain model of one mixture of :class:`Experts`, and the paths that the verbs know its
      two kernels by, up and down. The other methods take it as any model; but ``pairs`` of ``gradients`` then are by
      path, each by feature, ``[E, r, d_in]`` and ``[E, d_out, r]``, and ``kernel`` gives ``[E, d_in, d_out]``;
    - ``search(model, batch, row, *, groups, method, l1, steps)``, the backend's ``search_weights`` with a batch without
      routing; the loss is that of :class:`Batch`'s target, and what it gives has ``row``, ``loss`` and ``before``;
    - ``largest(model, batch, dy)``, the bytes of the largest array that a call and its gradients make, or of all that
      they hold at once, where the framework can tell;
    - ``unfreeze(model, path)`` lets a layer of the base train, as a user does with a head, where that can be done.

    Attributes:
        dtypes: of ``"float32"``, ``"bfloat16"``, ``"float64"``, those that a layer can be in; ``"float32"``, in which
            training, changes and files are checked, is always among them.
        strategies: names of ways to compute the same sum, ``"auto"`` among them.
        kinds: ``("linear",)`` or ``("linear", "embedding")``.
    """

    dtypes: Sequence[str]
    strategies: Sequence[str]
    kinds: Sequence[str]

    def plain(self, layers: Sequence[Layer], x: Array) -> Any:
        """A plain model of these layers, one after another, each at its path.

        Args:
            layers: the layers; the first may be an embedding.
            x: an input like those that it will get, for frameworks that must know its shape.
        """

    def call(self, model: Any, batch: Batch, path: str | None = None) -> tuple[Array, str]:
        """The output ``[B, ..., d_out]`` as any numpy floats, and the name of the dtype that it came in.

        Args:
            model: a plain or adapted model.
            batch: what it gets; without ids and weights, nothing but x.
            path: call this adapted layer of the model by hand instead, with the same routing.
        """

    def gradients(self, model: Any, batch: Batch, dy: Array) -> Mapping[str, Any]:
        """Gradients of Σ y · dy in an adapted model of one layer: ``x`` (None for tokens), ``weights`` (None without
        weights), ``pairs`` by feature (absent ones may be left out), ``base`` (of the kernel; None where it gets none).
        """

    def trainer(self, model: Any, settings: AdamW) -> Callable[[Batch], Any]:
        """A function that trains an adapted model of one layer by one step, as a user would.

        The optimizer is AdamW with these settings, the loss that of :class:`Batch`'s target. A batch without routing is
        refused. Where verbs change models in place, steps go on after a feature was renamed, frozen or thawed, with the
        optimizer's state; after one was removed, they do so or are refused.
        """

    def kernel(self, model: Any, path: str) -> Array:
        """A layer's kernel ``[d_in, d_out]``, in a plain or adapted model."""

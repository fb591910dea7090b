"""The routing of the forward that is running, per thread.

A model's forward keyword puts it here, the adapted layers read it. A thread-local since compilers trace it, and enough,
since no forward is left for another task; what ``routed`` and ``disable`` hold open lies in ``scopes``. Recomputation
under activation checkpointing re-enters it (see ``patches.checkpoint``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flix.backends.torch.kernels.tables import upload
from flix.backends.torch.media import Media
from flix.backends.torch.parameters import Bank, InForce, whole
from flix.backends.torch.placing import Placed
from flix.backends.torch.tokens import Compositions, Token, compositions
from flix.core.config.layout import LayerLayout
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import as_array, check_routing, unpacked
from flix.core.strategy.union import first_unlike, plan_union

if TYPE_CHECKING:
    from flix.backends.torch.state import FlixState


class Base:
    """What stands for a routing where the base alone is to answer: it was said so."""


BASE = Base()


def transforming() -> bool:
    """Whether one of torch.func's transforms (``grad``, ``vmap``, ``jvp``) runs: tensors may have no values to read."""
    return torch._C._are_functorch_transforms_active()  # no public function asks this


def tracing() -> bool:
    """Whether ids stay tensors whose values nothing may depend on."""
    return torch.compiler.is_compiling() or transforming()


class _Current(threading.local):
    """This thread's state.

    Attributes:
        routing: the routing of the forward that is running, :data:`BASE` for the base alone; None outside of any.
    """

    routing: AnyRouting | Base | None

    def __init__(self) -> None:
        # Set on the instance from the start: compiled code guards on the attribute's place.
        self.routing = None


current = _Current()


class ActiveRouting:
    """Checked routing of one forward, with what its layers need of it, made once for all of them.

    Args:
        ids: integer ``[B, W]`` or ``[B, T, W]``, on the host, checked.
        weights: a tensor of that shape, or None for 1.
        registry: the registry that the ids belong to.
        length: the batch's sequence length where it is known, for layers that get flattened inputs.
        batch: the number of the model's input rows, where it is known to be the routing's.
        touched: ids whose parameters take part although no row of this process activates them (they then get
            zero gradients): what other processes activate, under sharded training.
    """

    def __init__(
        self,
        ids: Any,
        weights: Tensor | None,
        registry: FeatureRegistry,
        length: int | None = None,
        touched: tuple[int, ...] = (),
        batch: int | None = None,
    ) -> None:
        self.ids = torch.from_numpy(ids)  # for layers that are compiled one by one
        self.lead: tuple[int, ...] = tuple(ids.shape[:-1])
        self.flat = ids.reshape(-1, ids.shape[-1])
        self.weights = weights
        self.registry = registry
        self.length = length
        self.touched, self.batch = touched, batch
        self.counted = batch is not None  # whether the model's input has so many rows somewhere
        self.media: Media | None = None  # whose rows their layers' inputs are
        self.watch: Any = None  # of a forward that is watched, see ``bypassed``
        self.tokens: dict[int, Token] = {}  # what layers keep for a token, by place
        self._placed: dict[Any, Placed] = {}
        self._unlike: tuple[int, ...] | None = ()
        self._compositions: Compositions | None = None
        self.entered: FlixState | None = None  # whose forward runs: its values stay as they are
        self._in_force: dict[FlixState, InForce] = {}
        self._whole: weakref.ref[ActiveRouting] | None = None
        self._alone: ActiveRouting | None = None

    def unlike(self) -> tuple[int, ...] | None:
        """The first row (by token, and position) that differs from the first, or None."""
        if self._unlike == ():
            ids, weights = self.flat.reshape(*self.lead, self.flat.shape[-1]), self._host_weights()
            self._unlike = first_unlike(ids, weights)
        return self._unlike

    def compositions(self) -> Compositions:
        """The rows that are alike."""
        if self._compositions is None:
            self._compositions = compositions(self.flat, self._host_weights())
        return self._compositions

    def _host_weights(self) -> np.ndarray[Any, Any] | None:
        if self.weights is None:
            return None
        host = self.weights.detach().float().cpu().numpy()
        return np.ascontiguousarray(host.reshape(self.flat.shape))

    def placed(self, layout: LayerLayout, device: torch.device, dtype: torch.dtype) -> Placed:
        """The rows on the ranks of one layout."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        key = (layout, device, wide)
        found = self._placed.get(key)
        if found is None:
            union = plan_union(self.flat, layout, self.touched)
            scale = upload(union.scales, device).to(wide)
            if self.weights is not None:
                weights = self.weights.reshape(self.flat.shape).to(device=device, dtype=wide)
                scale = weights.gather(1, upload(union.slots, device)) * scale
            rows = upload(union.rows, device)
            learned = self.weights is not None and self.weights.requires_grad
            found = Placed(union.active, union.union, rows, scale, union, learned)
            self._placed[key] = found
        return found

    def enter(self, state: FlixState) -> ActiveRouting:
        """Begin a forward of a model: until the next, its layers take the features' values to be as they are now."""
        self.entered = None
        if torch.is_grad_enabled():
            self._in_force.pop(state, None)  # its graph belongs to the forward before
        self.tokens = self.in_force(state).tokens
        self.entered = state
        return self

    def alone(self) -> ActiveRouting | None:
        """The one composition of all rows, for inputs of any leading sizes; None if rows differ, or want gradients."""
        if not self.lead or len(self.flat) == 1:
            return self
        weights = self.weights
        if (weights is not None and weights.requires_grad) or self.unlike() is not None:
            return None
        if self._alone is None:
            self._alone = self.of_rows([0], ())
        return self._alone

    def alike(self) -> list[list[int]]:
        """The rows by composition; each by itself where its weights want gradients."""
        if self.weights is not None and self.weights.requires_grad:
            return [[row] for row in range(len(self.flat))]
        weights, groups = self._host_weights(), dict[Any, list[int]]()
        for row, ids in enumerate(self.flat):
            key = (ids.tobytes(), None if weights is None else weights[row].tobytes())
            groups.setdefault(key, []).append(row)
        return [*groups.values()]

    def of_rows(self, rows: list[int], lead: tuple[int, ...]) -> ActiveRouting:
        """Some of the rows, under the same values as all of them."""
        weights = None
        if self.weights is not None:
            weights = self.weights.reshape(self.flat.shape)[rows].reshape(*lead, -1)
        ids = self.flat[rows].reshape(*lead, -1)
        # The other rows' features take part, too: the gradients of all of them come together.
        touched, batch = tuple(self.features()), lead[0] if lead else None
        made = ActiveRouting(ids, weights, self.registry, self.length, touched, batch)
        made._whole, made.watch, made.entered = weakref.ref(self), self.watch, self.entered
        return made

    def in_force(self, state: FlixState) -> InForce:
        """The vectors of this routing's features in a bank."""
        if self._whole is not None and (whole_one := self._whole()) is not None:
            return whole_one.in_force(state)
        found, grad = self._in_force.get(state), torch.is_grad_enabled()
        if found is None or grad > found.grad or (self.entered is not state and not found.fresh()):
            found = InForce(state.bank, self.features(), state.pager, grad)
            self._in_force[state] = found
        return found

    def features(self) -> list[int]:
        """The ids of all features that take part, ascending."""
        ids = np.unique(self.flat)
        return sorted({*ids[ids >= 0].tolist(), *self.touched})


class TracedRouting:
    """Routing inside a compiled graph: ids and weights stay tensors, and nothing depends on their values.

    Attributes:
        parts: of every feature of the bank, by id: its vector, split for the layers.
    """

    watch, media = None, None

    def __init__(
        self,
        bank: Bank,
        ids: Tensor,
        weights: Tensor | None,
        length: int | None,
        batch: int | None = None,
        parts: Any = None,
    ) -> None:
        if parts is None:
            sizes = bank.layout.sizes
            held = bank.held()
            parts = {i: whole(p).split_with_sizes(sizes[i]) for i, p in held.items()}
        self.bank, self.parts = bank, parts
        if weights is not None and not (weights.requires_grad and torch.is_grad_enabled()):
            # Inactive, whatever its values are; an id of no feature stays one.
            ids = ids.to(weights.device)
            off = (weights == 0) & (ids >= 0) & (ids < len(bank.features))
            ids = torch.where(off, -1, ids)
        self.lead = tuple(ids.shape[:-1])
        self.flat = ids.reshape(-1, ids.shape[-1])
        self.weights = None if weights is None else weights.reshape(self.flat.shape)
        self.length, self.batch, self.counted = length, batch, batch is not None

    def alone(self) -> TracedRouting | None:
        """This routing, if it has one row: the ids of others may differ."""
        return self if self.lead in ((), (1,)) else None

    def alike(self) -> list[list[int]]:
        """Each row by itself: values are unknown."""
        return [[row] for row in range(self.flat.shape[0])]

    def of_rows(self, rows: list[int], lead: tuple[int, ...]) -> TracedRouting:
        """Some of the rows."""
        weights = None if self.weights is None else self.weights[rows].reshape(*lead, -1)
        ids = self.flat[rows].reshape(*lead, -1)
        batch = lead[0] if lead else None
        return TracedRouting(self.bank, ids, weights, self.length, batch, self.parts)


AnyRouting = ActiveRouting | TracedRouting


class Uniform:
    """One composition for all rows and positions of any input.

    Attributes:
        registry: the registry that the ids belong to.
        ids: int64 ``[W]``, checked.
        weights: float32 ``[W]``, or None for 1.
    """

    def __init__(self, registry: FeatureRegistry, ids: Tensor, weights: Tensor | None) -> None:
        if weights is not None:
            ids = torch.where(weights == 0, -1, ids)  # inactive, whatever its values are
        self.registry, self.ids, self.weights = registry, ids, weights
        self._by_thread: dict[int, ActiveRouting] = {}

    def active(self, touched: tuple[int, ...] = ()) -> ActiveRouting:
        """The routing, without leading dimensions: a layer takes all that it is given for one row."""
        return ActiveRouting(self.ids.numpy(), self.weights, self.registry, touched=touched)

    def of_thread(self) -> ActiveRouting:
        """The routing for layers that this thread runs outside of a model's forward."""
        thread = threading.get_ident()
        if thread not in self._by_thread:
            self._by_thread[thread] = self.active()
        return self._by_thread[thread]

    def traced(self, bank: Bank) -> TracedRouting:
        """The same inside a compiled graph."""
        return TracedRouting(bank, self.ids, self.weights, None)


def host_ids(features: Any) -> np.ndarray[Any, Any]:
    """Feature ids as a numpy array on the host.

    Raises:
        RoutingError: what was given is not an array of ids.
    """
    if isinstance(features, Tensor):
        return features.detach().cpu().numpy()
    return as_array("flix_features", features)


def weight_tensor(weights: Any) -> Tensor | None:
    """Weights as a tensor; a tensor is kept as it is, with its gradient."""
    if weights is None or isinstance(weights, Tensor):
        return weights
    return torch.as_tensor(np.asarray(weights))


def as_tensors(
    registry: FeatureRegistry, features: Any, weights: Any
) -> tuple[Tensor, Tensor | None]:
    """Routing as tensors, of whatever was given."""
    features, weights = unpacked(registry, features, weights)
    ids = features if isinstance(features, Tensor) else torch.as_tensor(host_ids(features))
    return ids, weight_tensor(weights)


def make_routing(
    registry: FeatureRegistry,
    features: Any,
    weights: Any = None,
    *,
    batch: int | None = None,
    length: int | None = None,
    touched: Callable[[np.ndarray[Any, Any]], tuple[int, ...]] | None = None,
) -> ActiveRouting:
    """Check routing and make it ready for a forward.

    Args:
        registry: the model's registry.
        features: ids as a tensor, array or nested list, or a :class:`flix.Routing`.
        weights: floats in the shape of the ids, or None.
        batch: the number of rows of the batch, if known.
        length: the sequence length, if known.
        touched: gives the ids that other processes activate, from this process's ids.

    Raises:
        RoutingError: routing that breaks a rule; the row is named.
    """
    features, weights = unpacked(registry, features, weights)
    ids = host_ids(features)
    tensor = weight_tensor(weights)
    on_host = None
    if tensor is not None:
        plain = tensor.detach().cpu()
        on_host = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    check_routing(ids, on_host, registry, batch=batch)
    ids = ids.astype(np.int64, copy=True)
    if tensor is not None and not (tensor.requires_grad and torch.is_grad_enabled()):
        ids[on_host == 0] = -1  # inactive, whatever its values are
    return ActiveRouting(ids, tensor, registry, length, touched(ids) if touched else (), batch)


@contextmanager
def activated(routing: AnyRouting | Base | None) -> Iterator[None]:
    """Run with this routing in force on this thread."""
    previous = current.routing
    current.routing = routing
    try:
        yield
    finally:
        current.routing = previous


@contextmanager
def route(registry: FeatureRegistry, features: Any, weights: Any = None) -> Iterator[None]:
    """Run flix layers that are used by hand, outside an adapted model, under one routing.

    Args:
        registry: the layers' registry.
        features: int ``[B, W]`` or ``[B, T, W]``.
        weights: float in that shape, or None for 1.

    Raises:
        RoutingError: routing that breaks a rule.
    """
    with activated(make_routing(registry, features, weights)):
        yield

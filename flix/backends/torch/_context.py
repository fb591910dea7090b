"""The routing of the forward that is running, per thread.

A model's forward keyword puts it here, the adapted layers read it. A thread-local (not a context variable) since
compilers trace it; recomputation under activation checkpointing re-enters it (see ``_checkpoint``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flix.backends.torch._versions import state
from flix.backends.torch.kernels.tables import upload
from flix.core.config.layout import LayerLayout
from flix.core.errors import RoutingError
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import Routing, check_routing
from flix.core.strategy.union import UnionPlan, first_unlike, plan_union


class _Current(threading.local):
    """This thread's state.

    Attributes:
        routing: the routing of the forward that is running.
        defaults: under :func:`routed`, one composition for all rows of a model's calls, by the model's ``id``.
    """

    routing: ActiveRouting | TracedRouting | None
    defaults: dict[int, Uniform]

    def __init__(self) -> None:
        # Set on the instance from the start: compiled code guards on the attribute's place.
        self.routing = None
        self.defaults = {}


current = _Current()


@dataclass
class DevicePlan:
    """A batch's routing in one layout, as tensors on one device.

    Attributes:
        active: ids of the features whose parameters take part, ascending.
        union: the number of their rows, U.
        rows: int64 ``[N, R]``.
        scale: ``[N, R]``, weight times s_f; it carries gradient where the weights do.
        host: the plan on the host.
    """

    active: tuple[int, ...]
    union: int
    rows: Tensor
    scale: Tensor
    host: UnionPlan
    _grouped: tuple[Tensor, Tensor, Tensor] | None = None
    _masks: dict[torch.dtype, Tensor] = field(default_factory=dict)
    _stacks: dict[Any, tuple[list[Tensor], tuple[int, ...], Any]] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Each example's factor for every row of the union, ``[N, U]``; made once for all layers, without gradient."""
        found = self._masks.get(dtype)
        if found is None:
            scale = self.scale.detach().to(dtype)
            zeros = scale.new_zeros(scale.shape[0], self.union)
            found = self._masks[dtype] = zeros.scatter_add_(1, self.rows, scale)
        return found

    def stack(
        self, layer: object, dtype: torch.dtype, params: list[Tensor], make: Callable[[], Any]
    ) -> Any:
        """A layer's stacked union, kept while its parameters stay as they are: generation asks at every token."""
        versions = state(params)
        key = (id(layer), dtype)
        kept = self._stacks.get(key)
        same = kept is not None and all(p is q for p, q in zip(kept[0], params, strict=True))
        if kept is None or not same or kept[1] != versions:
            kept = self._stacks[key] = (params, versions, make())
        return kept[2]

    def grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels need: int32 rows, -1 where unused, and the slots of each union row (order, starts)."""
        if self._grouped is None:
            used = self.host.scales != 0
            rows = np.where(used, self.host.rows, -1).astype(np.int32)
            flat = np.where(used, self.host.rows, self.union).ravel()
            order = np.argsort(flat, kind="stable")
            starts = np.searchsorted(flat[order], np.arange(self.union + 1))
            # One upload for the three of them, each aligned alike, as kernels are compiled for.
            arrays = [rows.ravel(), order.astype(np.int32), starts.astype(np.int32)]
            sizes = [array.size for array in arrays]
            whole = np.concatenate([np.pad(array, (0, -array.size % 4)) for array in arrays])
            moved = upload(whole, self.rows.device)
            first, second, third = (
                part[:size]
                for part, size in zip(
                    torch.split(moved, [size + -size % 4 for size in sizes]), sizes, strict=True
                )
            )
            self._grouped = (first.view(rows.shape), second, third)
        return self._grouped


class ActiveRouting:
    """Checked routing of one forward, with its plans, made once and shared by all layers of a layout.

    Args:
        ids: integer ``[B, W]`` or ``[B, T, W]``, on the host, checked.
        weights: a tensor of that shape, or None for 1.
        registry: the registry that the ids belong to.
        length: the batch's sequence length where it is known, for layers that get flattened inputs.
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
    ) -> None:
        self.lead: tuple[int, ...] = tuple(ids.shape[:-1])
        self.flat = ids.reshape(-1, ids.shape[-1])
        self.weights = weights
        self.registry = registry
        self.length = length
        self.touched = touched
        self.pager: Any = None  # the model's paging.Pager, if its features are paged
        self._plans: dict[Any, DevicePlan] = {}
        self._unlike: int | None = -1

    @property
    def per_token(self) -> bool:
        return len(self.lead) == 2

    def unlike(self) -> int | None:
        """The first row that differs from row 0, or None."""
        if self._unlike == -1:
            weights = None
            if self.weights is not None:
                weights = self.weights.detach().float().cpu().numpy().reshape(self.flat.shape)
            self._unlike = first_unlike(self.flat, weights)
        return self._unlike

    def plan(self, layout: LayerLayout, device: torch.device, dtype: torch.dtype) -> DevicePlan:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        key = (layout, device, wide)
        found = self._plans.get(key)
        if found is None:
            union = plan_union(self.flat, layout, self.touched)
            scale = upload(union.scales, device).to(wide)
            if self.weights is not None:
                weights = self.weights.reshape(self.flat.shape).to(device=device, dtype=wide)
                scale = weights.gather(1, upload(union.slots, device)) * scale
            rows = upload(union.rows, device)
            found = self._plans[key] = DevicePlan(union.active, union.union, rows, scale, union)
        return found


class TracedRouting:
    """Routing inside a compiled graph: ids and weights stay tensors, and nothing depends on their values."""

    def __init__(self, ids: Tensor, weights: Tensor | None, length: int | None) -> None:
        self.lead = tuple(ids.shape[:-1])
        self.flat = ids.reshape(-1, ids.shape[-1])
        self.weights = None if weights is None else weights.reshape(self.flat.shape)
        self.length = length

    @property
    def per_token(self) -> bool:
        return len(self.lead) == 2


AnyRouting = ActiveRouting | TracedRouting


class Uniform:
    """One composition for all rows and positions of any input.

    Attributes:
        registry: the registry that the ids belong to.
        ids: int64 ``[W]``, checked.
        weights: float32 ``[W]``, or None for 1.
    """

    def __init__(self, registry: FeatureRegistry, ids: Tensor, weights: Tensor | None) -> None:
        self.registry, self.ids, self.weights = registry, ids, weights

    def active(self, touched: tuple[int, ...] = ()) -> ActiveRouting:
        """The routing, without leading dimensions: a layer takes all that it is given for one row."""
        return ActiveRouting(self.ids.numpy(), self.weights, self.registry, touched=touched)

    def traced(self) -> TracedRouting:
        """The same inside a compiled graph."""
        return TracedRouting(self.ids, self.weights, None)


def host_ids(features: Any) -> np.ndarray[Any, Any]:
    """Feature ids as a numpy array on the host.

    Raises:
        RoutingError: what was given is no array of ids.
    """
    if isinstance(features, Tensor):
        return features.detach().cpu().numpy()
    try:
        return np.asarray(features)
    except ValueError as error:
        raise RoutingError(
            f"flix_features must be an integer array [batch, width], got {features!r}"
        ) from error


def weight_tensor(weights: Any) -> Tensor | None:
    """Weights as a tensor; a tensor is kept as it is, with its gradient."""
    if weights is None or isinstance(weights, Tensor):
        return weights
    return torch.as_tensor(np.asarray(weights))


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
    if isinstance(features, Routing):
        if features.registry != registry:
            raise RoutingError(
                f"the routing was encoded by another registry ({features.registry}) than the "
                f"model's ({registry})"
            )
        if weights is None:
            weights = features.weights
        features = features.ids
    ids = host_ids(features)
    tensor = weight_tensor(weights)
    on_host = None
    if tensor is not None:
        plain = tensor.detach().cpu()
        on_host = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    check_routing(ids, on_host, registry, batch=batch)
    ids = ids.astype(np.int64, copy=True)
    return ActiveRouting(ids, tensor, registry, length, touched(ids) if touched else ())


@contextmanager
def activated(routing: AnyRouting | None) -> Iterator[None]:
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

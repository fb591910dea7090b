"""What all adapted layers share: the features' pairs, and how routing reaches a layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch import scopes
from flix.backends.torch.calls import CALL, refuse_folded, refuse_trace
from flix.backends.torch.kernels.routes import routes
from flix.backends.torch.parameters import Carried, Values
from flix.backends.torch.placing import Placed
from flix.backends.torch.routing import (
    ActiveRouting,
    AnyRouting,
    Base,
    TracedRouting,
    as_tensors,
    current,
    make_routing,
    tracing,
    transforming,
)
from flix.backends.torch.state import FlixState
from flix.core.adapter.adapter import LayerShape
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.errors import TargetError
from flix.core.features.names import Feature


class Views:
    """One side of a layer's pairs, by feature: ``layer.flix_A["language", "hau"]``.

    The values are views of the feature's parameter: they carry its gradient, and may be changed in place under
    ``torch.no_grad()``.
    """

    def __init__(self, layer: Adapted, side: int) -> None:
        self._layer, self._side = layer, side

    def __getitem__(self, feature: Feature) -> Tensor:
        return self._layer.flix_state.bank.view(feature, self._layer.flix_place)[self._side]

    def __contains__(self, feature: Feature) -> bool:
        config = self._layer.flix_config
        return feature in config.registry and config.rank(self._layer.flix_name, feature) > 0


class Adapted:
    """A frozen kernel with the features' pairs: an adapted layer, or one of the kernels of a module of experts.

    Attributes:
        flix_name: the layer's path in its model.
        flix_place: its place among the model's adapted layers.
        flix_state: what it carries, with all adapted layers of its model.
        weight: the kernel.
    """

    flix_kind = "linear"
    flix_name: str
    flix_place: int
    flix_state: FlixState
    weight: Tensor

    # Whether the kernel is stored [d_in, d_out], as transformers' Conv1D and embeddings have it, or [d_out, d_in].
    flix_transposed = False

    @classmethod
    def shape_of(cls, layer: Any) -> LayerShape:
        """Kind and sizes of a layer that has the kernel of this class, adapted or not."""
        sizes = tuple(layer.weight.shape)
        d_in, d_out = sizes if cls.flix_transposed else sizes[::-1]
        return LayerShape(d_in, d_out, cls.flix_kind)

    @property
    def d_in(self) -> int:
        """Input size; of an embedding, the vocabulary's."""
        return int(self.weight.shape[-2 if self.flix_transposed else -1])

    @property
    def d_out(self) -> int:
        """Output size."""
        return int(self.weight.shape[-1 if self.flix_transposed else -2])

    @property
    def flix_config(self) -> FlixConfig:
        """The configuration."""
        return self.flix_state.config

    @property
    def flix_layout(self) -> LayerLayout:
        """Ranks and scales of the features in this layer."""
        return self.flix_state.bank.layout.layouts[self.flix_place]

    @property
    def flix_A(self) -> Views:  # noqa: N802
        """A_f ``[r, d_in]`` of each feature."""
        return Views(self, 0)

    @property
    def flix_B(self) -> Views:  # noqa: N802
        """B_f ``[d_out, r]`` of each feature."""
        return Views(self, 1)

    def pairs(self) -> Iterator[tuple[Feature, Tensor, Tensor]]:
        """(feature, A, B) of every feature with an update in this layer, as views."""
        bank = self.flix_state.bank
        for feature in self.flix_config.registry.live:
            if bank.layout.rank(self.flix_config.registry.id(*feature), self.flix_place):
                yield (feature, *bank.view(feature, self.flix_place))

    def _routing(self, features: Any, weights: Any) -> AnyRouting | None:
        """The routing to run under: the one given, or the one in force; None to run the base alone."""
        state, routing = self.flix_state, current.routing
        if features is None and weights is None and routing is not None:
            return self._own(routing)
        scope = scopes.in_force(state)
        if scope is scopes.OFF:
            return None
        refuse_trace()
        if features is not None:
            refuse_folded(state)
            if transforming():
                return TracedRouting(
                    state.bank, *as_tensors(state.config.registry, features, weights), None
                )
            return make_routing(state.config.registry, features, weights)
        if weights is not None:
            raise messages.weights_alone()
        if state.folded is not None:
            return None
        if scope is None:
            raise messages.unrouted_layer(self.flix_name, CALL, "routed(model, row)")
        if tracing():
            return scope.traced(state.bank)  # type: ignore[no-any-return]
        _refuse_swallowed(self.flix_name)
        return scope.of_thread()  # type: ignore[no-any-return]

    def _own(self, routing: AnyRouting | Base) -> AnyRouting | None:
        """The routing in force, as far as it is this layer's."""
        if isinstance(routing, Base):
            return None
        registry = self.flix_state.config.registry
        if isinstance(routing, ActiveRouting):
            if routing.entered is not self.flix_state and routing.registry != registry:
                raise messages.other_registry(self.flix_name, routing.registry, registry)
            if tracing():
                return TracedRouting(
                    self.flix_state.bank, routing.ids, routing.weights, routing.length
                )
        return routing

    def _check_single(self, routing: ActiveRouting, strategy: str) -> None:
        if strategy == "single" and (place := routing.unlike()) is not None:
            raise messages.rows_differ(place)

    def _open(self, y: Tensor, training: bool) -> Tensor:
        """The output of a batch whose features are frozen, while others train: differentiated as one without any."""
        if y.requires_grad or not (training and torch.is_grad_enabled()):
            return y
        held = self.flix_state.bank.held().values()
        return with_grad(y, training) if any(p.requires_grad for p in held) else y


class FlixLayer(Adapted, nn.Module):
    """What all adapted layers share: the pairs of the features, and the way routing reaches them.

    Attributes:
        flix_strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        flix_base: the class of the plain layer.
    """

    flix_strategy: str
    flix_base: type[nn.Module]

    def _dropped(self) -> float:
        """With which rate entries of the low-rank maps' input are dropped now; 0.0 in evaluation."""
        return self.flix_state.config.lora_dropout if self.training else 0.0

    def _values(
        self, placed: Placed, routing: ActiveRouting, device: torch.device
    ) -> tuple[Values, Tensor | None]:
        """The parts of the batch's features, and the carrier of their gradient where one is recorded."""
        found = routing.in_force(self.flix_state)
        values = found.values(placed.active, self.flix_place, device)
        return values, found.carrier(self.flix_place)

    def _pairs_of(
        self, values: Values, carrier: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Parts as A ``[r, d_in]`` and B transposed ``[r, d_out]`` of each feature, for differentiable operations."""
        if carrier is not None:
            parts = Carried.apply(carrier, *values)  # type: ignore[no-untyped-call]
            values = parts[: len(values[0])], parts[len(values[0]) :]
        sides = zip(values, self._sizes(), strict=True)
        return tuple([part.view(-1, size) for part in parts] for parts, size in sides)  # type: ignore[return-value]

    def _traced_pairs(self, routing: TracedRouting) -> tuple[list[Tensor], list[Tensor]]:
        """A and B transposed of every feature with an update here, in a compiled graph."""
        side, (d_in, d_out) = 2 * self.flix_place, self._sizes()
        held = [routing.parts[i] for i, rank in enumerate(self.flix_layout.ranks) if rank]
        return (
            [parts[side].view(-1, d_in) for parts in held],
            [parts[side + 1].view(-1, d_out) for parts in held],
        )

    def _sizes(self) -> tuple[int, int]:
        """d_in and d_out, which the features' values must have as well."""
        now, known = (self.d_in, self.d_out), self.flix_state.bank.layout.shapes[self.flix_place]
        if now != (known.d_in, known.d_out):
            raise TargetError(
                f"layer {self.flix_name!r} now has the sizes {now}, but was adapted with "
                f"{(known.d_in, known.d_out)}; "
                "call resize_token_embeddings of the adapted model itself, which lets its "
                "features grow too"
            )
        return now

    def _placed(self, x: Tensor, routing: ActiveRouting) -> Placed:
        dtype = x.dtype if x.is_floating_point() else self.weight.dtype
        return routing.placed(self.flix_layout, x.device, dtype)  # type: ignore[arg-type]

    def _traced_slots(
        self, routing: TracedRouting, like: Tensor, grouped: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each row's slots on the whole bank, in a compiled graph: rows, factors, and order and starts if wanted.

        See :func:`flix.backends.torch.kernels.routes.routes`; the factors are s_f times the weights. ``like`` has the
        layer's dtype, and the device that all of them are on: ids may come from the host.
        """
        layout, ids = self.flix_layout, routing.flat.to(like.device)
        wide = like.dtype == torch.float64
        rows, slots, scale, *order = routes(ids, layout.ranks, layout.scales, wide, grouped)
        if routing.weights is not None:
            scale = routing.weights.to(scale).gather(1, slots) * scale
        return rows, scale, *order


def _refuse_swallowed(layer: str) -> None:
    """Refuse ``flix_features`` that a module around a layer took among its ``**kwargs``, and let drop.

    Only where the layer runs under ``routed`` and outside of its model's forward: its row is not theirs.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            given = frame.f_locals
            if given["kwargs"].get("flix_features") is not None:
                raise messages.swallowed(type(given["self"]).__name__, layer, CALL)
        frame = frame.f_back  # type: ignore[assignment]


def with_grad(y: Tensor, training: bool) -> Tensor:
    """The base output of a batch that activates nothing here; in training it may still be differentiated.

    A batch whose every feature was dropped has no parameter to train; without this, its backward would be an
    error where the plain meaning is "no gradient".
    """
    if training and torch.is_grad_enabled() and not y.requires_grad and y.is_floating_point():
        return y.requires_grad_(True).clone()  # no leaf: models change it in place
    return y


KERNELS = "flix_kernels"
"""The name under which an adapted module of experts holds what its kernels are adapted by."""


def flix_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every adapted layer, in the model's order; an expert's kernel goes by its parameter's path."""
    for path, module in model.named_modules():
        if isinstance(module, FlixLayer):
            yield path, module
        else:
            for name, kernel in vars(module).get(KERNELS, {}).items():
                yield f"{path}.{name}" if path else name, kernel

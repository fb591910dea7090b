"""nnx models become adapted, in place: what they carry, their layers, the way there (docs/specification.md §5.3)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flax import nnx

from flix.backends import messages
from flix.backends.jax.layers import FlixLayer, adaptable, pair_dtype
from flix.backends.jax.parameters import make_specs, pack
from flix.backends.jax.patches.layers import become, revert
from flix.backends.jax.patches.model import RoutedModel, route_calls, unrouted
from flix.backends.jax.stacks import check_alike, depth_of, places, stacked, whole
from flix.backends.protocol import Values
from flix.core.config.config import FlixConfig
from flix.core.config.targets import LayerInfo, is_head
from flix.core.errors import TargetError
from flix.core.features.names import Feature


@dataclass(frozen=True, eq=False)
class FlixState:
    """What an adapted model carries beside its tables, as a static attribute of the model and of its layers.

    Compared by value and hashed once, since it is part of every key of ``nnx.jit``; never changed, but replaced.

    Attributes:
        config: the configuration.
        heads: parameters of the base that are saved with the features; no part of the value.
        named: features that a warning has named for values that are not finite; no part of the value.
        acted: layers that ran, and whether in evaluation; neither.
    """

    config: FlixConfig
    heads: tuple[str, ...] = ()
    named: set[Feature] = field(default_factory=set)
    acted: set[tuple[str, bool]] = field(default_factory=set)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlixState):
            return False
        if self.config is not other.config:
            if self.config != other.config:
                return False
            # Every layer asks again, at every call of a compiled function: from now on the answer is quick.
            object.__setattr__(self, "config", other.config)
        return True

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.config.registry, self.config.scaling, self.config.seed))

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: Any) -> FlixState:
        return replace(self, named=set(), acted=set())

    def __repr__(self) -> str:
        return f"FlixState({self.config.registry!r})"


def flix_layers(model: nnx.Module) -> Iterator[tuple[str, FlixLayer]]:
    """(path, layer) of every adapted layer, by the paths they were adapted under; a stack of layers is one."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, FlixLayer):
            yield module.flix_spec.path, module


def layer_infos(model: nnx.Module) -> list[LayerInfo]:
    """Every module of a model as the target rules see it."""
    infos = []
    for path, place in places(model).items():
        shape, reason = adaptable(place.module)
        kind, d_in, d_out = (shape.kind, shape.d_in, shape.d_out) if shape else ("", 0, 0)
        infos.append(LayerInfo(path, kind, d_in, d_out, is_head(path), reason))
    return infos


def attach(
    model: Any, config: FlixConfig, paths: Sequence[str], strategy: str, values: Values
) -> Any:
    """See :meth:`flix.backends.protocol.Backend.attach`."""
    found, shapes = places(model), {}
    for path in paths:
        shape, reason = adaptable(found[path].module)
        if shape is None:
            raise TargetError(f"layer {path!r} cannot be adapted: {reason}")
        shapes[path] = shape
    state, specs = FlixState(config), make_specs(config, shapes)
    groups = whole(found, [*specs])
    for names in groups.values():
        check_alike([specs[name] for name in names])
    for first, names in groups.items():
        place, banks = found[first], []
        for name in names:
            spec = specs[name]
            banks.append(pack(spec, values(name, spec.shape), pair_dtype(place.module)))
        own = stacked(path_of(model, place.module), place.lead, banks)
        become(place.module, strategy, state, own, training=True)
    depth = depth_of(model)
    route_calls(model)
    model.flix_state, model.flix_depth = state, depth
    return model


def path_of(model: nnx.Module, module: Any) -> str:
    """Where a module is below the model."""
    return next(".".join(map(str, path)) for path, m in nnx.iter_modules(model) if m is module)


def put_state(model: Any, state: FlixState) -> None:
    """Set an adapted model's state, in all that carries it."""
    for holder in (model, *(layer for _, layer in flix_layers(model))):
        holder.flix_state = state


def detach(model: nnx.Module) -> None:
    """Turn an adapted model, in place, back into the plain model it was; its features are gone."""
    for _, layer in list(flix_layers(model)):
        revert(layer)
    unrouted(model)


def require_adapted(model: Any, what: str) -> FlixConfig:
    """The configuration of an adapted model.

    Raises:
        TargetError: the model is not adapted.
    """
    if not isinstance(model, RoutedModel):
        raise messages.not_adapted(what, model)
    return model.flix_config

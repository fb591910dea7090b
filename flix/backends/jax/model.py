"""Adapting nnx models in place: targets become adapted layers, the call takes routing (docs/specification.md §5.3)."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, TypeVar

from flax import nnx

from flix.backends.jax._routing import current, make_routing
from flix.backends.jax.bank import initial_layer, make_spec
from flix.backends.jax.layers import (
    FlixLayer,
    adaptable,
    become,
    change_class,
    kernel_of,
    pair_dtype,
    revert,
)
from flix.core.adapter.adapter import LayerShape
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.config.targets import LayerInfo, is_head, select
from flix.core.errors import ConfigError, RoutingError, TargetError
from flix.core.strategy.decide import check_strategy

Model = TypeVar("Model", bound=nnx.Module)


class HeldConfig:
    """A configuration as a static attribute: compared by value, hashed once, never copied."""

    def __init__(self, config: FlixConfig) -> None:
        self.config = config
        self._hash = hash((config.registry, config.scaling, config.seed))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, HeldConfig) and self.config == other.config)

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: Any) -> HeldConfig:
        return self

    def __repr__(self) -> str:
        return f"HeldConfig({self.config.registry!r})"


class RoutedModel:
    """What adapted models have over their own class; ``isinstance(model, RoutedModel)`` tells them."""

    __slots__ = ()  # so that instances keep their layout, and can change class

    flix_held: HeldConfig
    flix_enabled = True  # an attribute of the instance, and so static, while the model is disabled

    @property
    def flix_config(self) -> FlixConfig:
        """The configuration."""
        return self.flix_held.config

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; pickles name the model's own class instead.
        state = self.__getstate__()  # type: ignore[misc]
        return (_new_routed, (plain_class(type(self)),), state)  # type: ignore[arg-type]


def _new_routed(base: type[nnx.Module]) -> Any:
    return object.__new__(routed_class(base))


def plain_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The model's own class behind a routed one."""
    return cls.flix_plain if issubclass(cls, RoutedModel) else cls  # type: ignore[attr-defined,no-any-return]


@functools.cache
def routed_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass of ``base`` whose call takes ``flix_features`` and ``flix_weights``.

    A subclass, not a function patched onto the instance, so that split, merge, clone and copies keep it.
    """

    def call(
        self: Any, *args: Any, flix_features: Any = None, flix_weights: Any = None, **kwargs: Any
    ) -> Any:
        if not self.flix_enabled:
            return base.__call__(self, *args, **kwargs)
        if flix_features is None:
            if flix_weights is not None:
                raise RoutingError(
                    "flix_weights was given without flix_features; weights belong to ids"
                )
            return base.__call__(self, *args, **kwargs)
        previous = current.routing
        current.routing = make_routing(
            self.flix_config.registry, flix_features, flix_weights, present=current.present
        )
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            current.routing = previous

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            __call__=call,
            __module__=base.__module__,
            __qualname__=base.__qualname__,
            __doc__=base.__doc__,
            flix_plain=base,
        )

    if callable(getattr(base, "__call__", None)):  # noqa: B004 - the class's, not the metaclass's
        signature = inspect.signature(base.__call__)
        old = list(signature.parameters.values())
        tail = [p for p in old if p.kind is inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("flix_features", "flix_weights")
        ]
        kept = [p for p in old if p not in tail]
        call.__signature__ = signature.replace(parameters=[*kept, *added, *tail])  # type: ignore[attr-defined]
        call.__doc__ = base.__call__.__doc__
    keywords = {"pytree": base._pytree__is_pytree}
    return types.new_class(base.__name__, (base, RoutedModel), keywords, body)


def flix_layers(model: nnx.Module) -> Iterator[tuple[str, FlixLayer]]:
    """(path, layer) of every adapted layer, by the paths they were adapted under."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, FlixLayer):
            yield module.flix_spec.path, module


def modules_of(model: nnx.Module) -> list[tuple[str, nnx.Module]]:
    """(path, module) of every module below the model; a path is ``layers.0.q``."""
    return [(".".join(map(str, path)), m) for path, m in nnx.iter_modules(model) if path]


def layer_infos(model: nnx.Module) -> list[LayerInfo]:
    """Every module of a model as the target rules see it."""
    infos = []
    for path, module in modules_of(model):
        shape, _, reason = adaptable(module)
        head = is_head(path)
        if shape is None:
            infos.append(LayerInfo(path, "", head=head, reason=reason))
        else:
            infos.append(LayerInfo(path, shape.kind, shape.d_in, shape.d_out, head, reason))
    return infos


def layer_shapes(model: nnx.Module) -> dict[str, LayerShape]:
    """Kind and sizes of every layer that is adapted or could be."""
    return {
        info.path: LayerShape(info.d_in, info.d_out, info.kind)
        for info in layer_infos(model)
        if info.kind
    }


def adapt(model: Model, config: FlixConfig, *, strategy: str = "auto") -> Model:
    """Adapt an nnx model in place.

    The targets become adapted layers, and the call takes two keywords more::

        model(x, flix_features=ids, flix_weights=None)

    ids is int ``[B, W]`` or, for packed rows, ``[B, T, W]``; an array argument inside ``nnx.jit``. The adapters are of
    type :class:`FlixParam`: ``FlixOptimizer(model, tx)``, or ``nnx.Optimizer(model, tx, wrt=FlixParam)`` with gradients
    by ``nnx.DiffState(0, FlixParam)``, trains them alone. The model stays an instance of its class; copies, split,
    merge and clone keep it adapted. Called without routing it raises, but after ``model.eval()`` it warns and runs the
    base alone.

    Args:
        model: any ``nnx.Module`` with targets among its Linear, LinearGeneral, Einsum and Embed.
        config: the configuration. Paths of layers read ``layers.0.q``.
        strategy: how the sum is computed: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.

    Returns:
        The same model.

    Raises:
        TargetError: patterns that match nothing or a layer that cannot be adapted; a model adapted already.
        ConfigError: an unknown strategy.
    """
    if not isinstance(model, nnx.Module):
        raise TargetError(
            f"adapt needs a flax.nnx Module, got {type(model).__name__}; for other JAX programs use "
            "init and linear"
        )
    if not isinstance(config, FlixConfig):
        raise ConfigError(f"adapt needs a FlixConfig, got {type(config).__name__}")
    check_strategy(strategy)
    if isinstance(model, RoutedModel) or next(flix_layers(model), None) is not None:
        raise TargetError(
            "the model is adapted already; add features with add_feature, or adapt a fresh copy"
        )
    chosen = select(layer_infos(model), config.target_modules, config.exclude_modules)
    attach_layers(model, config, [info.path for info in chosen], strategy)
    return model


def attach_layers(model: nnx.Module, config: FlixConfig, paths: list[str], strategy: str) -> None:
    """Turn the layers at these paths into adapted ones, and a plain model into one that takes routing."""
    layouts: dict[LayerLayout, LayerLayout] = {}
    modules = dict(modules_of(model))
    for path in paths:
        shape, form, reason = adaptable(modules[path])
        if shape is None or form is None:
            raise TargetError(f"layer {path!r} cannot be adapted: {reason}")
        spec = make_spec(config, path, shape)
        object.__setattr__(spec, "layout", layouts.setdefault(spec.layout, spec.layout))
        bank = initial_layer(spec, config.seed, pair_dtype(kernel_of(modules[path])[...]))
        become(modules[path], form, strategy, bank)
    if not isinstance(model, RoutedModel):
        change_class(model, routed_class(type(model)))
    set_config(model, config)


def set_config(model: nnx.Module, config: FlixConfig) -> None:
    """Set the configuration of an adapted model."""
    model.flix_held = HeldConfig(config)  # type: ignore[attr-defined]


def unadapt(model: nnx.Module) -> None:
    """Turn an adapted model, in place, back into the plain model it was; its features are gone."""
    for _, layer in list(flix_layers(model)):
        revert(layer)
    if isinstance(model, RoutedModel):
        for name in [n for n in vars(model) if n.startswith("flix_")]:
            delattr(model, name)
        change_class(model, plain_class(type(model)))


def require_adapted(model: Any, what: str) -> FlixConfig:
    """The configuration of an adapted model.

    Raises:
        TargetError: the model is not adapted.
    """
    if not isinstance(model, RoutedModel) or "flix_held" not in vars(model):
        raise TargetError(
            f"{what} needs an adapted model, but this {type(model).__name__} is not; "
            "adapt(model, config) or load(model, folder) first"
        )
    return model.flix_config

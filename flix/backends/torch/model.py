"""Adapting a model in place: targets become adapted layers, its forward takes routing (docs/specification.md §5.2)."""

from __future__ import annotations

import copyreg
import functools
import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flix.backends.torch import _checkpoint
from flix.backends.torch._absent import watch
from flix.backends.torch._context import (
    activated,
    current,
)
from flix.backends.torch._layer import FlixLayer, flix_layers
from flix.backends.torch._routing import generation_routing, routing_of, unrouted
from flix.backends.torch._scaled import same_scale
from flix.backends.torch.kernels.choice import require_triton
from flix.backends.torch.layers import adaptable, become, revert
from flix.core.adapter.adapter import Adapter, LayerShape
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.config.targets import LayerInfo, is_head, select
from flix.core.errors import ConfigError, RoutingError, TargetError
from flix.core.garbage import uncollected
from flix.core.strategy.decide import check_strategy

Model = TypeVar("Model", bound=nn.Module)

_routed: dict[type[nn.Module], type[nn.Module]] = {}


class RoutedModel:
    """What adapted models have over their own class; ``isinstance(model, RoutedModel)`` tells them.

    Attributes:
        flix_config: the configuration.
        flix_frozen: names of the parameters that were trainable before the base was frozen.
        flix_present: buffer, which features a compiled forward has seen.
        flix_traced: whether one has run since the last optimizer step.
    """

    flix_config: FlixConfig
    flix_frozen: tuple[str, ...]
    flix_traced: bool
    flix_present: Tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; copies and pickles name the model's own class instead.
        made = super().__reduce_ex__(protocol)
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            made = (_new_routed, (plain_class(type(self)), *made[1][1:]), *made[2:])
        return made

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if "flix_config" in vars(self):
            watch(self)  # type: ignore[arg-type]


def _new_routed(base: type[nn.Module], *args: Any) -> Any:
    cls = routed_class(base)
    return cls.__new__(cls, *args)


def plain_class(cls: type[Any]) -> type[nn.Module]:
    """The model's own class behind a routed one."""
    return cls.flix_plain if issubclass(cls, RoutedModel) else cls  # type: ignore[attr-defined,no-any-return]


def routed_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``base`` whose forward takes ``flix_features`` and ``flix_weights``.

    A subclass, not a function patched onto the instance, so that copies of the model run their own weights.
    """
    if base in _routed:
        return _routed[base]

    def forward(
        self: Any, *args: Any, flix_features: Any = None, flix_weights: Any = None, **kwargs: Any
    ) -> Any:
        previous = current.routing
        if flix_features is None:
            current.routing = unrouted(self, flix_weights)
        else:
            current.routing = routing_of(self, flix_features, flix_weights, args, kwargs)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            current.routing = previous

    signature = inspect.signature(base.forward)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("flix_features", "flix_weights")
    ]
    old = list(signature.parameters.values())
    tail = [p for p in old if p.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [p for p in old if p not in tail] + added + tail
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    members = {
        "forward": forward,
        "flix_plain": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if callable(getattr(base, "generate", None)):
        members["generate"] = _generate_of(base)
    if hasattr(base, "init_continuous_batching"):
        members["init_continuous_batching"] = _refuse_continuous_batching
    _routed[base] = type(base.__name__, (RoutedModel, base), members)
    return _routed[base]


def _generate_of(base: Any) -> Any:
    """The ``generate`` of a model class, with routing that is checked, and in a form that beams and samples repeat."""

    @functools.wraps(base.generate)
    def generate(
        self: Any, *args: Any, flix_features: Any = None, flix_weights: Any = None, **kwargs: Any
    ) -> Any:
        if flix_features is not None:
            kwargs |= generation_routing(self, flix_features, flix_weights, args, kwargs)
        elif flix_weights is not None:
            unrouted(self, flix_weights)
        return base.generate(self, *args, **kwargs)

    return generate


def _refuse_continuous_batching(self: Any, *_: Any, **__: Any) -> Any:
    """What transformers' ``generate_batch`` begins with: requests packed into one row, run on another thread."""
    raise RoutingError(
        "continuous batching (generate_batch) gives the model no routing, so the base would answer alone; "
        "call generate() with flix_features, or merge(model, row) and serve the plain model"
    )


def layer_infos(model: nn.Module) -> list[LayerInfo]:
    """Every module of a model as the target rules see it."""
    head = None
    if hasattr(model, "get_output_embeddings"):
        try:
            head = model.get_output_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            head = None
    inside_attention = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
        if child is not module
    }
    infos = []
    for path, module in model.named_modules():
        if not path:
            continue
        if isinstance(module, FlixLayer):
            kind, reason, sizes = module.flix_kind, "", (module.d_in, module.d_out)
        else:
            target, reason = adaptable(module)
            if id(module) in inside_attention and isinstance(module, nn.Linear):
                target, reason = (
                    None,
                    "nn.MultiheadAttention reads its kernel and skips its forward",
                )
            kind = target.flix_kind if target is not None else ""
            sizes = (0, 0)
            if target is not None:
                first, second = module.weight.shape
                straight = target.flix_kind == "embedding" or getattr(
                    target, "flix_transposed", False
                )
                sizes = (first, second) if straight else (second, first)
        told = module is head or is_head(path)
        infos.append(LayerInfo(path, kind, int(sizes[0]), int(sizes[1]), told, reason))
    return infos


def layer_shapes(model: nn.Module) -> dict[str, LayerShape]:
    """Kind and sizes of every layer that is adapted or could be."""
    return {
        info.path: LayerShape(d_in=info.d_in, d_out=info.d_out, kind=info.kind)
        for info in layer_infos(model)
        if info.kind
    }


def adapt(model: Model, config: FlixConfig, *, strategy: str = "auto") -> Model:
    """Adapt a model in place and freeze its base.

    The targets become adapted layers, the base's parameters stop requiring gradients, and the forward takes two
    keywords more::

        model(**batch, flix_features=ids, flix_weights=None)

    ids is int ``[B, W]`` or, for packed rows, ``[B, T, W]``. The model stays an instance of its class, and copies of
    it work. Heads that are to be trained are unfrozen by hand afterwards.

    Args:
        model: any ``nn.Module`` with targets among its ``nn.Linear``, Conv1D and ``nn.Embedding``.
        config: the configuration.
        strategy: how the sum is computed: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"``, or ``"fused"`` (Triton
            kernels, on a CUDA device).

    Returns:
        The same model.

    Raises:
        TargetError: patterns that match nothing or a layer that cannot be adapted; a model adapted already.
        ConfigError: an unknown strategy, or ``"fused"`` without Triton.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"adapt needs a torch nn.Module, got {type(model).__name__}")
    if not isinstance(config, FlixConfig):
        raise ConfigError(f"adapt needs a FlixConfig, got {type(config).__name__}")
    check_strategy(strategy)
    require_triton(strategy)
    if next(flix_layers(model), None) is not None:
        raise TargetError(
            "the model is adapted already; add features with add_feature, or adapt a fresh copy"
        )
    if "forward" in vars(model):
        raise TargetError(
            "the model's forward is patched on the instance (as accelerate's dispatch does); adapt it "
            "before it is dispatched or prepared"
        )
    chosen = select(layer_infos(model), config.target_modules, config.exclude_modules)
    adapt_paths(model, config, [info.path for info in chosen], strategy)
    return model


def adapt_paths(
    model: nn.Module,
    config: FlixConfig,
    paths: list[str],
    strategy: str,
    adapter: Adapter | None = None,
) -> None:
    """Adapt the layers at these paths, whatever the configuration's patterns say, and freeze the base.

    The features get an adapter's values, or initial ones.
    """
    trainable = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    model.requires_grad_(False)
    attach_layers(model, config, paths, strategy, adapter)
    make_routed(model, config)
    model.flix_frozen = trainable  # type: ignore[assignment]


@uncollected
def attach_layers(
    model: nn.Module,
    config: FlixConfig,
    paths: list[str],
    strategy: str,
    adapter: Adapter | None = None,
) -> None:
    """Turn the layers at these paths into adapted ones; equal layouts are one object."""
    layouts: dict[LayerLayout, LayerLayout] = {}
    modules = dict(model.named_modules())
    for path in paths:
        layout = config.layout(path)
        layout = layouts.setdefault(layout, layout)
        become(modules[path], config, path, strategy, layout, adapter)
        if isinstance(modules[path], nn.Embedding):
            _relink(model, modules, path, set(paths))


def _relink(model: nn.Module, modules: dict[str, nn.Module], path: str, targets: set[str]) -> None:
    """Let embeddings that share an adapted one's kernel, and are no targets themselves, be that one.

    transformers 5 gives T5's encoder and decoder embedding modules of their own, tied by their kernel to ``shared``,
    which is itself never run: adapted alone, it would silently do nothing.
    """
    adapted = modules[path]
    assert isinstance(adapted, FlixLayer)
    for other, module in modules.items():
        if other in targets or module is adapted or type(module) is not adapted.flix_base:
            continue
        if module.weight is adapted.weight and same_scale(module, adapted):
            parent, _, name = other.rpartition(".")
            setattr(model.get_submodule(parent), name, adapted)


def make_routed(model: nn.Module, config: FlixConfig) -> None:
    """Give the model, and an encoder that generation calls by itself, forwards that take routing."""
    _checkpoint.install()
    device = next(model.parameters()).device
    for module in (model, *_encoders(model)):
        if not isinstance(module, RoutedModel):
            module.__class__ = routed_class(type(module))
        module.flix_config = config  # type: ignore[assignment]
        module.flix_traced = False  # type: ignore[assignment]
        present = torch.zeros(len(config.registry) + 1, dtype=torch.bool, device=device)
        module.register_buffer("flix_present", present, persistent=False)
        watch(module)


def _encoders(model: nn.Module) -> list[nn.Module]:
    """The encoder of an encoder-decoder model: generation calls it past the model's own forward."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return []
    encoder = model.get_encoder()  # type: ignore[operator]
    return [encoder] if isinstance(encoder, nn.Module) and encoder is not model else []


def unadapt(model: nn.Module) -> None:
    """Turn an adapted model, in place, back into the plain model it was; its features are gone."""
    frozen = set(getattr(model, "flix_frozen", ()))
    for _, layer in list(flix_layers(model)):
        revert(layer)
    for module in list(model.modules()):
        if isinstance(module, RoutedModel):
            for name in [key for key in vars(module) if key.startswith("flix_")]:
                delattr(module, name)
            if "flix_present" in module._buffers:  # type: ignore[attr-defined]
                delattr(module, "flix_present")
            module.__class__ = plain_class(type(module))  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in frozen)


def require_adapted(model: nn.Module, what: str) -> FlixConfig:
    """The configuration of an adapted model.

    Raises:
        TargetError: the model is not adapted.
    """
    if not isinstance(model, RoutedModel) or "flix_config" not in vars(model):
        raise TargetError(
            f"{what} needs an adapted model, but this {type(model).__name__} is not; "
            "adapt(model, config) or load(model, folder) first"
        )
    return model.flix_config


__all__ = ["RoutedModel", "activated", "adapt", "flix_layers", "unadapt"]

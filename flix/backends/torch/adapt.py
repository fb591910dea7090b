"""Plain models become adapted ones, and plain again (docs/specification.md §5.2)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import nn

from flix.backends.protocol import Values
from flix.backends.torch.attention import (
    FlixAttention,
    PackedProjection,
    attention_of,
    become_attention,
    become_packed,
    revert_attention,
)
from flix.backends.torch.experts import (
    ExpertsKernel,
    become_kernel,
    experts_of,
    revert_kernel,
    site,
)
from flix.backends.torch.kernels.choice import require_triton
from flix.backends.torch.layer import FlixLayer, flix_layers
from flix.backends.torch.parameters import BANK, Bank
from flix.backends.torch.patches import checkpoint, parents
from flix.backends.torch.patches.hooked import device_of, rebind
from flix.backends.torch.patches.models import RoutedModel, plain_class, routed_class
from flix.backends.torch.rows import known_marks
from flix.backends.torch.scaled import same_scale
from flix.backends.torch.state import FlixState
from flix.backends.torch.targets import adaptable, become, revert, target_of
from flix.backends.torch.versions import require_known
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.flat import flat_layout
from flix.core.config.config import FlixConfig
from flix.core.config.targets import LayerInfo, is_head


def layer_infos(model: nn.Module) -> list[LayerInfo]:
    """Every module of a model as the target rules see it."""
    head = None
    with suppress(NotImplementedError, AttributeError):
        head = model.get_output_embeddings()  # type: ignore[operator]
    refused = {
        id(module.out_proj): reason
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and (reason := _unread(path, module))
    }
    infos = []
    for path, module in model.named_modules():
        if not path:
            continue
        target, reason = adaptable(module)
        if isinstance(module, FlixLayer):
            target, reason = type(module), ""
        elif id(module) in refused:
            target, reason = None, refused[id(module)]
        shape = LayerShape(0, 0, "") if target is None else target.shape_of(module)
        told = module is head or is_head(path)
        lookup = isinstance(module, nn.Embedding)
        named = isinstance(module, nn.modules.conv._ConvNd)
        kernels, unlike = experts_of(module)
        reason = "" if kernels else unlike or reason
        kernels = kernels or attention_of(module)[0]
        given = (shape.kind, shape.d_in, shape.d_out)
        infos.append(LayerInfo(path, *given, told, reason, lookup, named=named))
        for name, s in kernels.items():
            sizes = (s.kind, s.d_in, s.d_out)
            own = f"{path}.{name}"
            infos.append(LayerInfo(own, *sizes, experts=s.experts, active=s.active))
    return infos


def _unread(path: str, module: nn.MultiheadAttention) -> str:
    """Why the ``out_proj`` of an attention cannot be adapted."""
    reason = attention_of(module)[1] if path else "it is the whole model"
    return reason and f"nn.MultiheadAttention reads its kernel and skips its forward: {reason}"


def peft_layer(model: nn.Module) -> str | None:
    """The path of a model's first layer of PEFT's, if it has any."""
    library = sys.modules.get("peft.tuners.tuners_utils")
    kind = getattr(library, "BaseTunerLayer", ())
    return next((path for path, module in model.named_modules() if isinstance(module, kind)), None)


def attach(
    model: nn.Module, config: FlixConfig, paths: Sequence[str], strategy: str, values: Values
) -> None:
    """Adapt the layers at these paths, whatever the configuration's patterns say, and freeze the base."""
    require_triton(strategy)
    require_known(model)
    trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    modules = dict(model.named_modules())
    for path in paths:
        if path in modules:
            target_of(modules[path], path)
    model.requires_grad_(False)
    bank = Bank(config.registry.features, flat_layout(config, {}))
    state = FlixState(config, bank, strategy, trained)
    shapes = become_layers(model, state, paths)
    bank.arrange(config.registry.features, flat_layout(config, shapes))
    device = device_of(site(model, paths[0])[0])
    kernels = (getattr(layer, "weight", None) for _, layer in flix_layers(model))
    wide = any(kernel is not None and kernel.dtype == torch.float64 for kernel in kernels)
    # Pairs of a half-precision base are kept in float32, where small updates do not round away.
    dtype = torch.float64 if wide else torch.float32
    pairs = ((path, values(path, shape)) for path, shape in shapes.items())
    bank.receive(pairs, config.registry.live, dtype, device)
    bank.to(device)
    checkpoint.install()
    for module in (model, *_callable_alone(model)):
        if not isinstance(module, RoutedModel):
            plain = type(module)
            module.__class__ = routed_class(plain)
            rebind(module, plain)
        vars(module)["flix_state"] = state
    model._modules[BANK] = bank
    settle(model, state)


def settle(model: nn.Module, state: FlixState) -> None:
    """Note what the model's structure tells of its adapted layers' inputs, and let those act that would not."""
    parents.prepare(model)
    places = state.bank.layout.places
    # Modules of experts get all tokens, and send them to their kernels themselves.
    whole = {kernel.flix_name for kernel in _kernels(model)}
    paths = [path for path in places if path not in whole]
    state.marks.update((places[path], mark) for path, mark in known_marks(model, paths))


def _kernels(model: nn.Module) -> Iterator[ExpertsKernel]:
    return (layer for _, layer in flix_layers(model) if isinstance(layer, ExpertsKernel))


def become_layers(
    model: nn.Module, state: FlixState, paths: Sequence[str], start: int = 0
) -> dict[str, LayerShape]:
    """Turn the layers at these paths into adapted ones, with places from ``start`` on; their kinds and sizes."""
    modules, shapes = dict(model.named_modules()), {}
    for place, path in enumerate(paths, start):
        layer: FlixLayer | ExpertsKernel
        if path in modules:
            layer = become(modules[path], path, place, state)
            above = modules[path.rpartition(".")[0]]
            if isinstance(above, nn.MultiheadAttention):
                become_attention(above)
        else:
            where = site(model, path)
            packed = isinstance(where[0], nn.MultiheadAttention)
            layer = (become_packed if packed else become_kernel)(*where, path, place, state)
        shapes[path] = layer.shape_of(layer)
        if isinstance(layer, nn.Embedding):
            _relink(model, modules, path, set(paths))
    return shapes


def _relink(model: nn.Module, modules: dict[str, nn.Module], path: str, targets: set[str]) -> None:
    """Let embeddings that share an adapted one's kernel, and are not targets themselves, be that one.

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


def _callable_alone(model: nn.Module) -> list[nn.Module]:
    """Parts of a model that are called past its own forward: transformers' backbones, and encoders by generation."""
    library = sys.modules.get("transformers.modeling_utils")
    backbone = getattr(library, "PreTrainedModel", ())
    found = [
        module
        for module in model.modules()
        if module is not model and isinstance(module, backbone) and any(flix_layers(module))
    ]
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        encoder = model.get_encoder()  # type: ignore[operator]
        if isinstance(encoder, nn.Module) and encoder is not model and encoder not in found:
            found.append(encoder)
    return found


def unadapt(model: nn.Module) -> None:
    """Turn an adapted model, in place, back into the plain model it was; its features are gone."""
    trained = set(model.flix_state.trained)  # type: ignore[union-attr, arg-type]
    for _, layer in list(flix_layers(model)):
        if isinstance(layer, ExpertsKernel):
            revert_kernel(layer)
        elif not isinstance(layer, PackedProjection):
            revert(layer)
    for module in model.modules():
        if isinstance(module, FlixAttention):
            revert_attention(module)
    parents.release(model)
    model._modules.pop(BANK)
    for module in list(model.modules()):
        if isinstance(module, RoutedModel):
            vars(module).pop("flix_state")
            routed = type(module)
            module.__class__ = plain_class(routed)  # type: ignore[assignment]
            rebind(module, routed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def routed_models(model: nn.Module) -> Iterator[RoutedModel]:
    """The adapted models in a module: it, or those that it holds."""
    return (module for module in model.modules() if isinstance(module, RoutedModel))

"""One composition in a plain model's kernels, for good or for a while, and what PEFT's files say of a model."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from flix.backends import messages
from flix.backends.protocol import Updates
from flix.backends.torch.adapt import unadapt
from flix.backends.torch.around import FlixAround, is_quantised
from flix.backends.torch.attention import FlixAttention, PackedProjection
from flix.backends.torch.convolutions import FlixConvolution, peft_reason
from flix.backends.torch.enclosed import added, plain
from flix.backends.torch.experts import ExpertsKernel, site
from flix.backends.torch.heads import shares, trained_heads, whole_modules
from flix.backends.torch.layer import flix_layers
from flix.backends.torch.layers import FlixConv1D
from flix.backends.torch.patches.models import RoutedModel
from flix.backends.torch.sharded import FlixSharded
from flix.core.adapter.composition import Composition
from flix.core.errors import TargetError
from flix.core.peft.attention import TWICE
from flix.core.peft.exporting import PeftFacts, suffixes

Model = TypeVar("Model")
Torch = TypeVar("Torch", bound=nn.Module)


def dequantized(model: Model, active: Composition, update: Updates) -> Model:
    """As :func:`merged`, with plain linear layers in the place of those whose kernels are quantised."""
    return merged(model, active, update, dequantize=True)


def merged(
    model: Model, active: Composition, update: Updates, *, dequantize: bool = False
) -> Model:
    """A plain copy of the model with an update added to each adapted layer's kernel.

    A kernel that other modules share (an embedding tied to the head) is untied where its layer is adapted, since
    only that layer's kernel changes; the copy's configuration then says so. The copy refuses ``flix_features``, which
    transformers' models would take for one of their many keywords (a forward pre-hook does; files do not hold it).
    """
    _refuse_sharded(model, "merge")
    # Without the features' values, of which a composition needs few.
    kept = {id(p): p for p in model.flix_bank.parameters()}  # type: ignore[attr-defined]
    copied: Any = copy.deepcopy(model, kept)  # type: ignore[arg-type]
    straight = {path: layer.flix_transposed for path, layer in flix_layers(copied)}
    enclosed = {path for path, layer in flix_layers(copied) if isinstance(layer, FlixAround)}
    _check_here(copied, straight)
    unadapt(copied)
    if dequantize:
        _make_plain(copied, enclosed)
        enclosed = set()
    users = Counter(id(p) for m in copied.modules() for p in m._parameters.values())
    for path in straight:
        module, name = site(copied, path)
        if path in enclosed:
            added(module, path, torch.from_numpy(update(path)))
            continue
        weight: nn.Parameter = getattr(module, name)
        value = _folded(weight, update(path), straight[path])
        with torch.no_grad():
            if users[id(weight)] == 1:
                weight.copy_(value)
                continue
            setattr(module, name, nn.Parameter(value, requires_grad=weight.requires_grad))
            _untie(getattr(copied, "config", None))
    Merged.mark(copied, active)
    return copied  # type: ignore[no-any-return]


def _refuse_sharded(model: Any, verb: str) -> None:
    """Refuse kernels of which each process has a part.

    Raises:
        TargetError: there are.
    """
    for path, layer in flix_layers(model):
        if isinstance(layer, FlixSharded):
            raise TargetError(
                f"{verb}: layer {path!r} is spread over processes (tp_plan), and no process has its whole kernel; "
                f"save(model, folder), load(base, folder) with a base that is loaded without tp_plan, and {verb} there"
            )
        if hasattr(getattr(layer, "weight", None), "device_mesh"):
            raise TargetError(
                f"{verb}: the kernel of layer {path!r} is sharded (fully_shard), and no process has it whole; "
                f"save(model, folder), load(base, folder) with a base in one process, and {verb} there"
            )


def _check_here(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse kernels that are elsewhere.

    Raises:
        TargetError: one has no values here.
    """
    for path in paths:
        module, name = site(model, path)
        weight = getattr(module, name, None)
        if isinstance(weight, torch.Tensor) and weight.is_meta:
            raise TargetError(
                f"the kernel of layer {path!r} has no values here: it is offloaded, or on the meta device. Bring it back "
                "first, after offloading with accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )


def _make_plain(model: nn.Module, paths: Collection[str]) -> None:
    """Plain linear layers in the place of those at these paths; where none is quantised any more, nothing says so."""
    made: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path in paths:
            made[id(module)] = plain(module, path)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[id(module)])
    if any(is_quantised(module) for module in model.modules()):
        return
    settings: Any = getattr(model, "config", None)
    if getattr(settings, "quantization_config", None) is not None:
        del settings.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)


def _folded(kernel: nn.Parameter, update: Any, straight: bool) -> torch.Tensor:
    """A kernel plus an update ``[d_out, d_in]``, summed in float64, on its device and in its dtype."""
    change, own = torch.from_numpy(update), kernel.detach()
    made = torch.empty_like(own)
    # Experts one by one: in float64 all of them would take several times what the kernel does.
    one = change.dim() == 2  # a matrix, a convolution's kernel, too
    change = change.reshape(own.shape) if one and not straight else change
    parts = [(made, own, change)] if one else zip(made, own, change, strict=True)
    for to, kept, part in parts:
        to.copy_(kept.double().cpu() + (part.t() if straight else part))
    return made


class Merged:
    """A forward pre-hook of merged models, which refuses routing: their composition is fixed.

    A class of this module, so that copies and pickles of the model keep it.

    Attributes:
        compositions: what has been merged into the model, in order.
    """

    def __init__(self, compositions: tuple[Composition, ...]) -> None:
        self.compositions = compositions

    @classmethod
    def mark(cls, model: nn.Module, active: Composition) -> None:
        """Register the hook, in the place of that of an earlier merge."""
        before: tuple[Composition, ...] = ()
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, Merged):
                before = hook.compositions
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
        model.register_forward_pre_hook(cls((*before, active)), with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if "flix_features" not in kwargs and "flix_weights" not in kwargs:
            return
        # A merged model may be adapted anew; None is what a forward without routing is given.
        given = kwargs.get("flix_features") is not None or kwargs.get("flix_weights") is not None
        if isinstance(module, RoutedModel) or not given:
            return
        raise messages.merged(*self.compositions)


def _untie(settings: Any) -> None:
    """Tell a transformers configuration that embedding and head are two kernels now.

    T5 and its kin read the flag as "scale the decoder's output" too, so there it stays; transformers 5 sees by the
    saved kernels that they differ, and keeps them apart.
    """
    if getattr(settings, "tie_word_embeddings", False) and not settings.is_encoder_decoder:
        settings.tie_word_embeddings = False


def share_base(model: Torch) -> Torch:
    """A plain model over the same base: every base parameter and buffer is the other model's own, not a copy.

    Heads that train with the features are copied, and ``load`` gives a model heads of its own. Adapt it, and you have
    two adapters that cost one base in memory::

        other = load(share_base(model), "another adapter")

    Args:
        model: a plain or adapted model; it is not changed.
    """
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    if isinstance(model, RoutedModel):
        for head in trained_heads(model).values():
            del shared[id(head)]
    twin = copy.deepcopy(model, shared)
    if isinstance(twin, RoutedModel):
        trainable = [p.requires_grad for p in model.parameters()]
        unadapt(twin)
        # The twin's parameters are the first's: unadapting must not unfreeze those.
        for parameter, flag in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)
    shares(model, twin)
    return twin


def fold(model: nn.Module, row: Mapping[str, Any], update: Updates) -> None:
    """Add an update to each adapted layer's kernel; the model then takes no routing."""
    _refuse_sharded(model, "merge_in_place")
    layers = dict(flix_layers(model))
    _check_here(model, layers)
    for path, layer in layers.items():
        if isinstance(layer, FlixAround):
            raise TargetError(
                f"layer {path!r} ({type(layer).__name__}) has a kernel or a forward of its own "
                f"kind, which cannot be merged in place; merge(model, row) gives a copy, with "
                f"dequantize=True if the kernel is quantised"
            )
    for path, layer in layers.items():
        kernel: nn.Parameter = layer.weight  # type: ignore[assignment]
        # Another parameter, not other values: kernels that are tied to this one stay the base's.
        vars(layer)["flix_kernel"] = kernel
        value = _folded(kernel, update(path), layer.flix_transposed)
        layer.weight = nn.Parameter(value, requires_grad=False)
    model.flix_state.folded = dict(row)  # type: ignore[union-attr]


def unfold(model: nn.Module) -> None:
    """Give every kernel its own bits back."""
    for _, layer in flix_layers(model):
        kernel, device = vars(layer).pop("flix_kernel"), layer.weight.device
        kernel.data = kernel.data.to(device)  # the model may have been moved meanwhile
        layer.weight = kernel
    model.flix_state.folded = None  # type: ignore[union-attr]


def _family(settings: Any) -> str | None:
    """What transformers, and PEFT after it, read a model's older files as."""
    library = sys.modules.get("transformers.conversion_mapping")
    known = getattr(library, "_MODEL_TO_CONVERSION_PATTERN", {})
    found = known.get(getattr(settings, "model_type", None))
    return found if isinstance(found, str) else None


def peft_facts(model: nn.Module) -> PeftFacts:
    """What PEFT's and vLLM's files say of an adapted model."""
    settings = getattr(model, "config", None)
    layers = {p: layer for p, layer in flix_layers(model) if not isinstance(layer, ExpertsKernel)}
    convolutions = {p: c for p, c in layers.items() if isinstance(c, FlixConvolution)}
    modules = dict(model.named_modules())
    above = {path: path.rpartition(".")[0] for path in layers}
    packed = {p: above[p] for p, layer in layers.items() if isinstance(layer, PackedProjection)}
    outputs = [p for p in layers if isinstance(modules.get(above[p]), FlixAttention)]
    unread = {p: why for p, c in convolutions.items() if (why := peft_reason(c))}
    unread |= {path: TWICE for path in outputs if path not in packed}
    return PeftFacts(
        target_modules=suffixes([packed.get(p, p) for p in layers], list(modules)),
        architecture=type(model).__name__,
        modules=whole_modules(model),
        fan_in_fan_out=any(isinstance(layer, FlixConv1D) for layer in layers.values()),
        base_model=getattr(settings, "name_or_path", None) or None,
        encoder_decoder=bool(getattr(settings, "is_encoder_decoder", False)),
        vocabulary=getattr(settings, "vocab_size", None),
        family=_family(settings),
        attentions=list(packed.values()),
        kernels={p: c.kernel_size for p, c in convolutions.items()},
        unread=unread,
    )

"""One composition folded into a plain model, or written as one LoRA for PEFT and vLLM."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from flix.backends.torch._whole import whole_modules
from flix.backends.torch.files import to_adapter
from flix.backends.torch.layers import FlixConv1D
from flix.backends.torch.model import RoutedModel, flix_layers, require_adapted, unadapt
from flix.core.adapter.composition import Composition, composition, delta
from flix.core.errors import RoutingError
from flix.core.features.encoding import Row
from flix.core.files import Path_
from flix.core.peft.exporting import PeftExport, as_peft, cut_to_rank, with_modules, write_peft

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model, row: Row) -> Model:
    """A plain copy of the model with one composition folded into its kernels; no flix layer is left.

    A kernel that other modules share (an embedding tied to the head) is untied where its layer is adapted, since
    only that layer's kernel changes; the copy's configuration then says so.

    The copy refuses ``flix_features``, which transformers' models would take for one of their many keywords, with a
    :class:`flix.RoutingError` (a forward pre-hook does, see ``_forward_pre_hooks``; files do not hold it).

    Args:
        model: an adapted model; it is not changed.
        row: the composition, ``{group: name | [names] | {name: weight}}``.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "merge")
    active = composition(config, row)
    adapter = to_adapter(model)
    merged = copy.deepcopy(model)
    transposed = {path: isinstance(layer, FlixConv1D) for path, layer in flix_layers(merged)}
    unadapt(merged)
    users: dict[int, int] = {}
    for module in merged.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    for path, straight in transposed.items():
        module = merged.get_submodule(path)
        update = torch.from_numpy(delta(adapter, path, active))  # [d_out, d_in]
        if straight or adapter.layers[path].kind == "embedding":
            update = update.t()
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        with torch.no_grad():
            value = (weight.double().cpu() + update).to(device=weight.device, dtype=weight.dtype)
            if users[id(weight)] == 1:
                weight.copy_(value)
                continue
            module.weight = nn.Parameter(value, requires_grad=weight.requires_grad)
            _untie(getattr(merged, "config", None))
    Merged.mark(merged, active)
    return merged


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
        raise RoutingError(
            f"flix_features was given to a merged model; it holds the composition {self}, for all "
            "rows. Call it without, or call the adapted model that it was merged from"
        )

    def __str__(self) -> str:
        parts = []
        for active in self.compositions:
            features = [
                ":".join(feature) + ("" if weight == 1 else f" x {weight:g}")
                for feature, weight in active
            ]
            parts.append(" + ".join(features))
        return ", then ".join(parts)


def _untie(settings: Any) -> None:
    """Tell a transformers configuration that embedding and head are two kernels now.

    T5 and its kin read the flag as "scale the decoder's output" too, so there it stays; transformers 5 sees by the
    saved kernels that they differ, and keeps them apart.
    """
    if getattr(settings, "tie_word_embeddings", False) and not settings.is_encoder_decoder:
        settings.tie_word_embeddings = False


def export_peft(
    model: nn.Module, row: Row, directory: Path_, *, compress_to: int | None = None
) -> PeftExport:
    """Write one composition as a PEFT LoRA: exact, opened by PEFT and vLLM.

    Heads that were trained with the features go with it as whole modules (PEFT's ``modules_to_save``), which PEFT
    opens and vLLM does not.

    Args:
        model: an adapted model; it is not changed.
        row: the composition.
        directory: the folder to write; vLLM's flags call the LoRA by its name.
        compress_to: cut the composition to this rank where it has a larger one, and say what that costs. Default:
            never cut. (vLLM serves ranks up to 512.)

    Returns:
        The LoRA's rank, its error if it was cut, and whether vLLM serves it with which flags; print its ``message``.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
        AdapterError: the composition has no update anywhere, or a trained parameter has no place in PEFT's format.
        ConfigError: an ill-formed ``compress_to``.
        TargetError: the model is not adapted.
    """
    active = composition(require_adapted(model, "export_peft"), row)
    adapter = to_adapter(model)
    settings = getattr(model, "config", None)
    conv = any(isinstance(layer, FlixConv1D) for _, layer in flix_layers(model))
    config, tensors = as_peft(
        adapter,
        active,
        target_modules=_suffixes(model),
        fan_in_fan_out=conv,
        base_model=getattr(settings, "name_or_path", None) or None,
        task_type=_task_type(model),
    )
    error = 0.0
    if compress_to is not None:
        config, tensors, error = cut_to_rank(config, tensors, compress_to)
    config, tensors = with_modules(config, tensors, whole_modules(model))
    return write_peft(
        directory,
        config,
        tensors,
        error=error,
        architecture=type(model).__name__,
        encoder_decoder=bool(getattr(settings, "is_encoder_decoder", False)),
        vocabulary=getattr(settings, "vocab_size", None),
    )


def _suffixes(model: nn.Module) -> list[str]:
    """The adapted layers as PEFT's target list: last components where they are exact, as servers want them."""
    adapted = {path for path, _ in flix_layers(model)}
    others = {path for path, _ in model.named_modules()} - adapted
    plain = {path.rsplit(".", 1)[-1] for path in others}
    tails = {path.rsplit(".", 1)[-1] for path in adapted}
    full = [path for path in adapted if path.rsplit(".", 1)[-1] in plain]
    return sorted({tail for tail in tails if tail not in plain}) + sorted(full)


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    for ending, task in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
    ):
        if name.endswith(ending):
            return task
    return None

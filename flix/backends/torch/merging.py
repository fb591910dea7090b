"""One composition folded into a plain model, or written as one LoRA for PEFT and vLLM."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from flix.backends.torch.files import to_adapter
from flix.backends.torch.layers import FlixConv1D
from flix.backends.torch.model import flix_layers, require_adapted, unadapt
from flix.core.adapter import Path_
from flix.core.composition import composition, delta
from flix.core.peft_format import PeftExport, as_peft, write_peft
from flix.core.routing import Row

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model, row: Row) -> Model:
    """A plain copy of the model with one composition folded into its kernels; no flix layer is left.

    A kernel that other modules share (an embedding tied to the head) is untied where its layer is adapted, since
    only that layer's kernel changes; the copy's configuration then says so.

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
    return merged


def _untie(settings: Any) -> None:
    """Tell a transformers configuration that embedding and head are two kernels now.

    T5 and its kin read the flag as "scale the decoder's output" too, so there it stays; transformers 5 sees by the
    saved kernels that they differ, and keeps them apart.
    """
    if getattr(settings, "tie_word_embeddings", False) and not settings.is_encoder_decoder:
        settings.tie_word_embeddings = False


def export_peft(model: nn.Module, row: Row, directory: Path_) -> PeftExport:
    """Write one composition as a PEFT LoRA: exact, opened by PEFT and vLLM.

    Args:
        model: an adapted model; it is not changed.
        row: the composition.
        directory: the folder to write.

    Returns:
        The LoRA's rank, and the ``--max-lora-rank`` that vLLM needs.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
        AdapterError: the composition has no update anywhere.
        TargetError: the model is not adapted.
    """
    active = composition(require_adapted(model, "export_peft"), row)
    adapter = to_adapter(model)
    conv = any(isinstance(layer, FlixConv1D) for _, layer in flix_layers(model))
    config, tensors = as_peft(
        adapter,
        active,
        target_modules=_suffixes(model),
        fan_in_fan_out=conv,
        base_model=getattr(getattr(model, "config", None), "name_or_path", None) or None,
        task_type=_task_type(model),
    )
    return write_peft(directory, config, tensors)


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

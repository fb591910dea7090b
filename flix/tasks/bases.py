"""Base models and tokenizers, from a folder or a hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flix.core.adapter.adapter import Adapter, LayerShape
from flix.core.config.targets import Patterns, select
from flix.core.config.unused import unused_exclusions
from flix.core.errors import AdapterError, listed, near, warn
from flix.tasks.errors import ModelError, missing_extra
from flix.tasks.making import check_together, heads_of
from flix.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn

_AUTO = {"seq2seq": "AutoModelForSeq2SeqLM", "causal": "AutoModelForCausalLM"}


def locate(name: str, folder: Path = Path(".")) -> str:
    """A model's folder, if there is one of this name next to the configuration; otherwise its hub name.

    Raises:
        ModelError: the name can only be a folder, and there is no such folder.
    """
    place = folder / os.path.expanduser(name)
    if place.is_dir():
        return str(place)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or place.exists():
        parent = place.parent
        present = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise ModelError(f"no model folder {str(place)!r}{near(place.name, present)}")
    return name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name.

    Raises:
        ModelError: no tokenizer can be loaded.
    """
    transformers = _transformers()
    return _loaded(
        lambda: transformers.AutoTokenizer.from_pretrained(name), f"no tokenizer in {name!r}"
    )


def load_base(
    name: str, tasks: Sequence[Task], dtype: str = "float32", *, revision: str | None = None
) -> Any:
    """A base model with its weights, of the class that the tasks need.

    Args:
        name: folder or hub name, as :func:`locate` gives it.
        tasks: what the model will do.
        dtype: the dtype of the parameters; ``"auto"`` keeps that of the file.
        revision: a commit of the hub.

    Raises:
        ConfigError: tasks that cannot be combined.
        ModelError: the model cannot be loaded, or cannot do the tasks.
    """
    check_together(tasks)
    if tasks[0].generates:
        return load_model(name, tasks[0].kind, dtype, revision=revision)
    from flix.tasks.heads import HeadedModel

    at = {} if revision is None else {"revision": revision}
    masked = any(task.kind == "masked" for task in tasks)
    encoder, lm, fresh = _encoder(name, masked, dtype=dtype, **at)
    model = HeadedModel(encoder, tasks, last=_reads_last(_config(name)), lm=lm)
    known = {n for n, _ in model.named_parameters()}
    model.fresh = tuple(n for n in (f"lm_head.{key}" for key in fresh) if n in known)
    return model


def _encoder(name: str, masked: bool, **settings: Any) -> tuple[Any, Any, Sequence[str]]:
    """A base without its output head; for masked texts the model with it, and what of the head the files lack."""
    transformers, config = _transformers(), _config(name)
    what = f"the base model {name!r} cannot be loaded"
    if masked:
        if type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            raise ModelError(
                f"the base model {name!r} ({config.model_type}) has no head that fills masks, which a masked task needs; take "
                "an encoder that does (BERT, XLM-R and their like), or leave the masked task out"
            )
        maker = transformers.AutoModelForMaskedLM
        load = maker.from_pretrained
        lm, said = _loaded(lambda: load(name, output_loading_info=True, **settings), what)
        return getattr(lm, lm.base_model_prefix), lm, tuple(said["missing_keys"])
    load = transformers.AutoModel.from_pretrained
    return _inner(_without_pooler(lambda **more: load(name, **settings, **more), what)), None, ()


def _without_pooler(load: Callable[..., Any], what: str) -> Any:
    """A model without the layer over its first position that some have: nothing reads it here."""
    try:
        return load(add_pooling_layer=False)
    except TypeError:  # a model that has none
        return _loaded(load, what)
    except Exception as error:
        raise ModelError(f"{what}: {_first_line(error)}") from error


def _inner(model: Any) -> Any:
    """The encoder of an encoder-decoder, any other model as it is."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _reads_last(config: Any) -> bool:
    """Whether a model's last position alone has seen all others."""
    transformers = _transformers()
    if getattr(config, "is_encoder_decoder", False):
        return False
    fills = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    writes = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return bool(getattr(config, "is_decoder", False)) or (writes and not fills)


def load_model(
    name: str, kind: str | None = None, dtype: str = "float32", *, revision: str | None = None
) -> Any:
    """Load a model, without changing its head.

    Args:
        name: folder or hub name.
        kind: ``"seq2seq"``, ``"causal"``, or None for the class that the model's configuration names.
        dtype: the dtype of the parameters; ``"auto"`` keeps that of the file.
        revision: a commit of the hub.

    Raises:
        ModelError: the model cannot be loaded, or is of the other kind.
    """
    at = {} if revision is None else {"revision": revision}
    return load_class(name, _maker(name, kind), dtype, **at)[0]


def load_class(
    name: str, maker: Any = None, dtype: str = "float32", **settings: Any
) -> tuple[Any, tuple[str, ...]]:
    """A model by a class with ``from_pretrained``, by default the one that its configuration names.

    Returns:
        The model, and the names of parameters that its files lack, so that they begin at random.

    Raises:
        ModelError: it cannot be loaded.
    """
    maker = _maker(name, None) if maker is None else maker
    model, said = _loaded(
        lambda: maker.from_pretrained(name, dtype=dtype, output_loading_info=True, **settings),
        f"the base model {name!r} cannot be loaded",
    )
    return model, tuple(sorted(said["missing_keys"]))


def model_layers(
    name: str, kind: str | None, targets: Patterns, excluded: Patterns
) -> dict[str, LayerShape]:
    """The layers of a model that would be adapted. The model is built without weights, from its configuration alone.

    Args:
        name: folder or hub name.
        kind: of the tasks; None for the class that the model's configuration names.
        targets, excluded: as for ``FlixConfig``.

    Raises:
        ModelError: no such model.
        TargetError: patterns that match nothing.
    """
    import torch

    from flix.backends.torch import primitives

    config, what = _config(name), f"the base model {name!r} cannot be built"
    model: Any
    with torch.device("meta"):
        if kind is None or kind in _AUTO:
            maker = _maker(name, kind)
            build = getattr(maker, "from_config", None) or maker._from_config
            model = _loaded(lambda: build(config), what)
        else:
            build = _transformers().AutoModel.from_config
            inner = _inner(_without_pooler(lambda **more: build(config, **more), what))
            model = torch.nn.ModuleDict({"encoder": inner})
    layers = primitives.layers(model)
    chosen = select(layers, targets, excluded)
    for text in unused_exclusions([i.path for i in layers], excluded):
        warn(text)
    return {i.path: LayerShape.told(i) for i in chosen}


def enable_checkpointing(model: nn.Module) -> None:
    """Switch on activation checkpointing, under either name that transformers has used for it.

    Raises:
        ModelError: the model does not support it.
    """
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        enable: Any = getattr(model, f"{name}_enable", None)
        if enable is not None:
            try:
                enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            except ValueError as error:
                raise ModelError(f"gradient_checkpointing: {error}") from None
            return
    raise ModelError(f"{type(model).__name__} supports no gradient checkpointing")


def _transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise missing_extra("loading a base model", "transformers", error) from None
    return transformers


def _config(name: str) -> Any:
    transformers = _transformers()
    return _loaded(
        lambda: transformers.AutoConfig.from_pretrained(name),
        f"the base model {name!r} cannot be loaded",
    )


def _maker(name: str, kind: str | None) -> Any:
    """The class that loads a model."""
    transformers, config = _transformers(), _config(name)
    own = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"
    if kind is None:
        for architecture in getattr(config, "architectures", None) or ():
            if found := getattr(transformers, architecture, None):
                return found
        kind = own
    if kind != own:
        raise ModelError(f"the base model {name!r} is {own}, not {kind}; say kind: {own}")
    return getattr(transformers, _AUTO[kind])


def _loaded(load: Callable[[], Any], what: str) -> Any:
    """What ``load`` returns; what transformers raises for a user's mistake becomes one line."""
    try:
        return load()
    except Exception as error:
        # A folder's files can be damaged in any way, and each library on the way raises errors of its own.
        raise ModelError(f"{what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def train_heads(model: Any) -> Any:
    """Let the heads of an adapted model train, because they start at random. A generative model has none.

    The base's own head, which fills masks, stays frozen, except for parameters that the base's files lack.

    Returns:
        The model.
    """
    parameters = dict(model.named_parameters())
    for name in begun(model):
        parameters[name].requires_grad_(True)
        # Compiled, every head is run: without this, momentum would move one that no row of a batch needed.
        parameters[name].register_post_accumulate_grad_hook(_forget_nothing)
    return model


def begun(model: Any) -> tuple[str, ...]:
    """The parameters of a headed model that begin at random, by name; of other models none."""
    if not hasattr(model, "fresh"):
        return ()
    return (
        *(f"classifier.{name}" for name, _ in model.classifier.named_parameters()),
        *model.fresh,
    )


def check_heads(model: Any, tasks: Sequence[Task], adapter: Adapter) -> None:
    """Refuse tasks that an adapter has no head of: a new one would answer at random.

    Args:
        model: as :func:`load_base` gives it.
        tasks: the model's.
        adapter: the adapter.

    Raises:
        AdapterError: there are some.
    """
    if not hasattr(model, "classifier") or not hasattr(model, "fresh"):
        return
    lost = {
        task.name
        for task, name in zip(heads_of(tasks)[0], model.names, strict=True)
        if name in model.classifier and f"classifier.{name}.weight" not in adapter.heads
    }
    if lost:
        known = sorted({name.split(".")[1] for name in adapter.heads if name.startswith("classifier.")})  # fmt: skip
        raise AdapterError(
            f"the adapter has no head of the task {listed(map(repr, sorted(lost)))}, which would answer at random"
            f"{near(min(lost), known)}; its heads are of: {listed(known) or 'no task'}"
        )


def _forget_nothing(parameter: Any) -> None:
    if not parameter.grad.any():
        parameter.grad = None

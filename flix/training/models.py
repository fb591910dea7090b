"""The adapted model of a run, its tasks, and the collator that makes its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flix import ranks as rules
from flix.core.adapter.adapter import Adapter
from flix.core.config.config import FlixConfig
from flix.core.config.ranks import Rule
from flix.core.config.unused import unused_exclusions, unused_settings
from flix.core.errors import FeatureError
from flix.core.features.dropout import FeatureDropout
from flix.core.features.registry import FeatureRegistry
from flix.data.display import feature_rows, trained_rows
from flix.tasks import (
    Task,
    load_base,
    load_tokenizer,
    locate,
    make_task,
    train_heads,
    unknown_notes,
)
from flix.tasks.bases import check_heads
from flix.tasks.positions import within_positions
from flix.tasks.recipe import as_trained
from flix.tasks.specs import Spec
from flix.tasks.starting import grown_from, start, start_folder
from flix.training import settings as forms
from flix.training.data import Data
from flix.training.settings import Settings

if TYPE_CHECKING:
    from flix.transformers import FlixCollator


LENGTHS = ("max_source_tokens", "max_target_tokens")


@dataclass(frozen=True)
class Built:
    """What a run works with.

    Attributes:
        model: the adapted model.
        tasks: a row's column ``flix_task`` is a place in them.
        collator: makes batches with routing.
        tokenizer: the model's.
        said: what to say of settings that match nothing, and of texts that the base has no positions for.
    """

    model: Any
    tasks: tuple[Task, ...]
    collator: FlixCollator
    tokenizer: Any
    said: tuple[str, ...] = ()

    def notes(self, rows: Sequence[Any], cells: Sequence[str], refuse: bool) -> list[str]:
        """What to say before a run, also of targets that the model cannot write."""
        return [*self.said, *unknown_notes(self.tasks, rows, cells, refuse=refuse)]


def build(
    settings: Settings,
    data: Data,
    config: FlixConfig,
    *,
    adapter: Adapter | None = None,
    folder: Path | None = None,
) -> Built:
    """The base with the features in it, and what makes its batches.

    Args:
        settings: the configuration.
        data: the data; its tasks are the model's.
        config: of the features.
        adapter: whose values the features get; default: new ones.
        folder: the adapter's; what it was trained to do is read from there.

    Raises:
        FlixError: a model, tokenizer or task that does not fit.
    """
    import torch

    from flix.backends.torch import adapt, load_into, primitives
    from flix.tasks import TaskCollator
    from flix.tasks.packing import PackingCollator
    from flix.transformers import FlixCollator

    t = settings.training
    if t.threads is not None:
        torch.set_num_threads(t.threads)
    name = locate(settings.model, settings.base_folder)
    tokenizer = load_tokenizer(locate(settings.tokenizer, settings.base_folder) if settings.tokenizer else name)  # fmt: skip
    begin = start_folder(settings.start_from, settings.base_folder) if adapter is None else None
    tasks = [_task(settings, spec, tokenizer) for spec in as_trained(data.specs, folder or begin)]
    base = load_base(name, tasks, t.dtype)
    if adapter is not None:
        check_heads(base, tasks, adapter)
    asked = [getattr(t, key) != type(t).model_fields[key].default for key in LENGTHS]
    tasks, cut = within_positions(base, tasks, (asked[0], asked[1]))
    tasks = [replace(task, vocabulary=_vocabulary(base)) for task in tasks]
    unused = [] if adapter else unused_exclusions([i.path for i in primitives.layers(base)], config.exclude_modules)  # fmt: skip
    model = train_heads(adapt(base, config)) if adapter is None else load_into(base, adapter).eval()
    if adapter is None:
        unused += unused_settings(config, primitives.shapes(model))
    if begin is not None:
        model = start(model, begin, tasks, settings.output_folder, freeze=settings.freeze_start)
    if adapter is not None and t.device == "auto" and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    inner = TaskCollator(tasks, tokenizer, seed=settings.seed)
    columns = {group: group for group in data.groups}
    given: Any = {"unknown": settings.unknown, "seed": settings.seed}
    collator = (
        FlixCollator(config, inner, columns, **given)
        if t.packing is None
        else PackingCollator(config, inner, columns, length=t.packing, **given)
    )
    return Built(model, tuple(tasks), collator, tokenizer, (*unused, *cut))


def _task(settings: Settings, spec: Spec, tokenizer: Any) -> Task:
    return make_task(
        spec.kind,
        tokenizer,
        name=spec.name,
        columns=dict(spec.columns),
        prompt=spec.prompt,
        labels=spec.labels,
        max_source=settings.training.max_source_tokens,
        max_target=settings.training.max_target_tokens,
    )


def _vocabulary(model: Any) -> int | None:
    embedding = model.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None)


def build_config(settings: Settings, data: Data) -> FlixConfig:
    """The configuration of the adapted model.

    Raises:
        ConfigError, RankError, FeatureError: a setting that breaks its rule, or that ``start_from`` has otherwise.
    """
    dropout = settings.feature_dropout
    registry = data.mixture.registry()
    if settings.registry is not None:
        registry = FeatureRegistry(settings.registry, data.implies)
    asked = FlixConfig(
        registry=registry,
        ranks=rank_rule(settings.ranks, data, registry),
        alpha=settings.alpha,
        scaling=settings.scaling,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        feature_dropout=FeatureDropout(**dropout.model_dump()) if dropout is not None else None,
        lora_dropout=settings.lora_dropout,
        unknown=settings.unknown,
        seed=settings.seed,
        init=settings.init,
    )
    found = grown_from(asked, settings.start_from, settings.base_folder)
    for group in settings.evaluation.unseen_group_weights:
        try:
            found.registry.ids_of(group)
        except FeatureError as error:
            raise FeatureError(f"evaluation.unseen_group_weights: {error}") from None
    return found


def rank_rule(ranks: Any, data: Data, registry: FeatureRegistry) -> Rule:
    """The rule that the ``ranks`` setting names; what it needs of the data comes from the data."""
    if isinstance(ranks, forms.UniformRanks):
        return rules.uniform(ranks.rank)
    if isinstance(ranks, forms.ByGroupRanks):
        return rules.by_group(**(ranks.model_extra or {}))
    if isinstance(ranks, forms.ExplicitRanks):
        return rules.explicit(ranks.ranks)
    if isinstance(ranks, forms.ProportionalRanks):
        return rules.proportional(
            budget=ranks.budget,
            sizes=ranks.sizes if ranks.sizes is not None else feature_rows(data.mixture, registry),
            temperature=ranks.temperature,
            minimum=ranks.minimum,
            maximum=ranks.maximum,
        )
    if isinstance(ranks, forms.ComputeMatchedRanks):
        return rules.compute_matched(lora_rank=ranks.lora_rank, datasets=trained_rows(data.mixture))
    return rules.parameter_matched(lora_rank=ranks.lora_rank)

"""From settings and data to a :class:`flix.FlixConfig`."""

from __future__ import annotations

from typing import Any

from flix import ranks as rules
from flix.core.config.config import FlixConfig
from flix.core.config.ranks import Rule
from flix.core.features.dropout import FeatureDropout
from flix.training import settings as forms
from flix.training.corpus import Corpus


def build_config(settings: forms.Settings, corpus: Corpus) -> FlixConfig:
    """The configuration of the adapted model.

    Raises:
        ConfigError, RankError, FeatureError: a setting that breaks its rule.
    """
    dropout = settings.feature_dropout
    return FlixConfig(
        registry=corpus.registry,
        ranks=rank_rule(settings.ranks, corpus),
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


def rank_rule(ranks: Any, corpus: Corpus) -> Rule:
    """The rule that the ``ranks`` setting names; what it needs of the data comes from the corpus."""
    if isinstance(ranks, forms.UniformRanks):
        return rules.uniform(ranks.rank)
    if isinstance(ranks, forms.ByGroupRanks):
        return rules.by_group(**(ranks.model_extra or {}))
    if isinstance(ranks, forms.ExplicitRanks):
        return rules.explicit(ranks.ranks)
    if isinstance(ranks, forms.ProportionalRanks):
        return rules.proportional(
            budget=ranks.budget,
            sizes=ranks.sizes if ranks.sizes is not None else corpus.sizes(),
            temperature=ranks.temperature,
            minimum=ranks.minimum,
            maximum=ranks.maximum,
        )
    if isinstance(ranks, forms.ComputeMatchedRanks):
        return rules.compute_matched(lora_rank=ranks.lora_rank, datasets=corpus.trained_rows())
    return rules.parameter_matched(lora_rank=ranks.lora_rank)

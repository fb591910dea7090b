"""Features over a model's life: a new language or task joins a trained model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flix.backends.tensorflow._base import flix_layers, forget_traces
from flix.backends.tensorflow.model import FlixModel, require_adapted
from flix.core.factors import resized_mean
from flix.core.layout import LayerLayout
from flix.core.lifecycle import plan_growth
from flix.core.registry import Feature


def add_feature(
    model: FlixModel,
    group: str,
    name: str,
    rank: int | None = None,
    *,
    init_from: str | Sequence[str] | None = None,
    freeze_others: bool = True,
    alpha: float | None = None,
    implies: Sequence[Feature] = (),
) -> None:
    """Add one feature to an adapted model, in place; ids and values of the others stay.

    The layers' tables are variables of a fixed size and are made anew, so the model must be compiled again, with a
    fresh optimizer, and functions traced by hand (``tf.function``) must be made again.

    Args:
        model: an adapted model.
        group: a group of its registry.
        name: the new feature.
        rank: its rank in every layer; default: that of ``init_from``.
        init_from: None for fresh values (the update starts at zero), or features of the group whose update (for
            several: the mean of whose updates) the new one starts from, as near as its rank allows.
        freeze_others: let only the new feature train.
        alpha: its alpha; default: the configuration's rule.
        implies: features that it implies.

    Raises:
        FeatureError: an unknown group or source, or a name that exists already.
        RankError: no rank and nothing to take it from.
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "add_feature")
    growth = plan_growth(
        config, group, name, rank, init_from=init_from, alpha=alpha, implies=implies
    )
    grown, feature, origins = growth.config, growth.feature, growth.origins
    layouts: dict[LayerLayout, LayerLayout] = {}
    for path, layer in flix_layers(model.base):
        a, b = {}, {}
        for other, a_old, b_old in layer.pairs():
            a[other], b[other] = a_old, b_old
        layout = grown.layout(path)
        frozen = tuple(range(len(config.registry))) if freeze_others else layer.flix_frozen
        layer.set_config(grown, layouts.setdefault(layout, layout), frozen)
        a_new, b_new = layer.fresh_a(feature), np.zeros((layer.d_out, grown.rank(path, feature)))
        known = [origin for origin in origins if origin in a]
        if known and len(a_new):
            pairs = [(a[o].astype(np.float64), b[o].astype(np.float64)) for o in known]
            scales = [grown.scale(path, origin) for origin in known]
            scale = grown.scale(path, feature)
            a_new, b_new = resized_mean(pairs, scales, a_new, scale, len(origins))
        for other in grown.registry.features:
            a.setdefault(other, np.zeros((0, layer.d_in)))
            b.setdefault(other, np.zeros((layer.d_out, 0)))
        layer.make_tables({**a, feature: a_new}, {**b, feature: b_new})
    model.flix_config = grown
    forget_traces(model)
    forget_traces(model.base)
    model.compiled = False

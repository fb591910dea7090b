"""One composition for every call of a model, where the caller has no keyword for it (a pipeline, a metric)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flix.backends.torch import scopes
from flix.backends.torch.adapt import routed_models
from flix.backends.torch.calls import refuse_folded
from flix.backends.torch.patches.models import RoutedModel
from flix.backends.torch.routing import Uniform
from flix.core.errors import RoutingError, TargetError
from flix.core.features.encoding import Row
from flix.core.features.routing import Routing, unpacked


@contextmanager
def routed(model: nn.Module, features: Row | Routing) -> Iterator[None]:
    """Run a model's calls without ``flix_features`` under one composition for all rows.

    Use it with code that calls the model itself, such as transformers' pipelines::

        with routed(model, {"language": "hau", "task": "ner"}):
            found = pipe(texts)

    Batches may have any size, ``generate()`` may use beams, and parts of the model may be called alone. A call with
    ``flix_features`` uses those; if blocks are nested, the inner one counts. A block applies to the thread or asyncio
    task that entered it, and to what it starts with ``asyncio.to_thread`` or as tasks. It applies to this model (or,
    for a wrapper such as DDP or a compiled model, to the adapted models inside it), but not to copies. Make results
    inside the block, because iterators that call the model later run without it.

    Args:
        model: an adapted model, or a module that holds one.
        features: ``{group: name | [names] | {name: weight}}``, encoded under the configuration's ``unknown``, or a
            :class:`flix.Routing` of one row. ``{}`` means the base alone.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, routing of several rows, or a model that is merged in
            place.
        TargetError: there is no adapted model.
    """
    members = list(routed_models(model))
    if not members:
        raise TargetError(
            f"routed needs an adapted model, but this {type(model).__name__} is not, and holds none; "
            "adapt(model, config) or load(model, folder) first"
        )
    for member in members:
        refuse_folded(member.flix_state)
    defaults = {member.flix_state: _uniform(member, features) for member in members}
    entries = [scopes.enter(state, uniform) for state, uniform in defaults.items()]
    try:
        yield
    finally:
        for entry in entries:
            scopes.leave(entry)


def _uniform(model: RoutedModel, features: Row | Routing) -> Uniform:
    config = model.flix_config
    if isinstance(features, Routing):
        unpacked(config.registry, features, None)  # refuses another registry's
        routing = features
        if routing.ids.ndim != 2 or len(routing) != 1:
            raise RoutingError(
                "routed takes one composition for all rows, but the routing has the shape "
                f"{list(routing.ids.shape)}; give one row, or pass flix_features to the call"
            )
    else:
        routing = config.registry.encode([features], unknown=config.unknown)
    ids = torch.from_numpy(routing.ids[0].astype("int64"))
    weights = torch.from_numpy(routing.weights[0].copy())
    plain = bool((weights[ids >= 0] == 1).all())
    return Uniform(config.registry, ids, None if plain else weights)

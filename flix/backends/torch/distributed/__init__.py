"""Adapted models in several processes (docs/specification.md §5.2.5, docs/distributed.md).

``reduce_features(model)`` averages, over the processes, the gradients of the features that acted;
``shard_features(model, mesh)`` gives each process an equal part of every feature;
``save_checkpoint`` and ``load_checkpoint`` write and read what trains, in any number of processes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flix.backends.torch.distributed.checkpoints import (
        last_checkpoint,
        load_checkpoint,
        save_checkpoint,
    )
    from flix.backends.torch.distributed.reducing import Reducer, reduce_features
    from flix.backends.torch.distributed.sharding import shard_features, whole_features
    from flix.backends.torch.distributed.traffic import Traffic

_HOMES = {
    "Reducer": "reducing",
    "Traffic": "traffic",
    "last_checkpoint": "checkpoints",
    "load_checkpoint": "checkpoints",
    "reduce_features": "reducing",
    "save_checkpoint": "checkpoints",
    "shard_features": "sharding",
    "whole_features": "sharding",
}

__all__ = [
    "Reducer",
    "Traffic",
    "last_checkpoint",
    "load_checkpoint",
    "reduce_features",
    "save_checkpoint",
    "shard_features",
    "whole_features",
]


def __getattr__(name: str) -> Any:
    """The public names, when they are asked for: a model's forward needs this package, and these need models."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

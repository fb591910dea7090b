"""Training and evaluation from a configuration: the library behind ``flix train`` and ``flix evaluate``.

::

    from flix.training import evaluate, read_settings, train
    settings = read_settings("train.yaml")
    result = train(settings)

Importing this package loads no framework; code that needs one imports it when it runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flix.training.evaluation import evaluate
    from flix.training.reading import read_settings
    from flix.training.run import train
    from flix.training.settings import Settings

_HOMES = {
    "Settings": "flix.training.settings",
    "evaluate": "flix.training.evaluation",
    "read_settings": "flix.training.reading",
    "train": "flix.training.run",
}

__all__ = ["Settings", "evaluate", "read_settings", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

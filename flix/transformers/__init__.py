"""Hugging Face Trainer and Accelerate: a collator, trainers, and rows that know their place in the run.

::

    from flix.transformers import FlixCollator, FlixTrainer
    collator = FlixCollator(config, DataCollatorWithPadding(tokenizer))
    trainer = FlixTrainer(model=adapt(model, config), args=args, data_collator=collator, train_dataset=rows)
    trainer.train()

``docs/trainer.md`` is the guide. Each name is imported on demand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flix.core.sampling.packing import pack
    from flix.transformers.checkpoints import last_checkpoint
    from flix.transformers.collator import FlixCollator
    from flix.transformers.numbering import numbered
    from flix.transformers.trainer import FlixSeq2SeqTrainer, FlixTrainer, FlixTrainerMixin

_HOMES = {
    "FlixCollator": "flix.transformers.collator",
    "FlixSeq2SeqTrainer": "flix.transformers.trainer",
    "FlixTrainer": "flix.transformers.trainer",
    "FlixTrainerMixin": "flix.transformers.trainer",
    "last_checkpoint": "flix.transformers.checkpoints",
    "numbered": "flix.transformers.numbering",
    "pack": "flix.core.sampling.packing",
}

__all__ = [
    "FlixCollator",
    "FlixSeq2SeqTrainer",
    "FlixTrainer",
    "FlixTrainerMixin",
    "last_checkpoint",
    "numbered",
    "pack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home in ("flix.transformers.trainer", "flix.transformers.collator"):
        _require_transformers(name)
    return getattr(importlib.import_module(home), name)


def _require_transformers(name: str) -> None:
    """A clear error where a package that the Trainer needs is not installed."""
    from flix.core.errors import MissingFrameworkError

    for package in ("torch", "transformers", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingFrameworkError(
                f"{name} needs {package}, which is not installed; install it with: "
                'pip install "flix-peft[transformers]"'
            ) from error

"""Telling a dataset the epoch of a ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class TellEpoch(TrainerCallback):  # type: ignore[misc]
    """Calls a dataset's ``set_epoch`` when the Trainer begins an epoch.

    Accelerate's loaders do so too, but not with a shuffling sampler in several processes, nor in the epoch in which a
    run is resumed.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A resumed epoch begins at a fraction; 1e-6 is for what rounding takes from a whole number.
        self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))

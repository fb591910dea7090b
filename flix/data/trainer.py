"""Telling a mixture the epoch of a ``transformers.Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flix.core.errors import MissingFrameworkError
from flix.data.rows import TrainRows

if TYPE_CHECKING:
    from transformers import TrainerCallback


def epoch_callback(rows: TrainRows) -> TrainerCallback:
    """A callback that sets the epoch of the rows when the Trainer begins one.

    Accelerate's loaders do so too, but not with a shuffling sampler in several processes, nor in the epoch in which a
    run is resumed.

    Raises:
        MissingFrameworkError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingFrameworkError(
            "a mixture's callback needs transformers, which is not installed; "
            'install it with: pip install "flix-peft[transformers]"'
        ) from error

    class SetEpoch(TrainerCallback):  # type: ignore[misc]
        """Sets the mixture's epoch."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # A resumed epoch begins at a fraction; 1e-6 is for what rounding takes from a whole number.
            rows.set_epoch(int((state.epoch or 0.0) + 1e-6))

    return SetEpoch()

"""A callback that says how a training goes, and ends it well."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from flix.core.errors import TrainingError
from flix.core.progress import Reporter
from flix.transformers.journal import Journal

_BY_FEATURE = "loss/"


class Watch(TrainerCallback):  # type: ignore[misc]
    """Passes on what the Trainer says, stops a run whose loss is not a number, and ends an interrupted one well."""

    def __init__(self, reporter: Reporter, journal: Journal) -> None:
        self.reporter = reporter
        self.journal = journal
        self.interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reporter.start("training", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reporter.advance(state.global_step)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        logs = logs or {}
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise TrainingError(
                f"the loss became {loss} at step {state.global_step}; lower the learning rate (training.learning_rate)"
            )
        if loss is not None:
            found = {k: float(logs[k]) for k in ("loss", "learning_rate", "grad_norm") if k in logs}
            parts = {k.removeprefix(_BY_FEATURE): float(v) for k, v in logs.items() if k.startswith(_BY_FEATURE)}  # fmt: skip
            self.journal.logged(state.global_step, {**found, "by_feature": parts})
            self.reporter.log(state.global_step, {**found, "by_feature": parts})
        elif "eval_loss" in logs:
            shown = {k: float(v) for k, v in logs.items() if k.startswith("eval_") and "/" not in k}
            self.reporter.log(state.global_step, shown)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, the first Ctrl-C lets the step end and saves a checkpoint; the second ends at once."""

        def note(*_: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

"""What a run says while it runs. The command line has a richer one of the same form."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO


class Reporter:
    """Plain lines.

    Args:
        stream: where to; default: standard output at the time of writing.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def note(self, text: str) -> None:
        """Say something."""
        print(text, file=self._stream or sys.stdout, flush=True)

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A long piece of work begins."""
        self._what, self._total = what, total

    def advance(self, done: int) -> None:
        """Some of the work is done."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a training step."""
        self.note(f"step {step}/{self._total}  {described(values)}")

    def stop(self) -> None:
        """The work has ended, well or not."""


class Silent(Reporter):
    """Says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def described(values: Mapping[str, Any]) -> str:
    """Numbers as text, and the losses of tasks: ``loss 2.13  lr 4.9e-03  ner 1.2  pos 3.1``."""
    short = {"learning_rate": "lr", "grad_norm": "gradient"}
    numbers = {
        short.get(k, k.removeprefix("eval_")): v for k, v in values.items() if isinstance(v, float)
    }
    if any(name.startswith("eval_") for name in values):
        numbers = {f"eval {name}": value for name, value in numbers.items()}
    numbers.update(list(of_tasks(values.get("by_feature", {})).items())[:6])
    return "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def of_tasks(losses: Mapping[str, float]) -> dict[str, float]:
    """The losses of the group ``task``, by name; of the first group, if there is none."""
    groups = [name.partition("=")[0] for name in losses]
    group = "task" if "task" in groups else next(iter(groups), "")
    named = {name: loss for name, loss in losses.items() if name.startswith(f"{group}=")}
    return {name.partition("=")[2]: loss for name, loss in named.items()}

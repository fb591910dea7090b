"""What a run says while it runs. The command line has a richer one of the same form."""

from __future__ import annotations

import sys
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


def described(values: dict[str, Any]) -> str:
    """Numbers as text: ``loss 2.13  lr 4.9e-03``."""
    short = {"learning_rate": "lr"}
    return "  ".join(
        f"{short.get(name, name)} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )

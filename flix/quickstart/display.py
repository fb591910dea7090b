"""Progress bars on a terminal, plain lines elsewhere; tables in both."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flix.core.tables import text_table

from .jobs import Follow, Job


class Display:
    """Where the quickstart shows what it does.

    Args:
        to_stderr: keep standard output free, as for JSON.
    """

    def __init__(self, to_stderr: bool = False) -> None:
        self._stream = sys.stderr if to_stderr else sys.stdout

    def say(self, text: str) -> None:
        """A line of text."""
        print(text, file=self._stream, flush=True)

    def table(self, headings: list[str], rows: list[list[str]]) -> None:
        """A table."""
        self.say("\n" + text_table(headings, rows, left=1, rule=True) + "\n")

    def building(self, label: str, done: int, total: int) -> None:
        """Data is built; nothing is shown where it comes from the cache."""
        if done == 1:
            self.say(f"building the data ({total} parts, once; then cached)")

    @contextmanager
    def training(self, jobs: Sequence[Job], steps: int) -> Iterator[Follow]:
        """Progress of the arms."""
        if not self._stream.isatty():
            yield self._plainly(steps)
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=Console(file=self._stream)) as bars:
            tasks = {job.name: bars.add_task(job.name, total=steps, loss="  -  ") for job in jobs}

            def follow(job: Job, event: dict[str, Any]) -> None:
                task = tasks[job.name]
                if event["event"] == "step":
                    bars.update(task, completed=event["step"], loss=f"{event['loss']:5.2f}")
                else:
                    bars.update(task, description=f"{job.name}: {event['event']}")

            yield follow

    def _plainly(self, steps: int) -> Follow:
        def follow(job: Job, event: dict[str, Any]) -> None:
            if event["event"] == "step":
                self.say(f"{job.name}: step {event['step']}/{steps}, loss {event['loss']:.3f}")
            elif event["event"] == "evaluating":
                self.say(f"{job.name}: testing")

        return follow

"""Progress bars and tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flix.core.tables import text_table

from .data import Progress
from .jobs import Follow, Job

_PLAIN_EVERY = 100


class Display:
    """Where the quickstart shows what it does.

    Args:
        to_stderr: keep standard output free, as for JSON.
    """

    def __init__(self, to_stderr: bool = False) -> None:
        from rich.console import Console

        self._stream = sys.stderr if to_stderr else sys.stdout
        self._console = Console(file=self._stream, highlight=False)
        self._rich = self._console.is_terminal

    def say(self, text: str) -> None:
        """A line of text."""
        print(text, file=self._stream, flush=True)

    def table(self, headings: list[str], rows: list[list[str]]) -> None:
        """A table."""
        if not self._rich:
            self.say("\n" + text_table(headings, rows, left=1, rule=True) + "\n")
            return
        from rich.markup import escape
        from rich.table import Table

        shown = Table(show_edge=False, header_style="bold")
        for number, heading in enumerate(headings):
            shown.add_column(escape(heading), justify="left" if number == 0 else "right")
        for row in rows:
            shown.add_row(*(escape(str(cell)) for cell in row))
        self._console.print(shown)
        self.say("")

    @contextmanager
    def building(self) -> Iterator[Progress]:
        """Progress of building the data; nothing is shown where it comes from the cache."""
        if not self._rich:
            told = False

            def plain(label: str, done: int, total: int) -> None:
                nonlocal told
                if not told:
                    self.say(f"building the data ({total} parts, once; then cached)")
                    told = True

            yield plain
            return
        from rich.progress import Progress as Bars

        with Bars(console=self._console, transient=True) as bars:
            task = bars.add_task("building the data", total=None)

            def show(label: str, done: int, total: int) -> None:
                bars.update(task, description=f"building {label}", completed=done, total=total)

            yield show

    @contextmanager
    def training(self, jobs: list[Job], steps: int) -> Iterator[Follow]:
        """Progress of the arms."""
        if not self._rich:
            yield self._plain_training(steps)
            return
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = [
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        ]
        with Bars(*columns, console=self._console) as bars:
            tasks = {job.name: bars.add_task(job.name, total=steps, loss="  -  ") for job in jobs}

            def follow(job: Job, event: dict[str, Any]) -> None:
                if event["event"] == "step":
                    bars.update(
                        tasks[job.name], completed=event["step"], loss=f"{event['loss']:5.2f}"
                    )
                elif event["event"] == "evaluating":
                    bars.update(tasks[job.name], description=f"{job.name}: testing")
                else:
                    bars.update(tasks[job.name], description=f"{job.name}: done")

            yield follow

    def _plain_training(self, steps: int) -> Callable[[Job, dict[str, Any]], None]:
        def follow(job: Job, event: dict[str, Any]) -> None:
            if event["event"] == "step":
                if event["step"] % _PLAIN_EVERY == 0 or event["step"] == steps:
                    self.say(f"{job.name}: step {event['step']}/{steps}, loss {event['loss']:.3f}")
            elif event["event"] == "evaluating":
                self.say(f"{job.name}: testing")

        return follow

"""One line of progress on a terminal, plain lines elsewhere; tables in both."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
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

    def follow(self, jobs: Sequence[Job], steps: int) -> Follow:
        """What shows the progress of jobs."""
        return self._on_one_line(jobs, steps) if self._stream.isatty() else self._plainly(steps)

    def _plainly(self, steps: int) -> Follow:
        def follow(job: Job, event: dict[str, Any]) -> None:
            if event["event"] == "step":
                self.say(f"{job.name}: step {event['step']}/{steps}, loss {event['loss']:.3f}")
            elif event["event"] == "evaluating":
                self.say(f"{job.name}: testing")

        return follow

    def _on_one_line(self, jobs: Sequence[Job], steps: int) -> Follow:
        began, done = time.monotonic(), dict.fromkeys(jobs, 0)

        def follow(job: Job, event: dict[str, Any]) -> None:
            done[job] = event.get("step", done[job])
            share = sum(done.values()) / (steps * len(jobs))
            left = (time.monotonic() - began) * (1 / share - 1) if share else 0.0
            if share == 1:
                said = "testing" if event["event"] != "done" else f"{job.name}: done"
            else:
                said = "  ".join(f"{j.arm} {n}/{steps}" for j, n in done.items() if 0 < n < steps)
                said += f"  about {left / 60:.0f} min left"
            print(f"\r\x1b[K{said[:78]}", end="", file=self._stream, flush=True)

        return follow

"""Shows the progress of several jobs, and tables. A terminal gets one line for each job, other outputs plain lines."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from flix.core.tables import text_table
from flix.study.jobs import Follow, Job


class Display:
    """Shows progress, messages and tables.

    Args:
        to_stderr: write to standard error, so that standard output can hold JSON.
    """

    def __init__(self, to_stderr: bool = False) -> None:
        self._stream = sys.stderr if to_stderr else sys.stdout

    def say(self, text: str) -> None:
        """Show a line of text."""
        print(text, file=self._stream, flush=True)

    def table(self, headings: list[str], rows: list[list[str]], width: int | None = None) -> None:
        """Show a table."""
        self.say("\n" + text_table(headings, rows, left=1, rule=True, width=width) + "\n")

    def follow(self, jobs: Sequence[Job]) -> Follow:
        """Return a function that shows the progress of jobs."""
        return Live(jobs, self._stream) if self._stream.isatty() else self._plainly(jobs)

    def _plainly(self, jobs: Sequence[Job]) -> Follow:
        progress = Progress(jobs)

        def follow(job: Job, event: dict[str, Any]) -> None:
            progress(job, event)
            what = event["event"]
            if what == "step":
                self.say(f"{job.name}: step {event['step']}/{event['steps']}, loss {event['loss']:.3f}")  # fmt: skip
            elif what == "evaluating":
                self.say(f"{job.name}: evaluating")
            elif what in ("done", "failed"):
                why = f": {event['reason']}" if what == "failed" else ""
                self.say(f"{job.name}: {what}{why}")
                if len(jobs) > 3:
                    self.say(progress.summary())

        return follow


class Progress:
    """Keeps track of how far jobs are.

    Args:
        jobs: the jobs.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.began = time.monotonic()
        self.shares, self.before = dict.fromkeys((job.name for job in jobs), 0.0), dict[str, float]()  # fmt: skip
        self.ended: dict[str, str] = {}
        self.at: dict[str, str] = {}

    def __call__(self, job: Job, event: dict[str, Any]) -> None:
        """Take note of what happened to a job."""
        what = event["event"]
        if what in ("done", "failed"):
            self.shares[job.name], self.ended[job.name] = 1.0, what
            self.at.pop(job.name, None)
            return
        steps, step = event.get("steps") or 1, event.get("step") or 0
        if what == "training":
            self.before[job.name] = step / steps  # done by an earlier call
        if what == "evaluating" or event.get("what") == "evaluating":
            self.shares[job.name] = max(self.shares[job.name], 0.95)
            self.at[job.name] = f"evaluating {step}/{steps} rows"
            return
        self.shares[job.name] = max(self.shares[job.name], 0.95 * step / steps)
        loss = f"  loss {event['loss']:.3f}" if "loss" in event else ""
        self.at[job.name] = f"step {step}/{steps}{loss}"

    def summary(self) -> str:
        """How many jobs are done, and how long the others will still take."""
        count, failed = len(self.ended), sum(how == "failed" for how in self.ended.values())
        text = f"{count - failed} of {len(self.shares)} runs done"
        if failed:
            text += f", {failed} failed"
        now = sum(share - 0.95 * self.before.get(name, 0.0) for name, share in self.shares.items())
        left = len(self.shares) - sum(self.shares.values())
        if now > 0 and left > 0:
            text += f", about {span((time.monotonic() - self.began) * left / now)} left"
        return text


class Live:
    """One line for each running job and one for all jobs, redrawn with every event."""

    def __init__(self, jobs: Sequence[Job], stream: Any) -> None:
        self.progress, self.stream, self.lines, self.last = Progress(jobs), stream, 0, 0.0

    def __call__(self, job: Job, event: dict[str, Any]) -> None:
        """Show what happened."""
        self.progress(job, event)
        over = event["event"] in ("done", "failed")
        if not over and time.monotonic() - self.last < 0.2:
            return
        self.last = time.monotonic()
        width = shutil.get_terminal_size().columns - 1
        lines = [f"{name}: {at}"[:width] for name, at in self.progress.at.items()]
        lines.append(self.progress.summary()[:width])
        if event["event"] == "failed":
            lines.insert(0, f"{job.name}: failed: {event['reason']}"[:width])
        up = f"\x1b[{self.lines}F" if self.lines else ""
        self.stream.write(up + "\x1b[J" + "\n".join(lines) + "\n")
        self.stream.flush()
        self.lines = len(lines) - (event["event"] == "failed")  # what failed stays above


def span(seconds: float) -> str:
    """A duration as people read it."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

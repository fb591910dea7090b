"""Running arms side by side, a process and a thread each, and following their progress."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.progress import Reporter

Follow = Callable[["Job", dict[str, Any]], None]
"""Called with a job and each thing that happens to it: ``event``, and ``step`` and ``loss`` of a step."""


@dataclass(frozen=True)
class Job:
    """One arm with one seed.

    Attributes:
        arm: the arm's name.
        seed: the seed.
        folder: of its run; its configuration and what it wrote to standard error lie beside it.
    """

    arm: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def beside(self, ending: str) -> Path:
        """A file beside the folder."""
        return self.folder.with_name(self.folder.name + ending)

    def read(self, name: str) -> Any:
        """A JSON file of the run."""
        return json.loads((self.folder / name).read_bytes())


class JobError(Exception):
    """A job failed; the text is the end of what it wrote."""


class Events(Reporter):
    """Hands on what happens in a job's process."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__()
        self.tell = tell

    def note(self, text: str) -> None:
        """Nothing."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """``training`` or ``evaluating`` begins."""
        self.tell(event=what)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """The loss at a step."""
        if "loss" in values:
            self.tell(event="step", step=step, loss=values["loss"])


def work(number: int, job: Job, events: Any) -> None:
    """``flix train`` on a job's configuration, in a process of its own."""
    with open(job.beside(".log"), "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
        try:
            from transformers.utils import logging

            from flix.training.reading import read_settings
            from flix.training.run import train

            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            reporter = Events(lambda **event: events.put((number, event)))
            train(read_settings(job.beside(".yaml")), overwrite=True, reporter=reporter)
            events.put((number, {"event": "done"}))
        except BaseException:
            traceback.print_exc(file=log)
            log.flush()
            events.put((number, {"event": "failed"}))


def run_jobs(jobs: Sequence[Job], follow: Follow, parallel: int) -> None:
    """Run the jobs, so many at a time.

    Raises:
        JobError: one failed; the others are stopped.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    running: dict[int, Any] = {}
    waiting = list(enumerate(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                number, job = waiting.pop(0)
                running[number] = context.Process(target=work, args=(number, job, events))
                running[number].start()
            try:
                number, event = events.get(timeout=1.0)
            except queue.Empty:  # one that was killed tells nothing
                dead = [n for n, process in running.items() if process.exitcode not in (None, 0)]
                if not dead:
                    continue
                number, event = dead[0], {"event": "failed"}
            if event["event"] == "failed":
                log = jobs[number].beside(".log").read_text(encoding="utf-8", errors="replace")
                raise JobError(f"{jobs[number].name} failed:\n{log[-3000:]}")
            if event["event"] == "done":
                running.pop(number).join()
            follow(jobs[number], event)
    finally:
        for process in running.values():
            process.kill()

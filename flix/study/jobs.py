"""Runs jobs in parallel processes with one thread each, and follows their progress.

A process ends when the process that started it ends, for whatever reason. A job that is killed loses only the steps
since its last checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.errors import TrainingError
from flix.core.progress import Reporter

Follow = Callable[["Job", dict[str, Any]], None]
"""Called with a job and each thing that happens to it: ``event``, and ``step``, ``steps`` and ``loss``."""


@dataclass(frozen=True)
class Job:
    """A run of ``flix train``, and the evaluations after it.

    Attributes:
        name: the name that people read.
        folder: the folder of the run; its configuration and its standard error are beside it.
        steps: how many steps it takes; 0 if nothing is trained.
        adapt: false to evaluate the base without training.
        weights: factors for groups; the trained run evaluates its held-out cells with each of them.
        anew: discard an earlier run in the folder instead of continuing it.
    """

    name: str
    folder: Path
    steps: int = 0
    adapt: bool = True
    weights: tuple[Mapping[str, Any], ...] = ()
    anew: bool = False

    def beside(self, ending: str) -> Path:
        """A file beside the folder."""
        return self.folder.with_name(self.folder.name + ending)

    def read(self, name: str) -> Any:
        """A JSON file of the run."""
        return json.loads((self.folder / name).read_bytes())


@dataclass(frozen=True)
class Failed:
    """How a job failed.

    Attributes:
        reason: the reason, in one line.
        log: the end of its standard error.
        diverged: its loss became NaN or infinite, and would do so again.
    """

    reason: str
    log: str = ""
    diverged: bool = False


class Events(Reporter):
    """Reports what happens in a job's process to the process that started it."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__()
        self.tell, self.told = tell, 0.0

    def note(self, text: str) -> None:
        """Nothing."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """``training`` or ``evaluating`` begins."""
        super().start(what, total, done)
        self.tell(event=what, step=done, steps=total)

    def advance(self, done: int) -> None:
        """Report how far the work is, every two seconds at most."""
        if time.monotonic() - self.told > 2.0:
            self.told = time.monotonic()
            self.tell(event="at", what=self._what, step=done, steps=self._total)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """The loss at a step."""
        if "loss" in values:
            self.tell(event="step", step=step, steps=self._total, loss=values["loss"])


def work(number: int, job: Job, events: Any) -> None:
    """Do a job; this runs in a process of its own."""
    if hasattr(
        os, "setpgid"
    ):  # the terminal's Ctrl-C is for the first process alone, which passes it on once
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(job.beside(".log"), "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
        try:
            from transformers.utils import logging

            from flix.study.working import do

            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            do(job, Events(lambda **event: events.put((number, event))))
            events.put((number, {"event": "done"}))
        except BaseException as error:
            traceback.print_exc(file=log)
            log.flush()
            diverged = isinstance(error, TrainingError)
            reason = f"{type(error).__name__}: {error}"
            events.put((number, {"event": "failed", "reason": reason, "diverged": diverged}))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_jobs(jobs: Sequence[Job], follow: Follow, parallel: int) -> dict[str, Failed]:
    """Run the jobs, ``parallel`` of them at a time. A job that fails does not stop the others.

    Ctrl-C lets each job save a checkpoint before it ends.

    Returns:
        The names of the jobs that failed, and how they failed.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    running: dict[int, Any] = {}
    waiting, failed = list(enumerate(jobs)), dict[str, Failed]()
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                number, job = waiting.pop(0)
                running[number] = context.Process(target=work, args=(number, job, events))
                running[number].start()
            number, event = _next(events, running)
            if number not in running:
                continue
            if event["event"] in ("failed", "done"):
                running.pop(number).join()
            if event["event"] == "failed":
                log = jobs[number].beside(".log").read_text(encoding="utf-8", errors="replace")
                failed[jobs[number].name] = Failed(event["reason"], log[-3000:], event.get("diverged", False))  # fmt: skip
            follow(jobs[number], event)
    except KeyboardInterrupt:
        for process in running.values():
            if hasattr(os, "setpgid") and process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        for process in running.values():
            process.join(timeout=60)
        raise
    finally:
        for process in running.values():
            process.kill()
    return failed


def _next(events: Any, running: Mapping[int, Any]) -> tuple[int, dict[str, Any]]:
    """The next thing that happens; a process that was killed tells nothing."""
    while True:
        try:
            found: tuple[int, dict[str, Any]] = events.get(timeout=1.0)
            return found
        except queue.Empty:
            for number, process in running.items():
                if process.exitcode is not None:
                    reason = f"its process ended with the exit code {process.exitcode}"
                    return number, {"event": "failed", "reason": reason}


def parallel_by_default() -> int:
    """How many jobs run at a time: one for each processor, but only one if there is an accelerator."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        return 1
    return os.cpu_count() or 1

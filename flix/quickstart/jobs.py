"""Running arms side by side, one thread each, and following their progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """One arm with one seed.

    Attributes:
        arm: the arm's name.
        seed: the seed.
        settings: what the worker is told beside these.
        result: scores by cell and figures, once it is done.
    """

    arm: str
    seed: int
    settings: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"


class JobError(Exception):
    """A worker failed; the text is the end of what it wrote."""


Follow = Callable[[Job, dict[str, Any]], None]


def run_jobs(jobs: list[Job], follow: Follow, parallel: int | None = None) -> None:
    """Run the jobs, as many at a time as there are processors, and fill in their results.

    Args:
        jobs: what to run.
        follow: called with a job and each event of it, from one thread at a time.
        parallel: how many at a time; default: the number of processors.

    Raises:
        JobError: a worker failed; the others are stopped.
    """
    lock = threading.Lock()
    running: list[subprocess.Popen[str]] = []
    stopped = threading.Event()

    def one(job: Job) -> None:
        if stopped.is_set():
            return
        order = {"arm": job.arm, "seed": job.seed, **job.settings}
        order["out"] = str(Path(job.settings["out"]) / f"{job.arm}-{job.seed}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "flix.quickstart.worker", json.dumps(order)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
            with lock:
                running.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "result":
                    job.result = event
                with lock:
                    follow(job, event)
            if process.wait() != 0 or not job.result:
                if stopped.is_set():
                    return
                errors.seek(0)
                raise JobError(f"{job.name} failed:\n{errors.read()[-3000:]}")

    with ThreadPoolExecutor(parallel or min(len(jobs), os.cpu_count() or 1)) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stopped.set()
            for future in futures:
                future.cancel()
            for process in running:
                process.kill()
            raise

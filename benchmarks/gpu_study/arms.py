"""The three main arms on the pretrained base, by ``flix study``: timed first, then whole."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_study.sharing import Told
from flix.core.errors import SettingsError, listed
from flix.core.files import make_folder, write_file
from flix.study.display import Display
from flix.study.jobs import Follow, Job
from flix.study.reading import CONFIGS, Study, merged, read_study

NAME = "gpu.yaml"
"""The study's file; its name is that of the study, under which docs/results.md has it."""
RATES = {"flix": 1e-3, "lora-parameters": 0.5e-3, "lora-compute": 1e-3}
"""Half of what the study ``settle`` has, whose base is smaller. They were not chosen by any run."""


class TimeUp(KeyboardInterrupt):
    """The time is over; runs that are not done save a checkpoint."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the runs.

    Attributes:
        batch: rows of a step.
        answered: rows that are answered at a time.
        limit: rows of a cell that are answered.
        length: the most bytes of an answer.
        timed: steps of the runs that are timed; a fifth of them is logged at a time.
        timed_limit: rows of a cell that these answer.
    """

    batch: int = 64
    answered: int = 1024
    limit: int = 20
    length: int = 80
    timed: int = 100
    timed_limit: int = 4


TINY = Sizes(batch=2, answered=512, limit=1, length=4, timed=5, timed_limit=1)


def config_of(
    words: Path, base: Path, rates: Mapping[str, float], seed: int, steps: int, sizes: Sizes, *, timed: bool, dry: bool
) -> dict[str, Any]:  # fmt: skip
    """The study's configuration: the three main arms of ``settle`` with their claims, this base, these sizes.

    Raises:
        SettingsError: a rate for an arm that there is not.
    """
    settle = yaml.safe_load((CONFIGS / "settle.yaml").read_text(encoding="utf-8"))
    settle["arms"] = {name: settle["arms"][name] for name in RATES}
    settle["claims"] = [c for c in settle["claims"] if {c["arm"], *c["against"]} <= {*RATES}]
    if unknown := [arm for arm in rates if arm not in settle["arms"]]:
        raise SettingsError(f"--rate: there is no arm {unknown[0]!r}; the arms are: {listed(settle['arms'])}")  # fmt: skip
    arms = {}
    for name, arm in settle["arms"].items():
        rate = {"settings": {"training": {"learning_rate": rates.get(name, RATES[name])}}}
        arms[name] = merged(arm, rate)
    layer = {
        "model": str(base.resolve()),
        "training": {
            "steps": steps,
            "batch_size": sizes.batch,
            "warmup_ratio": 0.05,
            "similar_lengths": True,
            "log_every": max(1, steps // 5 if timed else steps // 20),
            "save_every": max(1, steps if timed else steps // 5),
            **({"device": "cpu"} if dry else {}),
        },
        "evaluation": {
            "batch_size": sizes.answered,
            "max_new_tokens": sizes.length,
            "limit": sizes.timed_limit if timed else sizes.limit,
            "unseen_group_weights": {"language": 0.0},
        },
    }
    common = [str((words / "last_word.yaml").resolve()), layer]
    return {"output": "gpu-study", "seeds": [seed], "common": common, "arms": arms, "claims": settle["claims"]}  # fmt: skip


def read_config(out: Path, config: Mapping[str, Any]) -> Study:
    """Write a study's configuration into its folder, and read it as ``flix study`` does."""
    make_folder(out)
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    write_file(out / NAME, text.encode("utf-8"))
    return read_study(out / NAME, out=out)


@dataclass
class Timed(Display):
    """Shows progress as lines, and keeps what is told, with its time."""

    told: list[Told] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def follow(self, jobs: Sequence[Job]) -> Follow:
        """Called when the runs are about to start."""
        show, began = self._plainly(jobs), time.monotonic()

        def follow(job: Job, event: dict[str, Any]) -> None:
            self.told.append(Told(job.name, event, time.monotonic() - began))
            show(job, event)

        return follow


def run(study: Study, parallel: int, stop: float, display: Display | None = None) -> dict[str, Any]:
    """Run a study until it is done, or until the clock (``time.monotonic``) stands at ``stop``.

    Returns:
        What its ``scores.json`` holds.

    Raises:
        TimeUp: it was stopped. Finished runs are kept, and the same call goes on with the others.
        FlixError: as :func:`flix.study.run.study`.
    """
    from flix.study.run import study as run_study

    with stopped_at(stop):
        return run_study(study, parallel=parallel, display=display or Timed())


@contextmanager
def stopped_at(stop: float, again: float = 8.0) -> Iterator[None]:
    """Interrupt what is inside at a time, as Ctrl-C would, and again and again if it goes on."""

    def over(*_: object) -> None:
        raise TimeUp("the time is over")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, stop - time.monotonic()), again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""A base of 18 million parameters and the three main arms on one CUDA device, in at most ten minutes.

    python -m benchmarks.gpu_study WORDS [--out benchmarks/out/gpu-study] [--minutes 10] [--dry-run]

WORDS is a folder that ``python -m flix.study.words ... --denoise`` wrote. The base is pretrained on its unlabelled
training rows; then the three main arms of the study ``settle`` train on it, side by side, for as many steps as fit.
If the time is over first, what is done is kept, and the same command goes on. ``python -m flix.study.results FOLDER``
takes the result to docs/results.md. A dry run takes tiny sizes on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DRY_STEPS = 3
"""Steps of an arm in a dry run."""
LONGER = 6
"""How much longer a dry run may take, on whatever machine this is."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m benchmarks.gpu_study", description=(__doc__ or "").splitlines()[0])  # fmt: skip
    add = made.add_argument
    add("words", type=Path, metavar="WORDS", help="the study's data, with unlabelled rows")
    add("--out", type=Path, default=Path("benchmarks/out/gpu-study"), help="(%(default)s)")
    add("--minutes", type=float, default=10.0, help="for everything (%(default)g)")
    add("--rate", action="append", default=[], metavar="ARM=RATE", help="the learning rate of an arm; again for more")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--pretraining-steps", type=int, help="as an earlier record has them (default: what fits)")
    add("--pretraining-rate", type=float, default=1e-3, help="the highest (%(default)g)")
    add("--dry-run", action="store_true", help="tiny sizes on the CPU")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if the time was over first, or 2 after one line if the user can mend it."""
    began = time.monotonic()
    given = parser().parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}  # fmt: skip
    # Matrix products of the arms, which train in float32, on tensor cores.
    os.environ.setdefault("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    from benchmarks.gpu.__main__ import device
    from benchmarks.gpu_study.arms import TimeUp
    from flix.core.errors import FlixError

    card = device(given.dry_run)
    try:
        return work(given, card, began)
    except TimeUp:
        print(f"the time is over; finished runs are in {given.out}, and the same command goes on")
        return 1
    except (FlixError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def work(given: argparse.Namespace, card: dict[str, Any], began: float) -> int:
    """Pretrain, time, run and show; what an earlier call did is not repeated."""
    from benchmarks.gpu_study import arms, sharing

    until = began + sharing.pretraining_seconds(given.minutes)
    minutes = given.minutes * (LONGER if given.dry_run else 1)
    stop = began + 60 * minutes - sharing.CLOSING
    rates = rates_of(given.rate)
    sizes = arms.TINY if given.dry_run else arms.Sizes()

    def config(steps: int, timed: bool) -> dict[str, Any]:
        return arms.config_of(
            given.words, given.out / "base", rates, given.seed, steps, sizes, timed=timed, dry=given.dry_run
        )  # fmt: skip

    config(1, True)  # a mistake in the rates is found before anything is done
    record = pretrained(given, card, until)
    print(
        f"base: {record['parameters']:,} parameters, {record['steps']:,} steps in {record['seconds']:.0f} s, "
        f"{record['tokens_a_second']:,} tokens a second, loss {record['final_loss']:.3f}",
        flush=True,
    )
    free = free_bytes()
    parallel = 3 if given.dry_run or free is None else sharing.runs_at_a_time(free, len(arms.RATES))
    timing = given.out / "timing.json"
    if timing.is_file():
        said = json.loads(timing.read_bytes())
    else:
        seen = arms.Timed()
        folder = given.out / "timing"
        shutil.rmtree(folder, ignore_errors=True)  # a finished run would not be timed again
        arms.run(arms.read_config(folder, config(sizes.timed, True)), parallel, stop, seen)
        pace = sharing.pace_of(seen.told, sizes.answered)
        rows = pace.rows * -(-sizes.limit // sizes.timed_limit)
        # One after the other, each run has its part of what is left.
        left = (stop - time.monotonic()) * parallel / len(arms.RATES)
        steps = DRY_STEPS if given.dry_run else sharing.steps_for(left, pace, rows, sizes.answered)
        said = {"steps": steps, "parallel": parallel, "pace": vars(pace)}
        write_json(timing, said)
    print(f"{said['steps']:,} steps for every arm, {parallel} at a time; timed: {said['pace']}", flush=True)  # fmt: skip
    scores = arms.run(arms.read_config(given.out, config(said["steps"], False)), parallel, stop)
    from flix.core.tables import text_table
    from flix.study.summary import COLUMNS
    from flix.study.summary import rows as rows_of

    shown = [[str(cell) for cell in row] for row in rows_of(scores)]
    print("\n" + text_table(COLUMNS, shown, left=1, rule=True) + "\n")
    print(
        f"{time.monotonic() - began:.0f} s in all; next: python -m flix.study.results {given.out}"
    )
    return 0


def pretrained(given: argparse.Namespace, card: dict[str, Any], until: float) -> dict[str, Any]:
    """Pretrain the base, unless it is there; returns its record.

    Raises:
        SettingsError: the folder has a base of another kind.
        DataError: as :func:`.words.read_unlabelled`.
    """
    from benchmarks.gpu_study.pretraining import SIZE, TINY, Pretraining
    from benchmarks.gpu_study.words import read_unlabelled
    from flix.core.errors import SettingsError
    from flix.core.machine import versions
    from flix.study.base import PRETRAINING

    data = read_unlabelled(given.words)
    asked = {
        "seed": given.seed,
        "data": data.digest,
        "learning_rate": given.pretraining_rate,
        "dry_run": given.dry_run,
        **({"steps": given.pretraining_steps} if given.pretraining_steps else {}),
    }
    file = given.out / PRETRAINING
    if file.is_file():
        record: dict[str, Any] = json.loads(file.read_bytes())
        for key, value in asked.items():
            if record[key] != value:
                raise SettingsError(
                    f"{given.out} has a base with {key} {record[key]!r}, and {value!r} is asked for; give another --out"
                )
        return record
    dry = given.dry_run
    tiny: dict[str, Any] = {"size": TINY, "batch": 4, "device": "cpu", "workers": 0, "steps": 20}
    settings = tiny if dry else {"size": SIZE}
    if given.pretraining_steps:
        settings = {**settings, "steps": given.pretraining_steps}
    how = Pretraining(data, until - time.monotonic(), given.seed, rate=given.pretraining_rate, **settings)  # fmt: skip
    found = how.run(given.out / "base")
    more = {"device": card["name"], "dry_run": dry, "versions": versions("torch", "transformers")}
    record = {**found, **more}
    write_json(file, record)
    return record


def rates_of(texts: Sequence[str]) -> dict[str, float]:
    """Learning rates by arm, from ``ARM=RATE``.

    Raises:
        SettingsError: a text of another form, or a rate that is none.
    """
    from flix.core.errors import SettingsError

    found = {}
    for text in texts:
        arm, _, said = text.partition("=")
        try:
            found[arm] = float(said)
        except ValueError:
            found[arm] = 0.0
        if not (arm and 0 < found[arm] < 1):
            raise SettingsError(
                f"--rate: must be ARM=RATE with a rate between 0 and 1, got {text!r}"
            )
    return found


def free_bytes() -> int | None:
    """The free memory of the device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()  # what pretraining held
    return torch.cuda.mem_get_info()[0]


def write_json(file: Path, said: Any) -> None:
    """Write a file whole."""
    from flix.core.files import make_folder, write_file

    make_folder(file.parent)
    write_file(file, (json.dumps(said, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())

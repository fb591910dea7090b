"""``python -m flix.study.official RUN ... --words words``: runs on the shared tasks' own test sets.

Each run's adapter answers ``official/TASK/LANGUAGE.test.jsonl.gz`` of the study's data. The result has exact match over
all rows and over the rows whose words no task trained on, and for segmentation also F1 of morphs.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flix.core.errors import FlixError, listed
from flix.core.files import write_file
from flix.core.machine import command, versions
from flix.study.evidence import EvidenceError
from flix.study.published import morph_f1
from flix.study.results import OFFICIAL
from flix.study.scores import machine_of
from flix.study.words import OFFICIAL as TASKS

Progress = Callable[[str], None]


def official(
    runs: Sequence[Path],
    words: Path,
    *,
    title: str = "",
    tasks: Sequence[str] = TASKS,
    limit: int | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """The scores of some runs of one method on the official test sets.

    Args:
        runs: folders that ``flix train`` wrote.
        words: the study's data, as ``python -m flix.study.words`` wrote it.
        title: the title of the method.
        tasks: the tasks to answer.
        limit: at most so many rows of each language, evenly spaced, because the files may be sorted.
        progress: called with a line for each language.

    Raises:
        EvidenceError: there is no run, no test set or no task of this name.
        FlixError: an adapter or a base cannot be loaded, or rows do not fit.
    """
    from flix.tasks.prediction import Predictor

    if not runs:
        raise EvidenceError("give at least one run's folder")
    if wrong := [task for task in tasks if task not in TASKS]:
        raise EvidenceError(f"there is no official test set of {listed(wrong)}; there are: {listed(TASKS)}")  # fmt: skip
    trained = {cell["cell"]: cell["train"] for cell in json.loads((words / "fingerprint.json").read_bytes())["cells"]}  # fmt: skip
    files = {task: sorted((words / "official" / task).glob("*.test.jsonl.gz")) for task in tasks}
    if not any(files.values()):
        raise EvidenceError(f"{str(words / 'official')!r} holds no test set of {listed(tasks)}; make the data without --no-official")  # fmt: skip
    found: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    devices: set[str] = set()
    for run in runs:
        predictor = Predictor(run / "adapter", batch_size=256)
        devices.add(str(next(predictor.model.parameters()).device))
        known = set(predictor.collator.registry.names("language"))
        for task, of in files.items():
            for file in of:
                language = file.name.partition(".")[0]
                if language not in known:
                    continue
                progress(f"{run.name}: {task} {language}")
                lines = gzip.decompress(file.read_bytes()).decode().split("\n")[:-1]
                records = [json.loads(line) for line in spaced(lines, limit)]
                answers = list(predictor((f"{file.name}, row {n}", r) for n, r in enumerate(records, 1)))  # fmt: skip
                new = [bool(a["right"]) for a in answers if not a["trained_on"]]
                scores = {
                    "run": run.name,
                    "exact": _percent([bool(a["right"]) for a in answers]),
                    "exact_new": _percent(new),
                }
                if task == "segment":
                    scores["f1"] = round(morph_f1((a["output"], a["target"]) for a in answers), 3)
                entry = found[task].setdefault(
                    language,
                    {"rows": len(answers), "rows_new": len(new), "trained": trained.get(f"{task}/{language}", 0), "runs": []},
                )  # fmt: skip
                entry["runs"].append(scores)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "study": "official",
        "title": title or runs[0].name,
        "command": command(),
        "date": now,
        "machine": machine_of(devices),
        "versions": versions("torch", "transformers", "numpy"),
        "runs": [run.name for run in runs],
        "limit": limit,
        "tasks": found,
    }


def spaced(lines: Sequence[str], limit: int | None) -> list[str]:
    """At most so many lines, evenly spaced."""
    if limit is None or len(lines) <= limit:
        return list(lines)
    return [lines[i * len(lines) // limit] for i in range(limit)]


def _percent(right: Sequence[bool]) -> float | None:
    return round(100 * sum(right) / len(right), 3) if right else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 2 with one line on standard error after a mistake that the user can correct."""
    parser = argparse.ArgumentParser("python -m flix.study.official", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders that flix train wrote, all of one method")
    add("--words", type=Path, default=Path("words"), help="the study's data (%(default)s)")
    add("--out", type=Path, default=Path("study-official"), help="folder to write (%(default)s)")
    add("--title", default="", help="the title of the method")
    add("--task", action="append", choices=TASKS, help="only this task; repeat for more (all)")
    add("--limit", type=int, help="at most so many rows of each language, evenly spaced")
    given = parser.parse_args(arguments)
    try:
        found = official(
            given.runs, given.words, title=given.title, tasks=given.task or TASKS, limit=given.limit,
            progress=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
        given.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
        write_file(given.out / OFFICIAL, text.encode())
    except (FlixError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.out / OFFICIAL)
    return 0


if __name__ == "__main__":
    sys.exit(main())

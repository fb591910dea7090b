"""``flix quickstart``: makes the data, trains three arms side by side, and shows the scores as tables and a page."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from flix.report import write_report
from flix.study.display import Display
from flix.study.jobs import Job, run_jobs
from flix.study.summary import RANK_COLUMNS, rank_rows

from .arms import Arm, arms, configuration
from .data import QuickstartData, load_data
from .scores import COLUMNS, by_cell, copies, name_of, score_rows, summary

STEPS = 1500
FAST_STEPS = 40
#: Test items of a cell in a run of one seed; all 60 with several.
LIMIT = 40
#: Sample predictions come from these languages first: several scripts, large and small.
SHOWN = ("ka", "ru", "cy", "sw", "tr", "fi", "hu", "de")


def main(
    *,
    seeds: int = 1,
    fast: bool = False,
    as_json: bool = False,
    out: str | Path | None = None,
    steps: int | None = None,
) -> int:
    """Run the quickstart; returns the exit code.

    Args:
        seeds: train every arm with seeds 0 .. seeds - 1.
        fast: few steps and examples, about a minute: it shows that everything works; its figures mean nothing.
        as_json: print the results as JSON on standard output, and nothing else there.
        out: the folder for results; default ``quickstart-output``.
        steps: optimizer steps of an arm.
    """
    began = time.monotonic()
    folder = Path(out or "quickstart-output")
    folder.mkdir(parents=True, exist_ok=True)
    steps = steps or (FAST_STEPS if fast else STEPS)
    display = Display(to_stderr=as_json)
    display.say("flix quickstart: one small model, 14 languages, 7 tasks, three ways to adapt it")
    data = load_data(progress=partial(building, display))
    display.say(describe(data))
    jobs = prepared(data, folder, seeds, steps, 2 if fast else LIMIT if seeds == 1 else None)
    # All arms of a seed at once, even on fewer processors: one that came after them would run alone.
    at_once = min(len(jobs), max(len(arms(data)), os.cpu_count() or 1))
    for name, how in run_jobs(jobs, display.follow(jobs), at_once).items():
        print(f"{name} failed:\n{how.log or how.reason}", file=sys.stderr)
        return 1
    first = [job.folder for job in jobs[: len(arms(data))]]  # seed after seed
    page = write_report(first, folder / "report.html", force=True)
    results = {
        "steps": steps,
        "seeds": seeds,
        "copy": copies(data),
        "sources": data.sources,
        "arms": {arm.name: of_arm(data, arm, jobs) for arm in arms(data)},
        "seconds": round(time.monotonic() - began, 1),
    }
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    show(data, results, jobs[0], display)
    display.say(closing(folder, page.out))
    if as_json:
        sys.stdout.write(text)
    return 0


def building(display: Display, label: str, done: int, total: int) -> None:
    """Say that data is being built; nothing is shown if it comes from the cache."""
    if done == 1:
        display.say(f"building the data ({total} parts; only this once, then it is cached)")


def describe(data: QuickstartData) -> str:
    """The data in a sentence or two."""
    sizes = sorted(len(cell.train) for cell in data.trained())
    held_out = sum(1 for _ in data.zero_shot())
    return (
        f"data: {len(data.languages)} languages x {len(data.tasks)} tasks; {len(sizes)} trained cells of "
        f"{sizes[0]} to {sizes[-1]} examples ({sum(sizes):,} in all), {held_out} cells held out for "
        "zero-shot"
    )


def prepared(
    data: QuickstartData, folder: Path, seeds: int, steps: int, limit: int | None
) -> list[Job]:
    """Every arm with every seed; its configuration is written beside the folder of its run."""
    jobs = []
    for seed in range(seeds):
        for arm in arms(data):
            run = folder / f"{arm.name}-{seed}"
            job = Job(f"{arm.name}, seed {seed}", run, steps, anew=True)
            chosen = configuration(data, arm, seed=seed, steps=steps, limit=limit, output=run)  # fmt: skip
            text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)
            job.beside(".yaml").write_text(text, encoding="utf-8")
            jobs.append(job)
    return jobs


def of_arm(data: QuickstartData, arm: Arm, jobs: list[Job]) -> dict[str, Any]:
    """The results of one arm."""
    found = [job.read("metrics.json") for job in jobs if job.name.startswith(f"{arm.name}, ")]
    runs = [by_cell(metrics) for metrics in found]
    return {
        "title": arm.title,
        "ranks": dict(arm.ranks),
        "active_rank": arm.active(),
        "total_rank": arm.total(data),
        "learning_rate": arm.learning_rate,
        "trainable": found[0]["training"]["trainable_parameters"],
        "seconds": statistics.fmean(metrics["training"]["seconds"] for metrics in found),
        "scores": summary(data, runs),
        "cells": runs,
    }


def samples(data: QuickstartData, job: Job, count: int = 10) -> list[list[str]]:
    """A few predictions of FLix in several scripts, right or wrong, including zero-shot ones."""
    names = {cell["cell"]: name_of(cell) for cell in job.read("metrics.json")["cells"]}
    answers: dict[str, list[list[str]]] = {}
    for line in (job.folder / "predictions.jsonl").read_bytes().splitlines():
        a = json.loads(line)
        row = [names[a["cell"]], a["source"], a["output"], "=" if a["right"] else a["target"]]
        answers.setdefault(row[0], []).append(row)
    chosen: list[list[str]] = []
    for turn, language in enumerate(SHOWN * 2):
        cells = [n for task in data.tasks if (n := f"{language}/{task}") in answers]
        if cells and len(chosen) < count:
            rows = answers[cells[(3 * turn + 1) % len(cells)]]
            chosen.append(rows[turn % len(rows)])
    return chosen + [answers[c.name][0] for c in data.zero_shot("test") if c.name in answers][:2]


def show(data: QuickstartData, results: dict[str, Any], first: Job, display: Display) -> None:
    """All figures, and what the first job, FLix's, answered."""
    display.table(["exact match, %", *COLUMNS], score_rows(results, "exact"))
    display.table(["chrF", *COLUMNS], score_rows(results, "chrf"))
    display.table(RANK_COLUMNS, rank_rows(results["arms"].values()))
    display.table(["language/task", "input", "FLix answers", "expected"], samples(data, first))
    if results["steps"] < STEPS // 2:
        steps = (
            f"(only {results['steps']} steps: the figures show that it runs, not how good it is)"
        )
        display.say(steps)
    display.say(f"{results['seconds']:.0f} s in all, on {os.cpu_count()} processors.")


def closing(out: Path, page: Path) -> str:
    """Where everything is, and what to try next."""
    run = out / "flix-0"
    return (
        f"report: {page}  (open it in a browser: scores by language and task, curves, what features share)\n"
        f"The runs are in {out}, with the configuration of each run beside it. All figures: {out / 'results.json'}.\n"
        "What to try next:\n"
        f"  flix inspect {run / 'adapter'}\n"
        f"  flix train {run}.yaml --overwrite\n"
        "  flix quickstart --seeds 3          the same with three seeds (longer)\n"
        "  flix train examples/train.yaml     your own model and data\n"
        "  README.md                          the library in twenty lines"
    )

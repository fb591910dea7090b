"""``flix quickstart``: data, four arms two at a time, and the truth in tables."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report
from .arms import arms, budgets, config
from .data import QuickstartData, load_data
from .display import Display
from .jobs import Job, JobError, run_jobs
from .scores import COLUMNS, copies, differences, summary

# One seed fits into minutes; a comparison over seeds is worth more steps.
STEPS = 300
STEPS_OF_SEVERAL = 400
# Test items a pair in a run of one seed; all 60 with several.
LIMIT = 40
FAST_STEPS = 40


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Attributes:
        seeds: how many seeds.
        steps: optimizer steps of an arm.
        limit: test examples a cell; None for all.
        names: the arms to run.
        out: the folder for results.
    """

    seeds: int
    steps: int
    limit: int | None
    names: tuple[str, ...]
    out: Path


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
        fast: few steps and examples, under a minute: does it run? The figures then mean nothing.
        as_json: print the results as JSON on standard output, and nothing else there.
        out: the folder for results; default ``quickstart-output``.
        steps: optimizer steps of an arm; default 300, and 400 with several seeds.
    """
    began = time.monotonic()
    folder = Path(out or "quickstart-output")
    folder.mkdir(parents=True, exist_ok=True)
    display = Display(to_stderr=as_json)
    display.say("flix quickstart: one small model, 14 languages, 7 tasks, four ways to adapt it")
    with display.building() as progress:
        data = load_data(progress=progress)
    all_arms = arms(data)
    chosen = tuple(arm.name for arm in all_arms)
    if fast:
        chosen = tuple(name for name in chosen if name != "flix-plain")
    settings = Settings(
        seeds=seeds,
        steps=steps or (FAST_STEPS if fast else STEPS if seeds == 1 else STEPS_OF_SEVERAL),
        limit=2 if fast else LIMIT if seeds == 1 else None,
        names=chosen,
        out=folder,
    )
    display.say(describe(data))
    jobs = [
        Job(name, seed, {"steps": settings.steps, "limit": settings.limit, "out": str(folder)})
        for seed in range(seeds)
        for name in settings.names
    ]
    try:
        with display.training(jobs, settings.steps) as follow:
            run_jobs(jobs, follow)
    except JobError as error:
        print(error, file=sys.stderr)
        return 1
    results = gather(data, settings, jobs)
    results["seconds"] = round(time.monotonic() - began, 1)
    finish(data, settings, results, display)
    if as_json:
        json.dump(results, sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
    return 0


def describe(data: QuickstartData) -> str:
    """The data in a sentence or two."""
    sizes = sorted(len(cell.train) for cell in data.trained())
    held_out = sum(1 for _ in data.zero_shot())
    return (
        f"data: {len(data.languages)} languages x {len(data.tasks)} tasks; {len(sizes)} trained pairs of "
        f"{sizes[0]} to {sizes[-1]} examples ({sum(sizes):,} in all), {held_out} pairs held out for "
        "zero-shot"
    )


def gather(data: QuickstartData, settings: Settings, jobs: list[Job]) -> dict[str, Any]:
    """All results of a run, JSON-able."""
    by_arm: dict[str, Any] = {}
    runs: dict[str, list[Any]] = {}
    for arm in arms(data):
        if arm.name not in settings.names:
            continue
        own = [job.result for job in jobs if job.arm == arm.name]
        runs[arm.name] = [result["cells"] for result in own]
        active, total = budgets(data, arm)
        by_arm[arm.name] = {
            "title": arm.title,
            "ranks": dict(arm.groups),
            "active_rank": active,
            "total_rank": total,
            "learning_rate": arm.learning_rate,
            "trainable": own[0]["figures"]["trainable"],
            "seconds": sum(r["figures"]["seconds"] for r in own) / len(own),
            "scores": summary(data, runs[arm.name]),
            "cells": runs[arm.name],
        }
    return {
        "steps": settings.steps,
        "seeds": settings.seeds,
        "copy": copies(data, "test"),
        "sources": data.sources,
        "arms": by_arm,
        "difference": differences(data, runs["flix"], runs["lora-parameters"]),
    }


def finish(
    data: QuickstartData, settings: Settings, results: dict[str, Any], display: Display
) -> None:
    """Save and show everything."""
    out = settings.out
    first = out / "flix-0"
    shutil.rmtree(out / "adapter", ignore_errors=True)
    shutil.copytree(first / "adapter", out / "adapter")
    (out / "results.json").write_text(
        json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    report.heat_map(
        data,
        results["difference"],
        "FLix minus LoRA of equal parameters",
        out / "heatmap.png",
    )
    headings = ["exact match, %", *COLUMNS]
    display.table(headings, report.score_rows(results, "exact"))
    display.table(["chrF", *COLUMNS], report.score_rows(results, "chrf"))
    display.table(report.RANK_HEADINGS, report.rank_rows(results))
    registry = config(data, arms(data)[0], 0).registry
    display.say(f"FLix features: {registry}; every row activates four of them.")
    rows = [
        [
            a["cell"],
            a["source"],
            a["predicted"],
            "=" if a["predicted"] == a["target"] else a["target"],
        ]
        for a in report.samples(data, first)
    ]
    display.table(["language/task", "input", "FLix answers", "expected"], rows)
    if settings.steps < STEPS:
        display.say(
            f"({settings.steps} steps only: the figures show that it runs, not how good it is)"
        )
    display.say(f"{results['seconds']:.0f} s in all, on {os.cpu_count()} processors.")
    display.say(report.closing(out))

"""A made study: scores.json of arms whose answers are drawn, in the form that ``flix study`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LANGUAGES = ("deu", "fin", "kat", "swa")
TASKS = ("inflect", "pron", "accent")
HELD_OUT = {("accent", "kat"): "choosing", ("pron", "swa"): "last_word", ("accent", "deu"): "last_word"}  # fmt: skip
RATES = {"flix": (0.6, 0.4), "lora-compute": (0.4, 0.3), "lora-parameters": (0.42, 0.35)}


def scores(
    rates: Mapping[str, tuple[float, float]] = RATES,
    *,
    seeds: Sequence[int] = (0, 1),
    rows: int = 20,
    leave_out: Sequence[tuple[str, int]] = (),
    **more: Any,
) -> dict[str, Any]:
    """What scores.json holds.

    Args:
        rates: of each arm, how likely an answer is right in cells that are trained on, and in the others.
        seeds: of every arm.
        rows: of a cell.
        leave_out: runs that are not finished.
        more: other entries.
    """
    arms: dict[str, Any] = {}
    for number, (name, rate) in enumerate(rates.items()):
        runs = {
            str(seed): _run(rate, rows, np.random.default_rng([number, seed]))
            for seed in seeds
            if (name, seed) not in leave_out
        }
        if runs:
            arms[name] = {
                "title": name.replace("-", ", "),
                "ranks": {"shared": 4},
                "active_rank": 12 + number,
                "total_rank": 60 * (number + 1),
                "trainable": 100_000 * (number + 1),
                "choice": {"training.learning_rate": 0.002 * (number + 1)},
                "seeds": runs,
            }
    return {
        "study": "made",
        "command": ["flix", "study", "made.yaml"],
        "commit": "0123abc",
        "date": "2026-11-27T12:00:00+00:00",
        "machine": {"system": "Linux", "processors": 2, "device": "cpu"},
        "versions": {"flix": "0", "python": "3.11"},
        "seeds": list(seeds),
        "planned": {name: name.replace("-", ", ") for name in rates},
        "arms": arms,
        "missing": [f"{name}, seed {seed}" for name, seed in leave_out],
        "claims": [
            {"arm": "flix", "against": ["lora-compute", "lora-parameters"], "cells": "seen", "at_least": 10},
            {"arm": "flix", "against": "lora-compute", "cells": "zero_shot", "at_least": 50},
        ],
        **more,
    }  # fmt: skip


def _run(rate: tuple[float, float], rows: int, rng: np.random.Generator) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for place, (task, language) in enumerate((t, lang) for t in TASKS for lang in LANGUAGES):
        group = HELD_OUT.get((task, language), "seen")
        right = (rng.random(rows) < rate[group != "seen"]).astype(int).tolist()
        cells[f"language={language},task={task}"] = {
            "features": {"language": [language], "task": [task]},
            "group": group,
            "train": 0 if group != "seen" else 50 * (place + 1),
            "rows": rows,
            "metric": "exact_match",
            "score": 100.0 * sum(right) / rows,
            "right": right,
        }
    return {"seconds": 60.0, "steps": 100, "cells": cells}


def write(folder: Path, said: Mapping[str, Any]) -> Path:
    """Write it as a study's folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(said), encoding="utf-8")
    return folder

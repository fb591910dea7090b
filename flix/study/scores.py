"""Writes ``scores.json``: what every finished run of a study answered, cell by cell, and which runs are missing."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flix.core.features.cells import cell_name, cell_of
from flix.core.machine import command, machine, versions
from flix.study.working import WEIGHTS, rights
from flix.transformers import folders

Group = Callable[[Mapping[str, Any]], str]
"""What a cell of ``metrics.json`` is for."""


def of_run(output: Path, group: Group, hidden: str | None = None) -> dict[str, Any]:
    """The answers of a finished run.

    Args:
        output: the run's folder.
        group: returns what a cell is for.
        hidden: a group of features that only this arm has; names of cells leave it out.
    """
    metrics = json.loads((output / folders.METRICS).read_bytes())
    right: dict[str, list[bool | None]] = {}
    for line in (output / folders.PREDICTIONS).read_bytes().splitlines():
        answer = json.loads(line)
        right.setdefault(answer["cell"], []).append(answer["right"])
    cells = {
        name_of(cell, hidden): {
            "features": {g: names for g, names in cell["features"].items() if g != hidden},
            "group": group(cell),
            "rows": cell["rows"],
            "train": metrics["training"].get("training_rows", {}).get(cell["cell"], 0)
            if cell["seen"]
            else 0,
            "metric": cell["metric"],
            "score": cell["score"],
            "scores": cell["scores"],
            "right": rights(cell["kind"], right.get(cell["cell"], [])),
        }
        for cell in metrics["cells"]
    }
    training = metrics["training"]
    found = {"seconds": training["seconds"], "steps": training["steps"], "cells": cells}
    if (output / WEIGHTS).is_file():
        weights = json.loads((output / WEIGHTS).read_bytes())
        for entry in weights:
            for cell in entry["cells"].values():
                cell["group"] = group(cell)
        found["weights"] = weights
    return found


def name_of(cell: Mapping[str, Any], hidden: str | None) -> str:
    """A cell's name without a group."""
    if hidden is None:
        return str(cell["cell"])
    return cell_name(cell_of({g: names for g, names in cell["features"].items() if g != hidden}))


def trainable(output: Path) -> int:
    """How many parameters a finished run trained."""
    metrics = json.loads((output / folders.METRICS).read_bytes())
    return int(metrics["training"]["trainable_parameters"])


def write_scores(
    path: Path, study: Mapping[str, Any], data: Mapping[str, Any], arms: Mapping[str, Any], missing: Iterable[str],
    devices: Iterable[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write ``scores.json`` whole.

    Args:
        path: the file.
        study: the study's name, seeds, held-out cells, claims and arms.
        data: the SHA-256 of each file that was read; names are written without the folder that they share.
        arms: for each arm's name, its title, ranks, choice and so on, and its ``seeds``.
        missing: the names of the runs that are not finished.
        devices: those that the finished runs trained on.
    """
    inside = [str(Path(name).parent) for name in data if Path(name).is_absolute()]
    folder = os.path.commonpath(inside) + os.sep if inside else ""
    said = {
        **study,
        "command": command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine_of(devices),
        "versions": versions("torch", "transformers", "accelerate", "datasets", "numpy"),
        "data": {name.removeprefix(folder): digest for name, digest in data.items()},
        "arms": dict(arms),
        "missing": list(missing),
    }
    folders.write_json(path, said)
    return said


def machine_of(devices: Iterable[str]) -> dict[str, Any]:
    """The machine, with the names of the cards among the devices, such as ``cuda:0``, that were used."""
    return machine(", ".join(sorted(map(card, set(devices)))) or "cpu")


def card(device: str) -> str:
    """The name of a CUDA device's card where it can be had, or the device as it is."""
    if not device.startswith("cuda"):
        return device
    try:
        import torch

        return str(torch.cuda.get_device_name(device))
    except (
        ImportError,
        RuntimeError,
        AssertionError,
        ValueError,
    ):  # another machine than that of the runs
        return device


def commit() -> str | None:
    """The commit of flix's own sources, with ``+`` if they differ from it; None without a repository."""
    folder = str(Path(__file__).parent)
    try:
        found = [
            subprocess.run(
                ["git", "-C", folder, *what], capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", folder])
        ]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] + ("+" if found[1] else "")

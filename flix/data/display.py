"""What people are told of a mixture: a table, rows by feature, and features that no row activates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flix.core.errors import listed
from flix.core.features.names import Feature, written
from flix.core.features.registry import FeatureRegistry
from flix.core.tables import Cell, text_table
from flix.data.errors import DataError

if TYPE_CHECKING:
    from flix.data.chosen import ChosenRows
    from flix.data.mixture import Mixture


def table_of(
    rows: Sequence[tuple[str, int, int, float, int]],
    held: Sequence[tuple[str, int]],
    *,
    temperature: float,
) -> str:
    """The table.

    Args:
        rows: of each trained cell its name, its rows, what it counts for, its probability, its rows in an epoch.
        held: of each held-out cell its name and its rows.
        temperature: of the mixture.
    """
    lines: list[list[Cell]] = [[name, n, m, f"{p:.4f}", k] for name, n, m, p, k in rows]
    lines += [[name, n, "", "", "held out"] for name, n in held]
    total = sum(k for *_, k in rows)
    text = text_table(["cell", "rows", "counted", "p", "an epoch"], lines, left=1)
    return f"{text}\n{len(rows)} cells, {total:,} rows an epoch, temperature {temperature:g}"


def described(mixture: Mixture, rows: int) -> dict[str, Any]:
    """A mixture as JSON has it, with how many of a run's first rows it draws of each cell.

    Args:
        mixture: the mixture.
        rows: of the run.
    """
    chosen = mixture.evaluation_rows()
    drawn = None if mixture.streamed else mixture.drawn(rows)
    counts = np.bincount(chosen.cells, minlength=len(chosen.names)).tolist()
    evaluation = dict(zip(chosen.names, counts, strict=True))
    cells = [
        {
            "cell": name,
            "features": {group: list(names) for group, names in cell},
            "rows": size,
            "counted": mixture.counted.get(name, 0),
            "probability": mixture.probabilities.get(name, 0.0),
            "drawn": None if drawn is None else drawn.get(name, 0),
            "held_out": name in mixture.held_out_cells,
            "evaluation_rows": evaluation.get(name, 0),
        }
        for name, cell, size in mixture.all_cells()
    ]
    return {"temperature": mixture.temperature, "epoch_size": mixture.epoch_size, "cells": cells}


def feature_rows(mixture: Mixture, registry: FeatureRegistry) -> dict[Feature, int]:
    """The training rows of every feature that a registry has; empty where streams name their rows' features."""
    if mixture.opaque:
        return {}
    known = mixture.feature_sizes()
    return {feature: known.get(feature, 0) for feature in registry.features}


def trained_rows(mixture: Mixture) -> list[dict[str, list[str]]]:
    """What the trained cells activate: the datasets that rank rules and plans ask for."""
    return [{group: list(names) for group, names in cell} for cell in mixture.trained_cells()]


def idle_notes(
    mixture: Mixture, registry: FeatureRegistry, trained: Collection[Feature] = ()
) -> list[str]:
    """What to say of features that no training row activates.

    Args:
        mixture: the rows.
        registry: the features.
        trained: features that were trained before.
    """
    counts = feature_rows(mixture, registry)
    idle = [written(f) for f, count in counts.items() if not count and f not in trained]
    if not idle:
        return []
    are, they = ("is", "it") if len(idle) == 1 else ("are", "they")
    return [
        f"no training row activates {listed(idle)}, which {are} never trained: {they} will change nothing"
    ]


def check_best(best: str | None, rows: ChosenRows) -> None:
    """Refuse to keep the best adapter by what no evaluation can tell.

    Args:
        best: what it is chosen by, such as ``"held_out.loss"``; None for nothing.
        rows: to evaluate on.

    Raises:
        DataError: there are no such rows.
    """
    half = best.partition(".")[0] if best and "." in best else ""
    seen = rows.seen[rows.cells]
    mine = {"seen": seen, "held_out": ~seen}.get(half, np.ones(len(rows), bool))
    if best is None or mine.any():
        return
    where = {"seen": "of seen combinations ", "held_out": "of held-out combinations "}.get(half, "")
    there = "there are none" if not len(rows) else f"all {len(rows):,} are of the others"
    raise DataError(
        f"training.best: {best} needs evaluation rows {where}to choose by, and {there}; eval_files:, eval_split: and "
        "eval_rows: give some, and held_out: says which combinations are held out"
    )

"""The mixture and the examples, on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flix.report.figures import Figures
from flix.report.grid import ALL, Axes, row_grid
from flix.report.records import Drawn, Sampling
from flix.report.runs import Run
from flix.report.view import Figure, Table, View


def mixture(view: View, mixture: Sampling, axes: Axes, figures: Figures) -> dict[str, Any]:
    held = [c for c in mixture.cells if c.held_out]
    trained = [c for c in mixture.cells if not c.held_out]
    temperature = "unknown" if mixture.temperature is None else f"{mixture.temperature:g}"
    text = (
        f"{len(trained)} cells with {sum(c.rows for c in trained):,} rows are trained on, "
        f"{len(held)} {'are' if len(held) != 1 else 'is'} held out. Temperature {temperature}"
        f"{f', cap {mixture.cap}' if mixture.cap else ''}"
        f"{f', {mixture.epoch_size:,} rows an epoch' if mixture.epoch_size else ''}; "
        f"{sum(c.drawn for c in trained):,} rows were drawn."
    )
    shares = _by_feature(trained, axes)
    drawn = []
    if shares:
        drawn.append(
            Figure(
                figures.dots(shares),
                view.heading("Shares of rows and draws"),
                "Each feature's share of the rows, and of the draws: temperature lifts small "
                "features.",
            )
        )
    return {
        "text": text,
        "grid": row_grid(axes, mixture.cells),
        "caption": "Rows for training, coloured by their logarithm. ° held out of training. · no such cell.",
        "figures": drawn,
        "table": Table(
            "All cells of the mixture.",
            ["cell", "rows", "probability", "drawn", "evaluation rows"],
            [
                [
                    c.name, f"{c.rows:,}", "held out" if c.held_out else f"{c.probability:.4f}",
                    f"{c.drawn:,}", f"{c.evaluation_rows:,}",
                ]
                for c in mixture.cells
            ],
        ),
    }  # fmt: skip


def _by_feature(cells: Sequence[Drawn], axes: Axes) -> dict[str, list[tuple[str, float, float]]]:
    """Of each axis its names with their shares of rows and of draws (planned ones before the first), largest first."""
    drawn = sum(c.drawn for c in cells)
    found: dict[str, list[tuple[str, float, float]]] = {}
    rows = sum(c.rows for c in cells)
    for number, group in enumerate((axes.rows, axes.columns)):
        if group is None or not rows:
            continue
        shares: dict[str, list[float]] = {}
        for cell in cells:
            share = shares.setdefault(axes.place(cell.features)[number], [0.0, 0.0])
            share[0] += cell.rows / rows
            share[1] += cell.drawn / drawn if drawn else cell.probability
        some = [(name, a, b) for name, (a, b) in sorted(shares.items(), key=lambda e: -e[1][0])]
        found[group] = some[:60]
    return found


def examples(run: Run, axes: Axes | None) -> dict[str, Any]:
    assert run.examples is not None
    kept, count = run.examples.kept, run.examples.count
    features = {c.name: c.features for c in (run.metrics.cells if run.metrics else ())}
    features.update((c.name, c.features) for c in (run.mixture.cells if run.mixture else ()))
    names = list(dict.fromkeys(e.cell for e in kept))
    places = {
        name: axes.place(features[name]) if axes is not None and name in features else (ALL, ALL)
        for name in names
    }
    right = {None: 2, True: 1, False: 0}
    choices: list[tuple[str, str, list[tuple[str, str]]]] = []
    for number, (field_, group) in enumerate(
        (("row", axes.rows if axes else None), ("column", axes.columns if axes else None))
    ):
        if group is not None:
            found = sorted({place[number] for place in places.values()})
            choices.append((field_, group, [(name, name) for name in found]))
    words = {0: "wrong", 1: "right", 2: "not judged"}
    judged = sorted({right[e.right] for e in kept})
    choices.append(("answer", "answer", [(str(j), words[j]) for j in judged]))
    known = [e.right for e in kept if e.right is not None]
    return {
        "text": f"{len(kept):,} of {count:,} predictions; at most 20 right and 20 wrong ones of a cell, long texts cut. "
        f"Of those shown, {sum(known):,} are right and {len(known) - sum(known):,} wrong: this "
        f"does not measure the run.",
        "choices": choices,
        "data": {
            "cells": [[name, *places[name]] for name in names],
            "examples": [
                [names.index(e.cell), e.source, e.target, e.output, right[e.right]] for e in kept
            ],
        },
    }

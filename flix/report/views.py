"""What the page shows of one run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from flix.report.data import examples, mixture
from flix.report.figures import Figures
from flix.report.grid import Axes, decimal, difference_grid, metric_name, score_grid
from flix.report.records import Curves, Point, Scored
from flix.report.runs import Run
from flix.report.sharing import features, shared
from flix.report.updates import MOST, compare
from flix.report.view import Figure, Table, View


def view_of(run: Run, number: int, first: Run | None, axes: Axes | None, figures: Figures) -> View:
    """Everything that the page shows of a run.

    Args:
        run: the run.
        number: its place among the page's.
        first: the run that it is compared with; None if it is the only one.
        axes: the groups of the grids.
        figures: draws.
    """
    updates = compare(run.adapter) if run.adapter is not None else None
    view = View(run, number, first is not None, axes, updates)
    if run.metrics is not None and run.metrics.cells and axes is not None:
        _put_scores(view, run.metrics.cells, axes)
        if first is not None and first is not run and first.metrics and first.metrics.cells:
            _put_difference(view, first, run.metrics.cells, axes)
    if run.curves is not None:
        view.panels = _panels(view, run.curves, figures)
    view.shared = shared(view, updates, figures) if updates is not None else None
    view.features = features(run, updates)
    if run.mixture is not None and axes is not None:
        view.mixture = mixture(view, run.mixture, axes, figures)
    if run.examples is not None and run.examples.kept:
        view.examples = examples(run, axes)
    _put_origin(view)
    return view


def _put_scores(view: View, cells: Sequence[Scored], axes: Axes) -> None:
    grid = score_grid(axes, cells)
    known = [cell for cell in cells if cell.score is not None]
    if known:
        view.worst_cell = min(known, key=lambda cell: cell.score or 0.0)
        view.worst = axes.place(view.worst_cell.features)
    several = len({axes.place(c.features) for c in cells}) < len(cells)
    view.scores = grid
    view.score_caption = (
        f"The main metric of each cell; colours from {decimal(grid.low)} to {decimal(grid.high)}. "
        "° held out of training. · no such cell. A frame marks the lowest."
        + (" Places of several cells show their mean." if several else "")
    )
    metrics = list(dict.fromkeys(name for cell in cells for name in cell.scores))
    view.cells = Table(
        "Intervals are of the main metric, at 95 %.",
        ["cell", "trained", "kind", "rows", "metric", "score", "interval", *(metric_name(m) for m in metrics)],
        [
            [
                c.name, "yes" if c.seen else "held out", c.kind, f"{c.rows:,}", metric_name(c.metric), decimal(c.score),
                f"{decimal(c.interval[0])} to {decimal(c.interval[1])}" if c.interval else "–",
                *(decimal(c.scores[m]) if m in c.scores else "" for m in metrics),
            ]
            for c in cells
        ],
        texts=(1, 2, 4),
    )  # fmt: skip


def _put_difference(view: View, first: Run, cells: Sequence[Scored], axes: Axes) -> None:
    assert first.metrics is not None
    view.difference = difference_grid(axes, first.metrics.cells, cells)
    view.difference_heading = f"{first.name} less {view.name}, in points"
    most = view.difference.high
    alone = len({c.name for c in first.metrics.cells} ^ {c.name for c in cells})
    view.difference_caption = (
        f"Above 0: {first.name} is better. Bold: the 95 % intervals do not touch. Colours from −{most:.1f} to "
        f"{most:.1f}. ° held out of training."
        + (f" {alone} cells that only one of the two has are left out." if alone else "")
    )


def _panels(view: View, curves: Curves, figures: Figures) -> list[Figure]:
    """Losses by feature, a figure for each group: of evaluation, or of training where nothing was evaluated."""
    evaluated = bool(curves.evaluated_by_feature)
    source = curves.evaluated_by_feature if evaluated else curves.by_feature
    what = "evaluation" if evaluated else "training"
    groups: dict[str, dict[str, Sequence[Point]]] = {}
    for feature, points in source.items():
        group, _, name = feature.partition("=")
        if points:
            groups.setdefault(group, {})[name] = points
    found = []
    for group, some in groups.items():
        highest = sorted(some, key=lambda name: -some[name][-1][1])[:MOST]
        text = f"Loss in {what} by {group}, over the steps. Faint: the mean of all. In the corner: the last value."
        if left := len(some) - len(highest):
            text += f" The {left} lowest are left out, and not in the mean."
        drawn = figures.panels({name: some[name] for name in sorted(highest)})
        found.append(Figure(drawn, view.heading(f"Loss of {what} by {group}"), text))
    return found


def _put_origin(view: View) -> None:
    facts = view.run.facts
    command = [part.text() or "" for part in facts.get("command").parts()]
    view.command = shlex.join(command) if command else None
    rows = [(name, part.plain()) for name, part in facts.get("versions").items()]
    rows += [(name, part.plain()) for name, part in facts.get("machine").items()]
    rows += [
        (name, facts.get(name).plain()) for name in ("started", "seed") if facts.get(name).value is not None
    ]  # fmt: skip
    if rows:
        view.versions = Table("Versions and machine.", ["what", "value"], rows, texts=(1,))
    files = [
        [
            entry.get("name").text() or "", "evaluation" if entry.get("evaluation").flag() else "training",
            _count(entry.get("rows").whole()), file.get("name").text() or "", _count(file.get("bytes").whole()),
            file.get("sha256").text() or "–",
        ]
        for entry in facts.get("data").parts()
        for file in entry.get("files").parts()
    ]  # fmt: skip
    if files:
        view.data = Table(
            "Fingerprints of the data; the rows are those of the whole data set.",
            ["data set", "for", "rows", "file", "bytes", "sha256"],
            files,
            texts=(1, 3, 5),
        )


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"

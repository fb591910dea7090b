"""The page: one HTML file that holds everything it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flix._version import __version__
from flix.report.figures import Figures
from flix.report.grid import Axes, choose_axes, decimal, metric_name
from flix.report.records import Point, Scored
from flix.report.runs import Run, read_runs
from flix.report.view import Figure, Table, View
from flix.report.views import view_of
from flix.report.writing import Sentence, Written, check_out, is_report, marked, put, rendered, safe


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    rows: str | None = None,
    columns: str | None = None,
    force: bool = False,
) -> Written:
    """Write one page about one or several runs. The first run is compared with each of the others.

    Args:
        runs: folders that ``flix train`` or ``flix quickstart`` wrote.
        out: the page; default: ``report.html`` in the first run's folder.
        rows: the group whose features are the rows of the grids; default: chosen from the cells.
        columns: the group of the columns.
        force: overwrite a file that is not a report.

    Raises:
        ReportError: runs that :func:`read_runs` refuses, a group that no cell names, an ``out`` that is a folder, or
            a file that is not a report.
        MissingFrameworkError: jinja2 or matplotlib is not installed.
        OSError: a file cannot be read or written.
    """
    found = read_runs(runs)
    out = out if out is not None else runs[0] / "report.html"
    check_out(out, force, runs)
    text, short, missing = page(found, rows, columns)
    return Written(out, put(out, text), short, missing)


def remove_report(run: Path) -> None:
    """Remove the old page of a run that has continued; a file of its name that is not a report stays.

    Raises:
        OSError: it cannot be read or removed.
    """
    if (out := run / "report.html").is_file() and is_report(out):
        out.unlink()


def page(
    runs: Sequence[Run], rows: str | None = None, columns: str | None = None
) -> tuple[str, list[str], list[str]]:
    """The page, the sentences on top of it, and what it lacks.

    Raises:
        ReportError, MissingFrameworkError: as :func:`write_report`.
    """
    axes = choose_axes(runs, rows, columns)
    figures = Figures()
    first = runs[0] if len(runs) > 1 else None
    views = [view_of(run, number, first, axes, figures) for number, run in enumerate(runs)]
    missing = [f"{run.name}: {text}" if first else text for run in runs for text in run.missing]
    short = _short(views)
    names = ", ".join(run.name for run in runs)
    text = rendered(
        "page.html",
        title=f"flix report: {names}",
        subtitle=_subtitle(runs),
        parts=_PARTS,
        short=[marked(parts) for parts in short],
        missing=missing,
        axes=axes,
        views=[_safe_figures(view) for view in views],
        comparison=_comparison(views) if first else None,
        figures=[_safe_figure(f) for f in _curves(runs, figures)],
        cost=_cost(runs),
        footer=f"Written by flix {__version__} from {names}.",
    )
    return text, ["".join(part for part, _ in parts) for parts in short], missing


_PARTS = (
    ("scores", "Scores"), ("curves", "Learning curves"), ("shared", "What features share"), ("mixture", "Mixture"),
    ("examples", "Examples"), ("cost", "Cost"), ("origin", "Command, versions, data"),
)  # fmt: skip


def _short(views: Sequence[View]) -> list[Sentence]:
    """The sentences on top: comparisons, the worst cell, the most similar pair of a group, the command."""
    first, of = views[0], f" of {views[0].name}" if len(views) > 1 else ""
    found = [s for other in views[1:] if (s := _against(first, other)) is not None]
    if (cell := first.worst_cell) is not None and first.run.metrics is not None:
        named = f"Worst cell{of}: "
        where = _place(cell, first.axes)
        if same := sum(c.score == cell.score for c in first.run.metrics.cells) - 1:
            where += f" and {same} more"
        text = f" with {decimal(cell.score)} {metric_name(cell.metric)}"
        if cell.interval is not None:
            text += f" (95 %: {decimal(cell.interval[0])} to {decimal(cell.interval[1])})"
        text += f" on {cell.rows:,} rows" + ("" if cell.seen else ", held out of training")
        seen, held = first.run.metrics.mean(True), first.run.metrics.mean(False)
        text += f". Mean of the cells trained on: {decimal(seen)}"
        text += f", of those held out: {decimal(held)}." if held is not None else "."
        found.append([(named, ""), (where, "b"), (text, "")])
    if first.updates is not None and first.axes is not None:
        for group in (first.axes.rows, first.axes.columns):
            if group in first.updates.alike and group is not None:
                best, least = first.updates.alike[group], first.updates.least[group]
                text = f": the cosine between their updates is {_hundredths(best.cosine)}, over all layers."
                if (best.one, best.other) != (least.one, least.other):
                    text += f" Least: {least.one} and {least.other}, {_hundredths(least.cosine)}."
                named = f"Most similar pair of the group {group}{of}: "
                found.append(
                    [
                        (named, ""),
                        (f"{best.one} and {best.other}", "b"),
                        (text, ""),
                    ]
                )
    commands = [view.command for view in views]
    for view in views:
        if view.command is not None:
            every = commands.count(view.command) == len(views)
            named = "Command: " if every else f"Command of {view.name}: "
            found.append([(named, ""), (view.command, "code")])
            if every:
                break
    return found


def _place(cell: Scored, axes: Axes | None) -> str:
    """A cell's features as the grid has them, its row first."""
    order = [axes.rows, axes.columns] if axes is not None else []
    said = sorted(cell.features, key=lambda e: order.index(e[0]) if e[0] in order else len(order))
    return ", ".join("+".join(names) for _, names in said)


def _hundredths(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _against(first: View, other: View) -> Sentence | None:
    """How the first run does beside another, over the cells that both have."""
    mine, theirs = first.run.metrics, other.run.metrics
    if mine is None or theirs is None:
        return None
    of = {cell.name: cell for cell in theirs.cells}
    pairs = [(c, of[c.name]) for c in mine.cells if c.name in of]
    known = [(a, b) for a, b in pairs if a.score is not None and b.score is not None]
    if not known:
        return None
    sentence: Sentence = [(f"{first.name} against {other.name}: ", "")]
    for seen, words in ((True, "on cells trained on"), (False, "held out")):
        some = [(a.score or 0.0, b.score or 0.0) for a, b in known if a.seen is seen]
        if some:
            one, two = (sum(pair[i] for pair in some) / len(some) for i in (0, 1))
            sentence.append((f"{decimal(one - two, signed=True)} points", "b"))
            sentence.append((f" {words} ({decimal(one)} against {decimal(two)}); ", ""))
    better = sum((a.score or 0.0) > (b.score or 0.0) for a, b in known)
    return [*sentence, (f"better in {better} of {len(known)} cells.", "")]


def _comparison(views: Sequence[View]) -> Table:
    """The runs side by side."""
    runs = [view.run for view in views]

    def mean(run: Run, seen: bool) -> str:
        return decimal(run.metrics.mean(seen)) if run.metrics is not None else "–"

    def cells(run: Run) -> str:
        return f"{len(run.metrics.cells):,}" if run.metrics is not None else "–"

    kinds = sorted(
        {c.kind for run in runs for c in (run.metrics.cells if run.metrics else ()) if c.kind}
    )

    def of_kind(run: Run, kind: str) -> str:
        some = [
            c.score
            for c in (run.metrics.cells if run.metrics else ())
            if c.kind == kind and c.score is not None
        ]
        return decimal(sum(some) / len(some)) if some else "–"

    return Table(
        "Means of the cells' main metrics: trained on, held out, and by kind.",
        ["run", "trained on", "held out", *(kinds if len(kinds) > 1 else ()), "cells"],
        [
            [run.name, mean(run, True), mean(run, False), *(of_kind(run, k) for k in kinds if len(kinds) > 1), cells(run)]
            for run in runs
        ],
    )  # fmt: skip


def _curves(runs: Sequence[Run], figures: Figures) -> list[Figure]:
    """The runs' losses in one figure, and their mean scores in another."""
    losses: dict[str, list[tuple[str, str, Sequence[Point]]]] = {}
    scores: dict[str, list[tuple[str, str, Sequence[Point]]]] = {}
    for run in runs:
        if run.curves is None:
            continue
        name = f"{run.name}, " if len(runs) > 1 else ""
        curves = run.curves
        apart = bool(curves.held_out or curves.held_out_scores)
        lines: list[tuple[str, str, Sequence[Point]]] = [
            (f"{name}training", ":", curves.loss),
            (f"{name}evaluation{', cells trained on' if apart else ''}", "-", curves.evaluated),
            (f"{name}evaluation, held out", "--", curves.held_out),
        ]
        losses[run.name] = [line for line in lines if line[2]]
        some: list[tuple[str, str, Sequence[Point]]] = [
            (f"{name}cells trained on" if apart else run.name, "-", curves.scores),
            (f"{name}held out", "--", curves.held_out_scores),
        ]
        if any(points for _, _, points in some):
            scores[run.name] = [line for line in some if line[2]]
    found = []
    if any(losses.values()):
        found.append(
            Figure(
                figures.curves("loss", losses),
                "Losses over the steps",
                "Loss over the steps: of training (dotted), and of evaluation (dashed: held-out cells).",
            )
        )
    if scores:
        found.append(
            Figure(
                figures.curves("mean score", scores),
                "Mean scores over the steps",
                "Mean of the cells' main scores at each evaluation (dashed: held-out cells).",
            )
        )
    return found


def _cost(runs: Sequence[Run]) -> Table:
    """What each run took; a dash where its run.json does not say."""

    def number(*path: str, show: Callable[[float], str] = "{:,.0f}".format) -> Callable[[Run], str]:
        def found(run: Run) -> str:
            part = run.facts
            for key in path:
                part = part.get(key) if part.value is not None else part
            value = part.number()
            return "–" if value is None else show(value)

        return found

    facts: tuple[tuple[str, Callable[[Run], str]], ...] = (
        ("steps", number("steps")),
        ("time", number("seconds", show=duration)),
        ("seconds a step", number("cost", "seconds_a_step", show="{:.3g}".format)),
        ("tokens", number("cost", "tokens")),
        ("peak memory", number("cost", "peak_memory_bytes", show=lambda b: f"{b / 2**30:.2f} GiB")),
        ("parameters of the base", number("parameters", "base")),
        ("parameters that train", number("parameters", "trainable")),
    )
    return Table(
        "What the runs cost; a dash means that run.json does not say.",
        ["cost", *(run.name for run in runs)],
        [[name, *(of(run) for run in runs)] for name, of in facts],
    )


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _subtitle(runs: Sequence[Run]) -> str:
    base = next(
        (r.adapter.base.name for r in runs if r.adapter and r.adapter.base and r.adapter.base.name),
        None,
    )
    said = f"Base: {base}. " if base else ""
    if len(runs) > 1:
        return f"{said}{runs[0].name} is compared with {', '.join(r.name for r in runs[1:])}."
    return f"{said}Folder: {runs[0].folder}"


def _safe_figure(figure: Figure) -> Figure:
    return Figure(safe(figure.svg), figure.label, figure.caption)


def _safe_figures(view: View) -> View:
    view.panels = [_safe_figure(f) for f in view.panels]
    for part in (view.shared, view.mixture):
        if part is not None:
            part["figures"] = [_safe_figure(f) for f in part["figures"]]
    return view


__all__ = ["Written", "page", "remove_report", "write_report"]

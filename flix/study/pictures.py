"""Chooses the figures of a study that each picture shows."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Sequence

from flix.study import tables
from flix.study.claims import Estimate, differences, leading_arms, level
from flix.study.curves import Curve
from flix.study.evidence import ArmScores, EvidenceError, Study
from flix.study.plots import Dot, Line, Plots

DRAWS = 2_000


def dot(found: Estimate) -> Dot:
    """A figure with its interval."""
    return Dot(found.value, found.low, found.high)


def unit_of(columns: Sequence[tuple[str, str, str]]) -> str:
    """The text at the axis of some columns: their metric, if all have the same."""
    metrics = {metric for _, _, metric in columns}
    return f"{tables.metric_text(metrics.pop())}, %" if len(metrics) == 1 else "score"


def main(study: Study, plots: Plots) -> str:
    """The main arms and the untrained base, on seen and on zero-shot cells."""
    arms, columns = tables.main_arms(study, untrained=True), tables.columns_of(study)
    cells = {column: tables.shared_cells(arms, *column[1:]) for column in columns}
    panels = {
        heading_of(column, columns): [
            {"": dot(level(study, arm.name, cells[column]))} if tables.cells_of(arm, *column[1:]) else {}
            for arm in arms
        ]
        for column in columns
        if cells[column]
    }  # fmt: skip
    _need(arms and panels, study)
    title = f"{study.name}: each method's mean over cells, with 95 % intervals"
    ahead = leading_arms(study)
    leading = sum(1 for _ in itertools.takewhile(lambda arm: arm.name in ahead, arms)) or 1
    return plots.dots(title, [short(arm) for arm in arms], panels, unit_of(columns), numbers=True, leading=leading)  # fmt: skip


def heading_of(column: tuple[str, str, str], columns: Sequence[tuple[str, str, str]]) -> str:
    """The heading of a panel for one column: its cells, and their metric if there are several metrics."""
    _, group, metric = column
    several = len({metric for _, _, metric in columns}) > 1
    return f"{tables.LABELS[group]} cells{', ' + tables.metric_text(metric) if several else ''}"


def short(arm: ArmScores) -> str:
    """An arm's title in lines that fit beside a picture."""
    return "\n".join(textwrap.wrap(arm.title, 34)) or arm.name


def tasks(study: Study, plots: Plots) -> str:
    """The main arms task by task, on seen cells."""
    arms, columns = tables.main_arms(study), tables.columns_of(study, ["seen"])
    _need(columns if arms else [], study)
    cells = arms[0].runs[min(arms[0].runs)].cells
    shared = [name for _, g, m in columns for name in tables.shared_cells(arms, g, m)]
    names = list(dict.fromkeys(cells[name].features.get("task", "–") for name in shared))
    rows = []
    for task in names:
        row = {}
        for arm in arms:
            mine = [name for name in shared if cells[name].features.get("task", "–") == task]
            row[arm.title] = dot(level(study, arm.name, mine, draws=DRAWS))
        rows.append(row)
    title = f"{study.name}: the main methods by task, seen cells"
    return plots.dots(title, names, {"seen cells, by task": rows}, unit_of(columns))


def sizes(study: Study, plots: Plots) -> str:
    """The main arms over quartiles of the cells' training rows."""
    arms, parts = tables.main_arms(study), tables.size_parts(study)
    _need(parts, study)
    if len(columns := tables.columns_of(study, ["seen"])) > 1:
        raise EvidenceError(f"the study {study.name!r} has cells of several metrics, which have no mean")  # fmt: skip
    lines = []
    for arm in arms:
        found = [level(study, arm.name, names, draws=DRAWS) for names in parts.values()]
        lines.append(Line(arm.title, range(len(parts)), [f.value for f in found], [(f.low, f.high) for f in found]))  # fmt: skip
    ticks = [(float(i), part.replace(" to ", "\nto ")) for i, part in enumerate(parts)]
    return plots.lines(
        f"{study.name}: seen cells by their training rows", {"": lines}, {"": "training rows of a cell, quartiles"}, unit_of(columns), ticks=ticks,
    )  # fmt: skip


def zero_shot(study: Study, plots: Plots) -> str:
    """The main arms in each cell that nothing was trained or chosen on."""
    arms, columns = tables.main_arms(study), tables.columns_of(study, ["last_word"])
    _need(columns if arms else [], study)
    names = [n for _, g, m in columns for n in tables.cells_of(arms[0], g, m)]
    rows = [
        {arm.title: Dot(statistics.fmean(tables.means(arm, [name]))) for arm in arms}
        for name in names
    ]
    title = f"{study.name}: zero-shot cells, means over seeds"
    return plots.dots(title, [tables.cell_title(n) for n in names], {"zero-shot cells": rows}, unit_of(columns))  # fmt: skip


def ablations(study: Study, plots: Plots) -> str:
    """The distance of every other arm from the first."""
    whole, columns = study.whole(), tables.columns_of(study)
    _need(whole[1:], study)
    panels: dict[str, list[dict[str, Dot]]] = {}
    for column in columns:
        heading, (group, metric) = heading_of(column, columns), column[1:]
        panels[heading] = []
        for arm in whole[1:]:
            mine = tables.cells_of(arm, group, metric)
            found = [d for d in differences(study, arm.name, whole[0].name, group, draws=DRAWS) if d.metric == metric] if mine else []  # fmt: skip
            panels[heading].append({"": dot(found[0])} if found else {})
    title = f"{study.name}: each method against {whole[0].title}, with 95 % intervals"
    return plots.dots(title, [short(arm) for arm in whole[1:]], panels, "points", zero=True, numbers=True)  # fmt: skip


def cost(study: Study, plots: Plots) -> str:
    """The score on seen cells against the number of trained parameters."""
    columns = tables.columns_of(study, ["seen"])
    _need(columns, study)
    _, group, metric = columns[0]
    arms = apart_in_size(study)
    cells = tables.shared_cells(arms, group, metric)
    points = {
        arm.title: (float(arm.trainable or 0), dot(level(study, arm.name, cells)))
        for arm in arms
        if tables.cells_of(arm, group, metric)
    }
    _need(points, study)
    title = f"{study.name}: quality and parameters"
    return plots.scatter(title, points, "parameters that are trained", f"seen cells, {tables.metric_text(metric)}, %")  # fmt: skip


def apart_in_size(study: Study) -> list[ArmScores]:
    """The main arms, and others whose number of parameters is at least a tenth away from that of each arm before."""
    arms = tables.main_arms(study, untrained=True)
    for arm in study.whole():
        size = arm.trainable
        if size is not None and all(not 0.9 <= size / (other.trainable or 1) <= 1.1 for other in arms if arm is not other):  # fmt: skip
            arms += [arm] if arm not in arms else []
    return [arm for arm in arms if arm.trainable is not None]


def unseen(study: Study, plots: Plots) -> str:
    """Languages that were never trained on, by how they are served."""
    arms, columns = study.whole(), tables.columns_of(study, ["last_word"])
    panels = {
        f"languages never trained on{', ' + tables.metric_text(metric) if len(columns) > 1 else ''}": [
            {"": dot(level(study, arm.name, cells))} if (cells := tables.cells_of(arm, group, metric)) else {}
            for arm in arms
        ]
        for _, group, metric in columns
    }  # fmt: skip
    _need(panels, study)
    title = "Languages never trained on, by how they are served"
    first = [arm.name.partition(", ")[0] for arm in arms]
    return plots.dots(
        title, [short(arm) for arm in arms], panels, unit_of(columns), numbers=True, leading=first.count(first[0]),
    )  # fmt: skip


def languages(studies: Sequence[Study], plots: Plots) -> str:
    """The same arms on mixtures of more and more languages."""
    studies = sorted((s for s in studies if s.whole()), key=tables.languages_of)
    if not studies:
        raise EvidenceError("no study of a number of languages has a finished arm")
    common = tables.common_cells(studies)
    counts = [tables.languages_of(study) for study in studies]
    panels: dict[str, list[Line]] = {"cells that all mixtures have": [], "zero-shot cells": []}
    for arm in tables.main_arms(studies[0]):
        for heading in panels:
            x, found = [], []
            for number, study in zip(counts, studies, strict=True):
                if arm.name not in study.planned or study.lacking([arm.name]):
                    continue
                zero = heading.startswith("zero")
                cells = tables.of_one_metric(study.arm(arm.name), "last_word") if zero else common
                if cells:
                    x.append(number)
                    found.append(level(study, arm.name, cells, draws=DRAWS))
            panels[heading].append(Line(arm.title, x, [f.value for f in found], [(f.low, f.high) for f in found]))  # fmt: skip
    across = dict.fromkeys(panels, "languages trained together")
    ticks = [(float(number), str(number)) for number in counts]
    return plots.lines("More and more languages", panels, across, "exact match, %", log=True, ticks=ticks)  # fmt: skip


def speed(curves: Sequence[Curve], plots: Plots) -> str:
    """Where runs of different lengths end on seen cells, over their steps and over their seconds."""
    panels = {
        "over steps": [Line(c.title, [p.steps for p in c.points], [p.seen for p in c.points]) for c in curves],
        "over seconds": [Line(c.title, [p.seconds for p in c.points], [p.seen for p in c.points]) for c in curves],
    }  # fmt: skip
    across = {"over steps": "steps of the run", "over seconds": "seconds of training"}
    return plots.lines("Speed or level: where runs of different lengths end", panels, across, "seen cells")  # fmt: skip


def _need(things: object, study: Study) -> None:
    if not things:
        raise EvidenceError(f"the study {study.name!r} has no finished arm for this picture")

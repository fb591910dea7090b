"""A study's tables. No table has an arm that is not finished. Scores of different metrics are never averaged."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flix.core.errors import listed
from flix.study.claims import by_metric, claimed_arms, differences, findings
from flix.study.evidence import ArmScores, EvidenceError, Study

LABELS = {"seen": "seen", "last_word": "zero-shot", "choosing": "tuning", "unseen": "unseen"}
MINUS = "−"


@dataclass(frozen=True)
class Table:
    """A table as text, with a line of text under it."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown: the first column to the left, the others to the right."""
        lines = ["| " + " | ".join(self.headings) + " |"]
        lines.append("|---" + "|---:" * (len(self.headings) - 1) + "|")
        lines += ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + (f"\n\n{self.note}" if self.note else "")


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def signed(value: float) -> str:
    """A difference: +3.1, −2.0."""
    return f"{MINUS if value < 0 else '+'}{abs(value):.1f}"


def count(value: int | None) -> str:
    """A number with commas; a dash for none."""
    return "–" if value is None else f"{value:,}"


def p_text(value: float, draws: int) -> str:
    """A p value; the smallest that the draws allow is written as a bound."""
    return f"< {2 / (draws + 1):.4f}" if value <= 1.5 / (draws + 1) else f"{value:.4f}"


def means(arm: ArmScores, cells: Sequence[str]) -> list[float]:
    """For each seed, the mean over some cells; each cell counts once."""
    return [float(np.mean([run.cells[name].score for name in cells])) for _, run in sorted(arm.runs.items())]  # fmt: skip


def mean_sd(values: Sequence[float]) -> str:
    """The mean over seeds, with their standard deviation if there are several."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def metric_text(metric: str) -> str:
    """``exact_match`` as people write it."""
    return metric.replace("_", " ")


def columns_of(study: Study, groups: Sequence[str] = ("seen", "last_word")) -> list[tuple[str, str, str]]:  # fmt: skip
    """The groups of cells that finished arms have and their metrics, as (heading, group, metric)."""
    found: dict[tuple[str, str], None] = {}
    for arm in study.whole():
        for group in groups:
            try:
                found.update(dict.fromkeys((group, metric) for metric in by_metric(arm, group)))
            except EvidenceError:
                continue
    several = len({metric for _, metric in found}) > 1
    return [(f"{LABELS[g]}, {metric_text(m)}" if several else LABELS[g], g, m) for g, m in found]


def cells_of(arm: ArmScores, group: str, metric: str) -> list[str]:
    """The arm's cells in a group with a metric; an empty list if it has none."""
    try:
        return by_metric(arm, group).get(metric, [])
    except EvidenceError:
        return []


def shared_cells(arms: Sequence[ArmScores], group: str, metric: str) -> list[str]:
    """The cells of a group and metric that all of some arms have; arms without any such cell do not count.

    An arm with one more task also has its cells. Means over different cells would say nothing about the arms.
    """
    sets = [cells for arm in arms if (cells := cells_of(arm, group, metric))]
    return [name for name in sets[0] if all(name in some for some in sets)] if sets else []


def main_arms(study: Study, untrained: bool = False) -> list[ArmScores]:
    """The finished arms that the study's claims name, or all finished arms if there are no claims.

    Args:
        study: the scores.
        untrained: include the untrained base.
    """
    names = claimed_arms(study) or list(study.planned)
    return [arm for arm in study.whole() if arm.name in names or (untrained and not arm.trainable)]


def unfinished(study: Study) -> str:
    """A sentence about what the tables leave out; empty if nothing is missing."""
    lacking = study.lacking(list(study.planned))
    return f"These runs are not finished, so their methods are left out: {listed(lacking, 30)}." if lacking else ""  # fmt: skip


def main_table(study: Study, every: bool = False) -> Table:
    """The main arms: active rank, parameters, and means over the cells that all of them have.

    Args:
        study: the scores.
        every: include all finished arms, not only the main ones.
    """
    columns = columns_of(study)
    arms = study.whole() if every else main_arms(study, untrained=True)
    cells = {column: shared_cells(arms, *column[1:]) for column in columns}
    rows = []
    for arm in arms:
        has = [bool(cells_of(arm, group, metric)) for _, group, metric in columns]
        scores = [mean_sd(means(arm, cells[c])) if h and cells[c] else "–" for c, h in zip(columns, has, strict=True)]  # fmt: skip
        rows.append((arm.title, count(arm.active_rank), count(arm.trainable), *scores))
    _need(rows, study)
    several = len({metric for _, _, metric in columns}) > 1
    told = ("; " if several else ", ").join(
        f"{len(cells[column])} {column[0]}" for column in columns
    )
    seeds = len(arms[0].runs)
    note = f"Means over cells ({told}) and {seeds} seed{'s' * (seeds != 1)}{', ± standard deviation over seeds' * (seeds > 1)}."  # fmt: skip
    return Table(("method", "active rank", "parameters", *(c[0] for c in columns)), rows, _joined(note, unfinished(study)))  # fmt: skip


def claims_table(study: Study, draws: int) -> Table:
    """The study's claims, each with the difference that was found, its interval and its p value."""
    rows: list[tuple[str, ...]] = []
    for found in findings(study, draws=draws):
        d = found.difference
        verdict = {True: "yes", False: "**no**", None: "–"}[found.holds]
        rows.append(
            (
                study.arms[found.arm].title, study.arms[found.against].title,
                f"{LABELS.get(found.group, found.group.replace('_', '-'))}, {metric_text(d.metric)}", signed(d.value),
                f"{signed(d.low)} to {signed(d.high)}", p_text(d.p, draws),
                "–" if found.at_least is None else f"{found.at_least:g} or more", verdict,
            )
        )  # fmt: skip
    _need(rows, study)
    headings = ("method", "against", "cells", "ahead by", "95 % interval", "p", "claimed", "holds")
    note = (
        f"Paired bootstrap over cells, items and seeds, {draws:,} draws. A claim holds if the difference is as large as "
        "claimed and p is below 0.01."
    )
    return Table(headings, rows, note)


def grouped(
    study: Study, group: str, key: Callable[[str], str], heading: str, order: Sequence[str] = ()
) -> Table:
    """The main arms on parts of a group's cells.

    Args:
        study: the scores.
        group: the group of cells.
        key: returns the part that a cell is in, from its name.
        heading: the heading of the column of parts.
        order: the order of the parts; default: as they come.
    """
    arms = main_arms(study)
    rows = []
    for _, of, metric in columns_of(study, [group]):
        parts: dict[str, list[str]] = {name: [] for name in order}
        for name in shared_cells(arms, of, metric):
            parts.setdefault(key(name), []).append(name)
        for part, names in parts.items():
            if names:
                rows.append((part, str(len(names)), *(mean_sd(means(arm, names)) for arm in arms)))
    _need(rows, study)
    return Table((heading, "cells", *(arm.title for arm in arms)), rows, unfinished(study))


def by_task(study: Study, group: str = "seen") -> Table:
    """The main arms task by task."""
    first = study.whole()[0].runs if study.whole() else {}
    cells = first[min(first)].cells if first else {}
    return grouped(study, group, lambda name: cells[name].features.get("task", "–"), "task")


def size_parts(study: Study, parts: int = 4) -> dict[str, list[str]]:
    """The seen cells, sorted by their training rows, in so many parts of equal number."""
    arms = main_arms(study)
    if not arms:
        return {}
    cells = arms[0].runs[min(arms[0].runs)].cells
    both = {
        name
        for _, group, metric in columns_of(study, ["seen"])
        for name in shared_cells(arms, group, metric)
    }
    seen = sorted(both, key=lambda name: (cells[name].trained, name))
    found: dict[str, list[str]] = {}
    for some in np.array_split(np.array(seen, object), parts):
        if len(some):
            low, high = cells[some[0]].trained, cells[some[-1]].trained
            found.setdefault(f"{low:,} to {high:,}", []).extend(str(name) for name in some)
    return found


def by_size(study: Study) -> Table:
    """The main arms on seen cells, from those with the fewest training rows to those with the most."""
    parts = size_parts(study)
    part_of = {name: part for part, names in parts.items() for name in names}
    return grouped(study, "seen", part_of.__getitem__, "training rows", list(parts))


def by_cell(study: Study, group: str = "last_word") -> Table:
    """The main arms cell by cell."""
    table = grouped(study, group, cell_title, "cell")
    rows = [(row[0], *row[2:]) for row in table.rows]  # each row is one cell: no need to count
    return Table((table.headings[0], *table.headings[2:]), rows, table.note)


def cell_title(name: str) -> str:
    """``language=deu,task=pron`` as people read it: ``deu pron``."""
    return " ".join(part.partition("=")[2] for part in name.split(","))


def ablations(study: Study, draws: int = 2_000) -> Table:
    """The distance of every other arm from the first, on seen and on zero-shot cells, with intervals."""
    whole = study.whole()
    first, rows = whole[0] if whole else None, []
    columns = columns_of(study)
    for arm in whole[1:]:
        told = []
        for _, group, metric in columns:
            mine = cells_of(arm, group, metric)
            assert first is not None
            found = [d for d in differences(study, arm.name, first.name, group, draws=draws) if d.metric == metric] if mine else []  # fmt: skip
            told.append(f"{signed(found[0].value)} ({signed(found[0].low)} to {signed(found[0].high)})" if found else "–")  # fmt: skip
        rows.append((arm.title, count(arm.trainable), *told))
    _need(rows, study)
    assert first is not None
    note = f"Points against {first.title}, with 95 % intervals. {unfinished(study)}".strip()
    return Table(("method", "parameters", *(c[0] for c in columns)), rows, note)


def cost(study: Study) -> Table:
    """What each finished arm costs, and how well it scores."""
    columns, rows = columns_of(study), []
    cells = {column: shared_cells(study.whole(), *column[1:]) for column in columns}
    for arm in study.whole():
        seconds = [run.seconds for run in arm.runs.values() if run.seconds is not None]
        steps = [run.steps for run in arm.runs.values() if run.steps is not None]
        a_step = f"{sum(seconds) / sum(steps):.2f}" if seconds and sum(steps) else "–"
        scores = [mean_sd(means(arm, cells[c])) if cells_of(arm, *c[1:]) and cells[c] else "–" for c in columns]  # fmt: skip
        time = f"{statistics.fmean(seconds):,.0f}" if seconds else "–"
        rows.append((arm.title, count(arm.trainable), count(arm.active_rank), time, a_step, *scores))  # fmt: skip
    _need(rows, study)
    headings = ("method", "parameters", "active rank", "seconds a run", "seconds a step", *(c[0] for c in columns))  # fmt: skip
    return Table(headings, rows, _joined("Several runs shared the machine, so the seconds compare methods, not machines.", unfinished(study)))  # fmt: skip


def weights(study: Study, raw: Mapping[str, Any]) -> Table:
    """Scores on zero-shot cells with each of the weights that the study tried, for every arm that has weights.

    Args:
        study: the scores.
        raw: the same scores as JSON.
    """
    rows: list[tuple[str, ...]] = []
    shared = raw.get("cells") or {}
    for arm in study.whole():
        found: dict[str, dict[str, list[float]]] = {}
        for run in raw["arms"][arm.name]["seeds"].values():
            for tried in run.get("weights") or []:
                by_metric: dict[str, list[float]] = {}
                for name, entry in tried["cells"].items():
                    cell = {**shared.get(name, {}), **entry}
                    if cell.get("group") == "last_word":
                        by_metric.setdefault(cell["metric"], []).append(cell["score"])
                for metric, scores in by_metric.items():
                    told = _weights_text(tried["weights"])
                    found.setdefault(told, {}).setdefault(metric, []).append(statistics.fmean(scores))  # fmt: skip
        chosen = raw["arms"][arm.name].get("weights") or {}
        for told, of in found.items():
            is_chosen = told == _weights_text(chosen)
            for metric, seeds in of.items():
                rows.append((arm.title, told, "yes" if is_chosen else "", metric_text(metric), mean_sd(seeds)))  # fmt: skip
    _need(rows, study)
    searched = any("searched" in told for _, told, *_ in rows)
    note = "The weights were chosen on the tuning cells."
    if searched:
        note += " Searched weights learn from some rows of the cell itself. Those rows are not scored, and searched weights are never chosen."
    return Table(("method", "weights of features", "chosen", "score", "zero-shot"), rows, _joined(note, unfinished(study)))  # fmt: skip


def _weights_text(given: Mapping[str, Any]) -> str:
    """``{"language": 0.5}`` as people read it: ``language 0.5``."""
    told = {group: f"{how:g}" if isinstance(how, int | float) else how for group, how in given.items()}  # fmt: skip
    return ", ".join(f"{group} {how}" for group, how in told.items())


def unseen(study: Study) -> Table:
    """Scores on languages that were in no task, by how they are served."""
    relatives = study.made.get("relatives") or {}
    rows = []
    for arm in study.whole():
        cells = arm.runs[min(arm.runs)].cells
        for metric in by_metric(arm, "last_word"):
            names = cells_of(arm, "last_word", metric)
            near = [n for n in names if relatives.get(cells[n].features.get("language", ""))]
            far = [n for n in names if n not in near]
            told = [mean_sd(means(arm, some)) if some else "–" for some in (names, near, far)]
            rows.append((arm.title, *told))
    _need(rows, study)
    known = ", ".join(f"{lang} ({', '.join(of) if of else 'none'})" for lang, of in relatives.items())  # fmt: skip
    note = f"Languages and their relatives among the trained ones: {known}." if known else ""
    return Table(("served by", "all", "with relatives", "without"), rows, _joined(note, unfinished(study)))  # fmt: skip


def languages_of(study: Study) -> int:
    """How many languages a study's arms are trained on."""
    arm = study.whole()[0]
    cells = arm.runs[min(arm.runs)].cells.values()
    return len({cell.features.get("language") for cell in cells if cell.group == "seen"})


def common_cells(studies: Sequence[Study]) -> list[str]:
    """The seen cells that all of some studies have, in the order of the first study."""
    sets = []
    for study in studies:
        arm = study.whole()[0]
        cells = arm.runs[min(arm.runs)].cells
        sets.append([name for name, cell in cells.items() if cell.group == "seen"])
    return [name for name in sets[0] if all(name in some for some in sets[1:])]


def by_languages(studies: Sequence[Study]) -> Table:
    """The same arms on mixtures of more and more languages: all seen cells, and those that all mixtures have."""
    studies = sorted((s for s in studies if s.whole()), key=languages_of)
    if not studies:
        raise EvidenceError("no study of a number of languages has a finished arm")
    common = common_cells(studies)
    arms = [arm.name for arm in main_arms(studies[0])]
    rows = []
    for study in studies:
        told = []
        for name in arms:
            if study.lacking([name]) or name not in study.planned:
                told += ["–"] * 3
                continue
            arm = study.arm(name)
            for cells in (common, of_one_metric(arm, "seen"), of_one_metric(arm, "last_word")):
                told.append(mean_sd(means(arm, cells)) if cells else "–")
        rows.append((str(languages_of(study)), *told))
    titles = [studies[0].arms[name].title for name in arms]
    headings = ["languages", *(f"{title}: {what}" for title in titles for what in ("common", "seen", "zero-shot"))]  # fmt: skip
    note = f"Common: the {len(common)} cells of the languages that all mixtures have. {' '.join(filter(None, map(unfinished, studies)))}"  # fmt: skip
    return Table(tuple(headings), rows, note.strip())


def of_one_metric(arm: ArmScores, group: str) -> list[str]:
    """An arm's cells in a group, which must all have one metric; an empty list if it has none.

    Raises:
        EvidenceError: they have several metrics.
    """
    found = {name: cell.metric for name, cell in arm.runs[min(arm.runs)].cells.items() if cell.group == group}  # fmt: skip
    if len(several := sorted(set(found.values()))) > 1:
        raise EvidenceError(
            f"the {group} cells of the arm {arm.name!r} have several metrics: {listed(several)}"
        )
    return list(found)


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _need(rows: Sequence[object], study: Study) -> None:
    if not rows:
        missing = study.lacking(list(study.planned))
        raise EvidenceError(
            f"the study {study.name!r} has nothing for this table; it lacks {listed(missing, 5) if missing else 'such cells'}"
        )

"""A study's page: what its runs showed, in one HTML file (``flix report STUDY``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix._version import __version__
from flix.report import view
from flix.report.writing import Sentence, Written, check_out, marked, put, rendered, safe
from flix.study import pictures, tables
from flix.study.claims import DRAWS, Estimate, differences, findings
from flix.study.evidence import SCORES, EvidenceError, Study, read_scores
from flix.study.plots import Plots

PAGE = "report.html"
_CONFIG = "config.yaml"


class _Inline(Plots):
    """Draws pictures that stand in one page together, in its colours."""

    def _file(self, width: float, height: float, title: str, draw: Any) -> str:
        return self._drawn(width, height, draw)


@dataclass(frozen=True)
class Block:
    """A table, and the picture above it if there is one."""

    heading: str
    table: view.Table
    figure: view.Figure | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    heading: str
    blocks: list[Block]


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    return (folder / SCORES).is_file()


def write_study_report(folder: Path, out: Path | None = None, *, draws: int = DRAWS, force: bool = False) -> Written:  # fmt: skip
    """Write one page about a study. What is missing, and the methods without all their runs, are named on it.

    Args:
        folder: the folder that ``flix study`` writes.
        out: the page; default: ``report.html`` in the folder.
        draws: how many draws the bootstraps take.
        force: overwrite a file that is not a report.

    Raises:
        EvidenceError: there are no scores, or no method has all its runs.
        ReportError: the scores are damaged; an ``out`` that is a folder, or a file that is not a report.
        MissingFrameworkError: jinja2 or matplotlib is not installed.
        OSError: a file cannot be read or written.
    """
    study = read_scores(folder)
    out = out if out is not None else folder / PAGE
    check_out(out, force, [folder])
    if not study.whole():
        raise EvidenceError(f"no method of the study {study.name!r} has all its runs yet; {tables.unfinished(study)}")  # fmt: skip
    found, missing = sections(study, json.loads(study.file.read_bytes()), draws)
    if lacking := tables.unfinished(study):
        missing.insert(0, lacking)
    short = sentences(study, draws)
    config = folder / _CONFIG
    text = rendered(
        "study.html",
        title=f"flix study: {study.name}",
        subtitle=_subtitle(study),
        parts=[*((s.name, s.heading) for s in found), ("origin", "Command, versions, data")],
        short=[marked(sentence) for sentence in short],
        missing=missing,
        sections=found,
        commands=_commands(study),
        versions=_versions(study),
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        footer=f"Written by flix {__version__} from {folder}.",
    )
    told = ["".join(part for part, _ in sentence) for sentence in short]
    return Written(out, put(out, text), told, missing)


def sections(study: Study, raw: Mapping[str, Any], draws: int = DRAWS) -> tuple[list[Section], list[str]]:  # fmt: skip
    """The parts of the page, and what cannot be shown.

    Args:
        study: the scores.
        raw: the same as JSON.
        draws: how many draws the bootstraps take.

    Raises:
        MissingFrameworkError: matplotlib is not installed.
    """
    plots, missing = _Inline(), list[str]()
    weighed = any(
        run.get("weights") for arm in raw["arms"].values() for run in arm["seeds"].values()
    )

    def block(
        heading: str, make: Callable[[], tables.Table], draw: Callable[[Study, Plots], str] | None = None
    ) -> list[Block]:  # fmt: skip
        try:
            table = shown(make())
        except EvidenceError as error:
            missing.append(f"{heading}: {error}")
            return []
        label = f"{heading}: a picture of the table below"
        try:
            drawn = view.Figure(safe(draw(study, plots)), label, "") if draw is not None else None
        except EvidenceError as error:
            missing.append(f"the picture of {heading}: {error}")
            drawn = None
        return [Block(heading, table, drawn)]

    several = len(study.whole()) > len(tables.main_arms(study, untrained=True))
    groups = {cell.group for arm in study.whole() for run in arm.runs.values() for cell in run.cells.values()}  # fmt: skip
    parts = [
        ("methods", "Methods", block("Methods", lambda: tables.main_table(study), pictures.main)),
        ("claims", "Claims", block("Claims", lambda: tables.claims_table(study, draws)) if study.claims else []),
        ("tasks", "By task", block("By task", lambda: tables.by_task(study), pictures.tasks) if "seen" in groups else []),
        ("sizes", "By size", block("By size", lambda: tables.by_size(study), pictures.sizes) if "seen" in groups else []),
        (
            "zero-shot",
            "Zero-shot cells",
            [
                *block("By task", lambda: tables.by_task(study, "last_word")),
                *block("By cell", lambda: tables.by_cell(study), pictures.zero_shot),
            ]
            if "last_word" in groups
            else [],
        ),
        (
            "all",
            "Every method",
            [
                *block("Every method", lambda: tables.main_table(study, every=True)),
                *block("Against the first", lambda: tables.ablations(study), pictures.ablations),
            ]
            if several
            else [],
        ),
        ("cost", "Cost", block("Cost", lambda: tables.cost(study), pictures.cost)),
        (
            "choices",
            "Choices",
            [
                *block("Settings", lambda: choices(study)),
                *(block("Weights of unseen features", lambda: tables.weights(study, raw)) if weighed else []),
            ],
        ),
    ]  # fmt: skip
    return [Section(*part) for part in parts if part[2]], missing


def shown(table: tables.Table) -> view.Table:
    """A table as a page has it: without Markdown, and with texts to the left."""
    rows = [tuple(text.replace("**", "") for text in row) for row in table.rows]
    texts = [n for n in range(1, len(table.headings)) if any(row[n][:1].isalpha() for row in rows)]
    return view.Table(table.note, table.headings, rows, texts)


def choices(study: Study) -> tables.Table:
    """What was chosen for each method before its last runs.

    Raises:
        EvidenceError: nothing was.
    """
    rows: list[tuple[str, ...]] = [(arm.title, arm.choice) for arm in study.whole() if arm.choice]
    if not rows:
        raise EvidenceError("the study chose nothing; its settings are in the configuration below")
    return tables.Table(
        ("method", "chosen"), rows, "Chosen on cells that the last word does not use."
    )


def sentences(study: Study, draws: int = DRAWS) -> list[Sentence]:
    """The differences on top of the page: those that the study claims, or else the first method's from every other."""
    try:
        found = [(f.arm, f.against, f.group, f.difference, _verdict(f.at_least, f.holds)) for f in findings(study, draws=draws)]  # fmt: skip
    except EvidenceError:
        found = []
    if not study.claims:
        first, *others = (arm.name for arm in study.whole())
        for other in others:
            for group in ("seen", "last_word"):
                try:
                    some = differences(study, first, other, group, draws=draws)
                except EvidenceError:  # one of the methods has no such cell
                    continue
                found += [(first, other, group, one, "") for one in some]
    return [_sentence(study, *one, draws) for one in found]


def _sentence(
    study: Study, arm: str, other: str, group: str, found: Estimate, verdict: str, draws: int
) -> Sentence:
    points = f"{tables.signed(found.value)} points"
    p = tables.p_text(found.p, draws)
    where = f" on {tables.LABELS.get(group, group.replace('_', '-'))} cells, {tables.metric_text(found.metric)}"
    where += f" (95 %: {tables.signed(found.low)} to {tables.signed(found.high)}; p {p if p[0] == '<' else f'= {p}'}){verdict}."
    return [(f"{study.arms[arm].title} against {study.arms[other].title}: ", ""), (points, "b"), (where, "")]  # fmt: skip


def _verdict(at_least: float | None, holds: bool | None) -> str:
    if at_least is None:
        return ""
    return f"; the study claims {at_least:g} or more, which {'holds' if holds else 'does not hold'}"


def _subtitle(study: Study) -> str:
    arms, seeds = len(study.whole()), len(study.seeds)
    methods = f"{arms} method{'s' * (arms != 1)}"
    return f"{methods}, {seeds} seed{'s' * (seeds != 1)}{f', {steps:,} steps' if (steps := study.made.get('steps')) else ''}."  # fmt: skip


def _commands(study: Study) -> list[str]:
    made = study.made
    command = made.get("command")
    text = " ".join(command) if isinstance(command, list) else command
    told = {"Command": text, "Commit": made.get("commit"), "Date": made.get("date")}
    return [f"{what}: {said}" for what, said in told.items() if said]


def _versions(study: Study) -> view.Table | None:
    said = {**(study.made.get("versions") or {}), **(study.made.get("machine") or {})}
    rows = [(str(name), str(value)) for name, value in said.items()]
    return view.Table("As the study's scores say.", ("what", "which"), rows, [1]) if rows else None

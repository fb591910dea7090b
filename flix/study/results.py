"""``python -m flix.study.results STUDY ...`` makes the results page and its pictures from the scores of studies.

::

    python -m flix.study.results study-words study-african --docs docs/results.md

This keeps each study's scores as JSON in ``docs/results`` (answers as digits); with ``--add``, beside the other seeds
of the study that are kept already. From all scores there it draws the pictures, and it fills the page's blocks, from
``<!-- results: words main -->`` to ``<!-- end -->``. Without a study's folder, it makes page and pictures again from
the scores that are kept. A block whose runs are missing says so.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.errors import FlixError, listed
from flix.core.files import make_folder, write_file
from flix.study import pictures, published, tables
from flix.study.adding import added, parts_of, settings_of
from flix.study.base import base_table, with_base
from flix.study.claims import DRAWS
from flix.study.curves import curves_of, headings, rows_of, steps_of
from flix.study.evidence import SCORES, EvidenceError, Study, read_scores
from flix.study.plots import Plots

UNSEEN, OFFICIAL = "unseen.json", "official.json"
#: Studies that differ in their languages alone are kept as languages-02, languages-10 and so on; those that differ in
#: their steps alone as settle-03000, settle-12000.
MANY, LENGTHS = "languages", "settle"
_BLOCK = re.compile(r"(<!-- results: (?P<study>[\w.-]+) (?P<what>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """The scores that ``docs/results`` keeps.

    Attributes:
        folder: the folder.
        draws: how many draws the bootstraps take.
        plots: draws the pictures.
    """

    folder: Path
    draws: int
    plots: Plots

    def study(self, name: str) -> Study:
        """The scores of a study.

        Raises:
            EvidenceError: its scores are not kept.
        """
        file = self.folder / f"{name}.json"
        if not file.is_file():
            raise EvidenceError(f"no run yet: {command_of(name)}")
        return read_scores(file)

    def raw(self, name: str) -> dict[str, Any]:
        """The JSON of a file in the folder.

        Raises:
            EvidenceError: there is no such file.
        """
        file = self.folder / f"{name}.json"
        if not file.is_file():
            raise EvidenceError(f"no run yet: {command_of(name)}")
        said: dict[str, Any] = json.loads(file.read_bytes())
        return said

    def many(self, name: str) -> list[Study]:
        """The studies of a series, ``languages`` or ``settle``.

        Raises:
            EvidenceError: none is kept.
        """
        files = sorted(self.folder.glob(f"{name}-*.json"))
        if not files:
            raise EvidenceError(f"no run yet: {command_of(name)}")
        return [read_scores(file) for file in files]


def command_of(name: str) -> str:
    """The command that runs a study."""
    after = {"unseen": " and `python -m flix.study.unseen study-unseen`"}
    if name in (own := {"official": "python -m flix.study.official", "gpu": "make gpu-study"}):
        return f"`{own[name]}`"
    return f"`flix study {name}`{after.get(name, '')}"


def keep(folder: Path, out: Path, add: bool = False) -> list[str]:
    """Keep a study's scores; returns the names of what was kept.

    Args:
        folder: the study's folder.
        out: where the scores are kept.
        add: add the study's seeds to those of the same study that are kept already.

    Raises:
        EvidenceError: there are no scores, or the seeds cannot be added.
    """
    kept = []
    said = json.loads((folder / SCORES).read_bytes()) if (folder / SCORES).is_file() else None
    served = folder / UNSEEN
    if said is not None and not served.is_file():
        study = read_scores(folder)
        # A small form has figures of its own, which never stand in for the whole's.
        name = f"{study.name}-small" if folder.resolve().name.endswith("-small") else study.name
        if name == MANY:
            name = f"{MANY}-{tables.languages_of(study):02d}"
        if name == LENGTHS:
            name = f"{LENGTHS}-{steps_of(study):05d}"
        said = with_base(folder, {**completed(folder, said), "study": name})
        short, file = compact(said), out / f"{name}.json"
        if add and file.is_file():
            short = added(json.loads(file.read_bytes()), short)
        _put(file, short)
        kept.append(name)
    if served.is_file():
        _put(out / UNSEEN, compact(json.loads(served.read_bytes())))
        kept.append("unseen")
    if (folder / OFFICIAL).is_file():
        _put(out / OFFICIAL, json.loads((folder / OFFICIAL).read_bytes()))
        kept.append("official")
    if not kept:
        raise EvidenceError(
            f"{str(folder)!r} holds none of {SCORES}, {UNSEEN}, {OFFICIAL}; give the folder that flix study writes"
        )
    return kept


def completed(folder: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """A study's scores, completed from its folder: arms, settings, seeds, claims, date, and numbers of training rows.

    Args:
        folder: the study's folder.
        said: the content of ``scores.json``.
    """
    found, config = dict(said), _config(folder)
    seeds, arms = config.get("seeds"), config.get("arms") or {}
    if seeds is not None:
        found.setdefault("seeds", list(range(seeds)) if isinstance(seeds, int) else seeds)
    if arms:
        found.setdefault("planned", {name: (arm or {}).get("title") or name for name, arm in arms.items()})  # fmt: skip
    found.setdefault("claims", config.get("claims") or [])
    dates = []
    for name, arm in said["arms"].items():
        for seed, run in arm["seeds"].items():
            at = folder / "runs" / f"{name}-{seed}"
            if "settings" not in found["arms"][name] and (settings := settings_of(at)):
                found["arms"] = {
                    **found["arms"],
                    name: {**found["arms"][name], "settings": settings},
                }
            if (at / "run.json").is_file():
                dates.append(str(json.loads((at / "run.json").read_bytes()).get("started") or ""))
            if not (at / "mixture.json").is_file():
                continue
            for cell in json.loads((at / "mixture.json").read_bytes())["cells"]:
                if (entry := run["cells"].get(cell["cell"])) is not None:
                    entry.setdefault("train", 0 if cell["held_out"] else cell["rows"])
    found.setdefault("date", max(dates, default=""))
    return found


def _config(folder: Path) -> dict[str, Any]:
    """The study's resolved configuration; empty if there is none."""
    import yaml

    file = folder / "config.yaml"
    said = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return said if isinstance(said, dict) else {}


def _put(file: Path, said: Mapping[str, Any]) -> None:
    make_folder(file.parent)
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
    text = re.sub(
        r'(,?)("[^"\n]*":\{"(?:metric|score|rows|right))', r"\1\n\2", text
    )  # a line a cell: diffs are read
    write_file(file, (text + "\n").encode())


def compact(said: Mapping[str, Any]) -> dict[str, Any]:
    """The same scores in a shorter form: answers as digits, and what all runs say about a cell written once."""
    shared: dict[str, dict[str, Any]] = {}

    def short(cells: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for cell, given in cells.items():
            entry = {key: value for key, value in given.items() if key != "scores"}
            right = entry.get("right")
            if isinstance(right, list):
                entry["right"] = None if not right or None in right else "".join(str(int(r)) for r in right)  # fmt: skip
            once = {key: entry[key] for key in ("features", "group", "train", "rows") if key in entry}  # fmt: skip
            first = shared.setdefault(cell, once)
            found[cell] = {k: v for k, v in entry.items() if k not in first or first[k] != v}
        return found

    arms: dict[str, Any] = {}
    for name, arm in said["arms"].items():
        runs: dict[str, Any] = {}
        for seed, run in arm["seeds"].items():
            runs[seed] = {**run, "cells": short(run["cells"])}
            if "weights" in run:
                runs[seed]["weights"] = [{**one, "cells": short(one["cells"])} for one in run["weights"]]  # fmt: skip
        arms[name] = {**arm, "seeds": runs}
    return {**said, "arms": arms, "cells": shared}


def source_line(made: Mapping[str, Any], name: str) -> str:
    """The commit, machine, command and date of the scores behind a table; of each part, if there are several."""
    parts = parts_of(made)
    told = [_part(part, numbers(part["seeds"]) if len(parts) > 1 else "") for part in parts]
    return f"<sub>{'; '.join(told)} · [raw scores](results/{name}.json)</sub>"


def _part(made: Mapping[str, Any], seeds: str) -> str:
    machine, given = made.get("machine") or {}, made.get("command")
    told = [
        seeds,
        f"`{' '.join(given) if isinstance(given, list) else given}`" if given else "",
        f"commit {str(made['commit'])[:10]}" if made.get("commit") else "",
        f"{machine.get('system', '')}, {machine.get('processors')} processors, {machine.get('device', '')}" if machine else "",
        str(made.get("date") or "")[:10],
    ]  # fmt: skip
    return " · ".join(filter(None, told))


def numbers(seeds: Sequence[int]) -> str:
    """Seeds as people read them: seed 0, seeds 1 to 4, seeds 0, 2."""
    run = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    told = f"{seeds[0]} to {seeds[-1]}" if run else ", ".join(map(str, seeds))
    return f"seed{'s' * (len(seeds) != 1)} {told}"


Block = Callable[[Kept, str], list[str]]


def _table(make: Callable[[Study, Kept], tables.Table], draw: Callable[[Study, Plots], str] | None = None) -> Block:  # fmt: skip
    def block(kept: Kept, where: str) -> list[str]:
        name, _, what = where.partition(" ")
        study = kept.study(name)
        parts = [make(study, kept).markdown()]
        if draw is not None:
            parts.insert(0, _picture(kept, f"{name}-{what}", draw(study, kept.plots)))
        return [*parts, source_line(study.made, name)]

    return block


def _picture(kept: Kept, name: str, svg: str) -> str:
    write_file(kept.folder / f"{name}.svg", svg.encode())
    label = re.search(r"<title>(.*?)</title>", svg)
    return f"![{html.unescape(label[1]) if label else name}](results/{name}.svg)"


def _languages(kept: Kept, _: str) -> list[str]:
    studies = kept.many(MANY)
    table = tables.by_languages(studies)
    parts = [_picture(kept, MANY, pictures.languages(studies, kept.plots)), table.markdown()]
    return [*parts, *(source_line(study.made, study.name) for study in studies)]


def _speed(kept: Kept, _: str) -> list[str]:
    studies = kept.many(LENGTHS)
    curves = curves_of(studies)
    if not curves:
        raise EvidenceError(f"no arm is finished: {command_of(LENGTHS)}")
    note = " ".join(filter(None, map(tables.unfinished, studies)))
    table = tables.Table(headings(), rows_of(curves), note)
    parts = [
        _picture(kept, f"{LENGTHS}-speed", pictures.speed(curves, kept.plots)),
        table.markdown(),
    ]
    return [*parts, *(source_line(study.made, study.name) for study in studies)]


def _published(kept: Kept, where: str) -> list[str]:
    said = kept.raw("official")
    make = {
        "segmentation": published.segmentation,
        "inflection": published.inflection,
        "pronunciation": published.pronunciation,
    }[where.rpartition(" ")[2]]
    return [make(said).markdown(), source_line(said, "official")]


def _weights(kept: Kept, where: str) -> list[str]:
    name = where.partition(" ")[0]
    study = kept.study(name)
    return [tables.weights(study, kept.raw(name)).markdown(), source_line(study.made, name)]


BLOCKS: dict[str, Block] = {
    "base": _table(lambda study, _: base_table(study)),
    "main": _table(lambda study, _: tables.main_table(study), pictures.main),
    "all": _table(lambda study, _: tables.main_table(study, every=True)),
    "claims": _table(lambda study, kept: tables.claims_table(study, kept.draws)),
    "tasks": _table(lambda study, _: tables.by_task(study), pictures.tasks),
    "zero-shot-tasks": _table(lambda study, _: tables.by_task(study, "last_word")),
    "sizes": _table(lambda study, _: tables.by_size(study), pictures.sizes),
    "zero-shot": _table(lambda study, _: tables.by_cell(study), pictures.zero_shot),
    "ablations": _table(lambda study, _: tables.ablations(study), pictures.ablations),
    "cost": _table(lambda study, _: tables.cost(study), pictures.cost),
    "served": _table(lambda study, _: tables.unseen(study), pictures.unseen),
    "weights": _weights,
    "many": _languages,
    "speed": _speed,
    "segmentation": _published,
    "inflection": _published,
    "pronunciation": _published,
}


def write_results(
    folders: Sequence[Path],
    *,
    docs: Path,
    out: Path | None = None,
    draws: int = DRAWS,
    add: bool = False,
) -> dict[str, str]:
    """Keep the scores of some studies, draw all pictures again and fill the page.

    Args:
        folders: the folders of studies; scores that are kept already are used, too.
        docs: the page; its blocks say what belongs where.
        out: the folder for JSON and pictures; default: ``results`` beside the page.
        draws: how many draws the bootstraps take.
        add: add the studies' seeds to those that are kept, instead of replacing them.

    Returns:
        For each block that is left out, the reason.

    Raises:
        EvidenceError: a folder has no scores, or nothing fills a block; or seeds cannot be added.
        ReportError: scores are damaged.
        MissingFrameworkError: matplotlib is not installed.
        OSError: the page cannot be read or written.
    """
    folder = out or docs.parent / "results"
    for given in folders:
        keep(given, folder, add)
    kept, missing = Kept(folder, draws, Plots()), dict[str, str]()
    make_folder(folder)

    def filled(block: re.Match[str]) -> str:
        where = f"{block['study']} {block['what']}"
        if block["what"] not in BLOCKS:
            raise EvidenceError(f"{docs}: nothing fills the block {where!r}; there are: {listed(BLOCKS, 30)}")  # fmt: skip
        try:
            parts = BLOCKS[block["what"]](kept, where)
        except EvidenceError as error:
            missing[where] = str(error)
            parts = [f"*Left out: {error}.*"]
        return block[1] + "\n\n".join(parts) + "\n" + block[4]

    text = docs.read_text(encoding="utf-8")
    write_file(docs, _BLOCK.sub(filled, text).encode())
    return missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 2 with one line on standard error after a mistake that the user can correct."""
    parser = argparse.ArgumentParser("python -m flix.study.results", description=(__doc__ or "").partition("::")[0])  # fmt: skip
    add = parser.add_argument
    add("studies", nargs="*", type=Path, help="folders that flix study wrote")
    add("--docs", type=Path, default=Path("docs/results.md"), help="the page (%(default)s)")
    add("--out", type=Path, help="where JSON and pictures are kept (results, beside the page)")
    add("--draws", type=int, default=DRAWS, help="of the bootstraps (%(default)s)")
    add("--add", action="store_true", help="add the seeds of these studies to those that are kept")
    given = parser.parse_args(arguments)
    try:
        missing = write_results(given.studies, docs=given.docs, out=given.out, draws=given.draws, add=given.add)  # fmt: skip
    except (FlixError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for where, why in missing.items():
        print(f"left out: {where}: {why}")
    print(f"results: {given.docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

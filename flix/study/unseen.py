"""``python -m flix.study.unseen STUDY``: languages that a study never trained on, served in several ways.

The study's runs are not trained further. A language without a feature of its own is served in these ways:

* ``skip``: without any language's feature,
* ``mean``: with all trained languages, each with the weight 1/n,
* ``parent``: with its relatives, the trained languages that are nearest in the family tree, each with the weight 1/n;
  a language without relatives is served as with ``skip``,
* ``searched``: with weights of all trained languages, searched on the first rows of each cell
  (:func:`flix.search_weights`).

An arm whose languages have no features is served ``as it is``. No way is scored on the rows of the search, so all ways
answer the same rows. The result is ``unseen.json`` beside ``scores.json``, in the same form, with an arm for each way.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flix.core.errors import FlixError
from flix.core.features.registry import FeatureRegistry
from flix.core.features.relatives import by_parents
from flix.core.files import write_file
from flix.core.machine import command, versions
from flix.study.evidence import SCORES, EvidenceError, read_scores
from flix.study.scores import machine_of
from flix.study.words.design import LANGUAGES
from flix.transformers.folders import METRICS

if TYPE_CHECKING:
    from flix.tasks.evaluation import Evaluator

UNSEEN = "unseen.json"
WAYS = {
    "skip": "no language's feature",
    "mean": "mean of all languages",
    "parent": "its relatives",
    "searched": "searched weights",
}
AS_IT_IS = "as it is"
ROWS = 16
Progress = Callable[[str], None]


class Served:
    """A finished run, and the rows of the languages that it never trained on.

    Args:
        run: the run's folder.
        rows: how many rows of each cell the search uses, at most half of the cell; they are not scored.
        limit: at most so many rows of each cell are scored.
        group: the group whose features are unseen.
    """

    def __init__(self, run: Path, *, rows: int = ROWS, limit: int | None = None, group: str = "language") -> None:  # fmt: skip
        from flix.core.adapter.files import load_adapter
        from flix.training.data import read_data
        from flix.training.evaluation import evaluator_of
        from flix.training.models import build
        from flix.training.reading import read_settings

        self.group = group
        settings = read_settings(run / "config.yaml")
        loaded = load_adapter(run / "adapter")
        data = read_data(settings, loaded.config.registry)
        built = build(settings, data, loaded.config, adapter=loaded, folder=run / "adapter")
        self.model, self.evaluator = built.model, evaluator_of(settings, data, built)
        trained = {
            name for cell in data.mixture.trained_cells() for name in dict(cell).get(group, ())
        }
        names = loaded.config.registry.names(group)
        self.trained = [name for name in names if name in trained]
        self.has_features = any(loaded.config.ranks[group, name] for name in self.trained)  # type: ignore[index]
        self.searching = self._choose(rows, limit)

    def _choose(self, rows: int, limit: int | None) -> dict[int, list[dict[str, Any]]]:
        """Go on with rows of languages never trained on; returns of each cell those that are searched on."""
        evaluator = self.evaluator
        evaluator.elsewhere = evaluator.collator  # what the rows activate is said by the rows alone
        named = np.array([self._name(row) not in self.trained for row in evaluator.rows])
        keep = named & ~evaluator.of_seen
        found: dict[int, list[dict[str, Any]]] = {}
        for cell in np.unique(evaluator.cells[keep]).tolist():
            places = np.flatnonzero((evaluator.cells == cell) & keep)
            first = places[: min(rows, len(places) // 2)]
            found[cell] = [evaluator.rows[i] for i in first.tolist()]
            keep[first] = False
            if limit is not None:
                keep[places[len(first) + limit :]] = False
        if not found:
            raise EvidenceError(
                f"the run evaluates no row of a {self.group} that it was never trained on; hold some out: "
                f"held_out: [{{{self.group}: NAME}}, ...]"
            )
        evaluator.keep(keep)
        self.rows = list(evaluator.rows)
        return found

    def _name(self, row: Mapping[str, Any]) -> str:
        return str(row[self.group])

    @property
    def unseen(self) -> list[str]:
        """The languages that are served."""
        return list(dict.fromkeys(map(self._name, self.rows)))

    def relatives(self, parents: Mapping[str, str]) -> dict[str, list[str]]:
        """For each language that is served, its relatives among the trained ones; an empty list if it has none."""
        registry = FeatureRegistry({self.group: self.trained})
        found = by_parents(registry, self.group, parents)
        return {name: found.get(name, []) for name in self.unseen}

    def answered(self, of: Callable[[dict[str, Any], int], Mapping[str, Any]]) -> dict[str, Any]:
        """The scores by cell when each row activates what ``of`` returns for it and its cell."""
        from flix.core.progress import Silent

        evaluator: Evaluator = self.evaluator
        cells = evaluator.cells.tolist()
        evaluator.rows = [
            {**row, **of(row, cell)} for row, cell in zip(self.rows, cells, strict=True)
        ]
        answers = evaluator.answers(self.model, Silent())
        scored = evaluator.scored(answers)["cells"]
        found = {}
        for entry, cell in zip(scored, np.unique(evaluator.cells).tolist(), strict=True):
            places = np.flatnonzero(evaluator.cells == cell).tolist()
            right = [answers[i].right for i in places]
            said = self.rows[places[0]]
            found[entry["cell"]] = {
                "features": {g: said[g] for g in evaluator.collator.columns if said.get(g) is not None},
                "group": "last_word",
                "train": 0,
                "rows": len(places),
                "metric": entry["metric"],
                "score": entry["score"],
                "right": None if None in right else [int(bool(r)) for r in right],
            }  # fmt: skip
        return found

    def ways(self, parents: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each way with its scores by cell."""
        group = self.group
        if not self.has_features:
            yield AS_IT_IS, self.answered(lambda row, cell: {group: None})
            return
        share = dict.fromkeys(self.trained, 1 / len(self.trained))
        near = {name: {one: 1 / len(of) for one in of} or None for name, of in self.relatives(parents).items()}  # fmt: skip
        found = {cell: self.searched(rows) for cell, rows in self.searching.items() if rows}
        yield "skip", self.answered(lambda row, cell: {group: None})
        yield "mean", self.answered(lambda row, cell: {group: share})
        yield "parent", self.answered(lambda row, cell: {group: near[self._name(row)]})
        yield "searched", self.answered(lambda row, cell: {group: found.get(cell)})

    def searched(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The weights of the trained languages with the lowest loss on a cell's rows."""
        from flix.backends.torch import search_weights
        from flix.tasks.collating import on_device

        collator = self.evaluator.collator
        row = {g: rows[0].get(g) for g in collator.columns if g != self.group}
        batch = on_device(collator.collator(list(rows)), next(self.model.parameters()).device)
        found = search_weights(self.model, batch, row, groups=[self.group], unknown="skip").row
        weights = found.get(self.group)
        if isinstance(weights, Mapping):  # a feature that nobody trained changes nothing
            weights = {name: weight for name, weight in weights.items() if name in self.trained}
        return weights or None


def serve(
    study: Path,
    *,
    arms: Sequence[str] = (),
    rows: int = ROWS,
    limit: int | None = None,
    parents: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
) -> Path:
    """Serve the unseen languages of a study's finished runs in all ways.

    Runs that were served already are kept, unless they were repeated since.

    Args:
        study: the folder that ``flix study`` wrote.
        arms: the arms to serve; default: all.
        rows: how many rows of each cell the search uses.
        limit: at most so many rows of each cell are scored.
        parents: the family of each language; default: that of the study's data.
        progress: called with a line for each run and way.

    Returns:
        The file, ``unseen.json``.

    Raises:
        EvidenceError: there are no scores, or a run evaluates no unseen language.
        FlixError: a run cannot be loaded.
    """
    parents = parents or {code: language.branch for code, language in LANGUAGES.items()}
    scores, file = read_scores(study), study / UNSEEN
    asked = {"rows_searched": rows, "limit": limit}
    before = json.loads(file.read_bytes()) if file.is_file() else {}
    if {key: before.get(key) for key in asked} != asked:
        before = {}
    found: dict[str, Any] = before.get("arms", {})
    relatives: dict[str, list[str]] = before.get("relatives", {})
    runs: dict[str, str] = before.get("runs", {})
    for name in arms or list(scores.planned):
        arm = scores.arm(name)
        for seed in sorted(arm.runs):
            run = study / "runs" / f"{name}-{seed}"
            now = runs.get(run.name, "")
            if (run / METRICS).is_file():  # what was served is kept even if the run is gone
                now = hashlib.sha256((run / METRICS).read_bytes()).hexdigest()
            if runs.setdefault(run.name, now) != now:  # it was repeated since
                for key in [key for key in found if key.partition(", ")[0] == name]:
                    found[key]["seeds"].pop(str(seed), None)
                runs[run.name] = now
            if any(key.partition(", ")[0] == name and str(seed) in of["seeds"] for key, of in found.items()):  # fmt: skip
                continue
            progress(f"{name}, seed {seed}")
            served = Served(run, rows=rows, limit=limit)
            if served.has_features:
                relatives = served.relatives(parents)
            for way, cells in list(served.ways(parents)):
                title = f"{arm.title}: {WAYS.get(way, way)}"
                entry = found.setdefault(f"{name}, {way}", {"title": title, "active_rank": arm.active_rank,
                    "total_rank": arm.total_rank, "trainable": arm.trainable, "choice": arm.choice, "seeds": {}})  # fmt: skip
                entry["seeds"][str(seed)] = {"cells": cells}
            said = {
                "study": "unseen",
                "command": command(),
                "commit": scores.made.get("commit"),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "machine": machine_of([str(next(served.model.parameters()).device)]),
                "versions": versions("torch", "transformers", "numpy"),
                **asked,
                "seeds": list(scores.seeds or arm.runs),
                "planned": {key: of["title"] for key, of in found.items()},
                "relatives": relatives,
                "runs": runs,
                "arms": found,
            }
            write_file(file, (json.dumps(said, ensure_ascii=False) + "\n").encode())
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 2 with one line on standard error after a mistake that the user can correct."""
    parser = argparse.ArgumentParser("python -m flix.study.unseen", description=(__doc__ or "").partition("\n")[0])  # fmt: skip
    add = parser.add_argument
    add("study", type=Path, help="the folder that flix study wrote")
    add("--arm", action="append", default=[], help="again for more (all)")
    add("--rows", type=int, default=ROWS, help="of a cell that weights are searched on (%(default)s)")  # fmt: skip
    add("--limit", type=int, help="rows of a cell that are scored, at most")
    given = parser.parse_args(arguments)
    try:
        if not (given.study / SCORES).is_file():
            raise EvidenceError(f"{str(given.study)!r} holds no {SCORES}; run flix study first")
        file = serve(
            given.study, arms=given.arm, rows=given.rows, limit=given.limit,
            progress=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
    except (FlixError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Evaluation: losses and scores by cell, averages over seen and held-out ones, and what leaving features out costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flix.core.features.names import written
from flix.core.progress import Reporter
from flix.data.chosen import ChosenRows
from flix.tasks import Answer, Task, interval, scores
from flix.tasks.columns import TASK, states_weights
from flix.tasks.making import task_of
from flix.tasks.scoring import need_for

if TYPE_CHECKING:
    from flix.transformers import FlixCollator

Sums = NDArray[np.float64]
"""Of each row the sum of its losses, and what they count: float64 ``[rows, 2]``."""


class Evaluator:
    """The rows that a run is evaluated on, and how.

    Args:
        chosen: the rows; the first ``limit`` of each cell are used.
        tasks: what the rows are examples of.
        collator: makes batches and routing.
        limit: rows of a cell; None for all.
        batch_size: rows at a time.
        max_new_tokens, num_beams: of written answers.
        unseen_group_weights: factors for groups in cells that are not trained on. They do not change rows that state
            weights of such a group themselves.
        samples: answers of a cell that :meth:`samples` keeps.
        seed: of the intervals' draws.

    Raises:
        MissingFrameworkError: a package is not installed that scores of these rows need.
    """

    def __init__(
        self,
        chosen: ChosenRows,
        tasks: Sequence[Task],
        collator: FlixCollator,
        *,
        limit: int | None = None,
        batch_size: int = 32,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        unseen_group_weights: Mapping[str, float] | None = None,
        samples: int = 20,
        seed: int = 0,
    ) -> None:
        self.batch_size, self.max_new_tokens, self.num_beams = batch_size, max_new_tokens, num_beams
        self.kept, self.seed = samples, seed
        chosen = chosen.limited(limit)
        self.cells, self.names, self.seen = chosen.cells, chosen.names, chosen.seen
        self.rows: list[dict[str, Any]] = chosen.__getitems__(range(len(chosen)))
        self.tasks = tuple(tasks)
        self.lengths = np.array([length_of(tasks, row) for row in self.rows], np.float64)
        need_for(tasks[at].metric for at in sorted({int(row.get(TASK, 0)) for row in self.rows}))
        self.collator = collator.evaluation()
        factors = unseen_group_weights or {}
        self.elsewhere = collator.evaluation(factors)
        self.stated = np.array([states_weights(row, factors) for row in self.rows], bool)
        self.ids = self.collator.routing_of(self.rows).ids
        first = np.unique(self.cells, return_index=True)
        # Told now: what rows activate may be changed, and a cell is called as its data is.
        self.named = {cell: self._features(at) for cell, at in zip(*(a.tolist() for a in first), strict=True)}  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Go on with some of the rows."""
        self.rows = [row for row, mine in zip(self.rows, chosen.tolist(), strict=True) if mine]
        self.cells, self.ids, self.stated = (
            self.cells[chosen],
            self.ids[chosen],
            self.stated[chosen],
        )

    @property
    def of_seen(self) -> NDArray[np.bool_]:
        """Whether each row is of a cell that is trained on."""
        return self.seen[self.cells]

    @property
    def _as_named(self) -> NDArray[np.bool_]:
        """Whether each row activates what it names, with no factor of a group."""
        named: NDArray[np.bool_] = self.of_seen | self.stated
        return named

    def losses(self, trainer: Any, without: str | None = None) -> Sums:
        """The loss of every row, computed by all processes together.

        Args:
            trainer: its model, device and processes.
            without: a group whose features are left out; then of seen cells alone.
        """
        import torch

        found = torch.zeros(len(self), 2, dtype=torch.float64)
        trainer.model.eval()
        off = None if without is None else self.collator.evaluation({without: 0.0})
        for mine, collator in (
            (self._as_named if off is None else self.of_seen, off or self.collator),
            (~self._as_named if off is None else np.zeros(len(self), bool), self.elsewhere),
        ):
            places = np.flatnonzero(mine)[trainer.args.process_index :: trainer.args.world_size]
            for part in self._batches(places):
                found[torch.from_numpy(part)] = trainer.losses_of(
                    collator([self.rows[i] for i in part])
                )
        return np.asarray(trainer.summed(found))

    def _batches(self, places: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Batches of rows of similar length."""
        places = places[np.argsort(self.lengths[places], kind="stable")]
        size = self.batch_size
        return [places[i : i + size] for i in range(0, len(places), size)]

    def summary(self, sums: Sums) -> dict[str, Any]:
        """Losses by cell, by feature, and over halves; ``loss`` is that of the seen cells, if there are any."""
        halves = {"seen": _mean(sums[self.of_seen]), "held_out": _mean(sums[~self.of_seen])}
        cells = {
            self.names[cell]: {"loss": _mean(sums[self.cells == cell])}
            for cell in np.unique(self.cells).tolist()
        }
        loss = halves["seen"] if halves["seen"] is not None else halves["held_out"]
        return {"loss": loss, **halves, "by_feature": self._by_feature(sums), "cells": cells}

    def _by_feature(self, sums: Sums) -> dict[str, float]:
        features = self.collator.registry.features
        acting = np.unique(self.ids[self.ids >= 0]).tolist()
        found = {written(features[i]): _mean(sums[(self.ids == i).any(1)]) for i in acting}
        return {name: loss for name, loss in found.items() if loss is not None}

    def left_out(self, trainer: Any) -> dict[str, dict[str, Any]]:
        """What leaving each feature out costs: the loss of its rows in seen cells, with it and without."""
        whole, registry = self.losses(trainer), self.collator.registry
        found: dict[str, dict[str, Any]] = {}
        for group in registry.groups:
            without = self.losses(trainer, without=group)
            for name in registry.names(group):
                mine = (self.ids == registry.id(group, name)).any(1) & self.of_seen
                if mine.any():
                    found[written((group, name))] = {
                        "loss": _mean(whole[mine]), "without": _mean(without[mine]), "rows": int(mine.sum()),
                    }  # fmt: skip
        return found

    def answers(self, model: Any, reporter: Reporter) -> list[Answer]:
        """The model's answers, in the order of the rows."""
        from flix.tasks.answering import answers

        found: dict[int, Answer] = {}
        reporter.start("evaluating", len(self))
        try:
            for mine, collator in (
                (self._as_named, self.collator),
                (~self._as_named, self.elsewhere),
            ):
                places, done = np.flatnonzero(mine).tolist(), len(found)
                told: Callable[[int], None] = lambda n, done=done: reporter.advance(done + n)  # type: ignore[misc]  # noqa: E731
                given = answers(
                    model, self.tasks, [self.rows[i] for i in places], collator, batch_size=self.batch_size,
                    max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, on_progress=told,
                )  # fmt: skip
                found.update(zip(places, given, strict=True))
        finally:
            reporter.stop()
        return [found[i] for i in range(len(self))]

    def scored(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """``cells``, and the averages over seen and held-out ones."""
        cells = [self._cell(cell, answers) for cell in np.unique(self.cells).tolist()]
        return {
            "cells": cells,
            "seen": average([cell for cell in cells if cell["seen"]]),
            "held_out": average([cell for cell in cells if not cell["seen"]]),
        }

    def _cell(self, cell: int, answers: Sequence[Answer]) -> dict[str, Any]:
        places = np.flatnonzero(self.cells == cell).tolist()
        task, mine = self.tasks[self.rows[places[0]][TASK]], [answers[i] for i in places]
        found = scores(task.kind, mine)
        return {
            "cell": self.names[cell],
            "features": self.named[cell],
            "kind": task.kind,
            "task": task.name,
            "seen": bool(self.seen[cell]),
            "rows": len(places),
            "metric": next(iter(found)),
            "score": next(iter(found.values())),
            "interval": list(interval(task.kind, mine, self.seed)),
            "scores": found,
        }

    def _features(self, place: int) -> dict[str, list[str]]:
        groups = [g for g in self.collator.columns if self.rows[place].get(g) is not None]
        return {group: names_of(self.rows[place][group]) for group in groups}

    def samples(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The first answers of every cell, as they are kept."""
        found = []
        for cell in np.unique(self.cells).tolist():
            for place in np.flatnonzero(self.cells == cell)[: self.kept].tolist():
                answer, task = answers[place], self.tasks[self.rows[place][TASK]]
                found.append(
                    {
                        "cell": self.names[cell], "kind": task.kind, "source": answer.source,
                        "target": answer.target, "output": answer.output, "right": answer.right,
                    }
                )  # fmt: skip
        return found


def length_of(tasks: Sequence[Task], row: Mapping[str, Any]) -> float:
    """What a row costs, roughly: the bytes of its source, or those of its target one and a half times, if that is more.

    A decoder's layer costs more than an encoder's, since it reads the encoder's output too.
    """
    source, target = task_of(tasks, row.get(TASK, 0)).example(row)
    lengths = (len((text or "").encode("utf-8", "replace")) for text in (source, target))
    return max(next(lengths), 1.5 * next(lengths))


def names_of(value: Any) -> list[str]:
    """The names in what a row says of one group."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [name for name, weight in value.items() if weight is not None]
    return list(value)


def _mean(sums: Sums) -> float | None:
    total, count = sums.sum(0).tolist() if len(sums) else (0.0, 0.0)
    return total / count if count else None


def average(cells: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean over cells, each counting once, in all and by kind of task; None where there are none.

    Tasks of one kind that have other main scores (tags of entities, and tags that are none) are apart: ``"tagging,
    entity_f1"``.
    """
    if not cells:
        return None
    metrics: dict[str, set[str]] = {}
    for cell in cells:
        metrics.setdefault(cell["kind"], set()).add(cell["metric"])
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        kind = cell["kind"]
        name = kind if len(metrics[kind]) == 1 else f"{kind}, {cell['metric']}"
        by_kind.setdefault(name, []).append(cell)
    return {
        "cells": len(cells),
        "rows": sum(cell["rows"] for cell in cells),
        "score": _rounded([cell["score"] for cell in cells]),
        "by_kind": {
            kind: {
                "cells": len(mine),
                "metric": mine[0]["metric"],
                "score": _rounded([cell["score"] for cell in mine]),
                "scores": {
                    name: _rounded(
                        [cell["scores"][name] for cell in mine if name in cell["scores"]]
                    )
                    for name in mine[0]["scores"]
                },
            }
            for kind, mine in by_kind.items()
        },
    }


def _rounded(values: Sequence[float]) -> float:
    """The mean of the values that are there: a cell without any entity has no F1."""
    there = [value for value in values if not np.isnan(value)]
    return round(float(np.mean(there)), 2) if there else float("nan")

"""Tasks as far as data tells of them: their columns and labels, and the task of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import listed, near
from flix.data.errors import DataError
from flix.tasks.columns import TASK

FORMS: dict[str, dict[str, str]] = {
    "seq2seq": {"source": "text", "target": "text"},
    "causal": {"source": "text", "target": "text"},
    "classification": {"source": "text", "target": "text"},
    "regression": {"source": "text", "target": "number"},
    "tagging": {"tokens": "texts", "tags": "texts"},
    "masked": {"source": "text"},
}
"""The columns that each kind reads, and their forms; ``causal`` with ``messages:`` reads those alone."""

LABELS = {"classification": "target", "tagging": "tags"}


@dataclass(frozen=True)
class Spec:
    """A task, as far as it is known without a tokenizer.

    Attributes:
        name: the feature of the group ``task``, or else the data set's name.
        kind: see :data:`FORMS`.
        columns: the rows' columns by what they hold.
        prompt: template of the prompt.
        labels: of classification and tagging, ascending or as given.
        features: what all of its rows activate, in every data set.
        feature_columns: groups whose feature stands in a column; in one of several, if data sets differ in it.
        occurring: the labels of the training rows, and those of the evaluation rows.
    """

    name: str
    kind: str
    columns: Mapping[str, str]
    prompt: str | None
    labels: tuple[str, ...] | None
    features: Mapping[str, Any]
    feature_columns: Mapping[str, Any]
    occurring: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())


@dataclass
class Gathered:
    """The tasks and labels of data sets that are read one after the other."""

    found: list[dict[str, Any]] = field(default_factory=list)
    given: dict[str, set[str]] = field(default_factory=dict)
    occurring: dict[tuple[str, bool], set[str]] = field(default_factory=dict)

    def with_tasks(self, rows: Any, name: str, evaluation: bool, **said: Any) -> Any:
        """The rows of a data set with the number of their task each, in the column ``flix_task``.

        Args:
            rows: a ``datasets.Dataset`` with the columns of features.
            name: the data set's; its task's, too, if rows have no feature of the group ``task``.
            evaluation: whether the rows are for evaluation.
            said: what else a :class:`Spec` holds; labels may be None.

        Raises:
            DataError: a label that those given do not name.
        """
        tasks = [name] * len(rows)
        if "task" in rows.column_names:
            # As a whole: datasets would read it row by row.
            tasks = [v if isinstance(v, str) else "+".join(v) for v in rows["task"][:]]
        names, codes = np.unique(np.array(tasks), return_inverse=True)
        numbers = np.empty(len(names), np.int64)
        for place, task in enumerate(names.tolist()):
            numbers[place] = self._number({"name": task, **said})
            if said["kind"] in LABELS:
                self._gather(rows, codes == place, {"name": task, **said}, name, evaluation)
        return rows.add_column(TASK, numbers[codes])

    def declared(self, spec: dict[str, Any]) -> int:
        """The number of a task whose rows are streamed; its labels, if it has any, are given."""
        if spec["labels"] is not None:
            self.given.setdefault(spec["name"], set()).update(spec["labels"])
            self.occurring.setdefault((spec["name"], False), set()).update(spec["labels"])
        return self._number(spec)

    def _number(self, spec: dict[str, Any]) -> int:
        told = ("name", "kind", "columns", "prompt", "labels")
        known = [[held[key] for key in told] for held in self.found]
        mine = [spec[key] for key in told]
        if mine not in known:
            self.found.append(spec)
            return len(known)
        number = known.index(mine)
        self.found[number] = {**self.found[number], **merged(self.found[number], spec)}
        return number

    def _gather(
        self, rows: Any, mine: NDArray[np.bool_], spec: dict[str, Any], name: str, evaluation: bool
    ) -> None:
        import pyarrow.compute as compute  # type: ignore[import-untyped]

        column, given = spec["columns"][LABELS[spec["kind"]]], spec["labels"]
        values = rows.data.column(column).filter(mine)
        if spec["kind"] == "tagging":
            values = compute.list_flatten(values)
        occurring = compute.unique(values).to_pylist()
        if given is not None and (other := sorted({*occurring} - {*given})):
            raise DataError(
                f"dataset {name!r}: {column!r} holds {other[0]!r}{near(other[0], given)}, which labels: does not name; it "
                f"names: {listed(given)}"
            )
        self.given.setdefault(spec["name"], set()).update(given or occurring)
        self.occurring.setdefault((spec["name"], evaluation), set()).update(occurring)

    def specs(self) -> tuple[Spec, ...]:
        """The tasks, each with the labels that all data sets of its name have together."""
        specs = []
        for spec in self.found:
            labels: Sequence[str] | None = spec["labels"]
            if labels is None and spec["kind"] in LABELS:
                labels = sorted(self.given[spec["name"]])
            halves = [
                frozenset(self.occurring.get((spec["name"], half), ())) for half in (False, True)
            ]
            kept = None if labels is None else tuple(labels)
            specs.append(Spec(**{**spec, "labels": kept, "occurring": (halves[0], halves[1])}))
        return tuple(specs)


def columns_of(said: Mapping[str, Any], group: str) -> list[str]:
    """The columns in which the data of a task names its features of a group."""
    found = said.get("feature_columns", {}).get(group, [])
    return [found] if isinstance(found, str) else list(found)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """``features`` and ``feature_columns`` of a task that stands in two data sets: the features that all rows have."""
    mine, others = first.get("features", {}), second.get("features", {})
    columns: dict[str, Any] = {}
    for group in (*first.get("feature_columns", {}), *second.get("feature_columns", {})):
        found = list(dict.fromkeys([*columns_of(first, group), *columns_of(second, group)]))
        columns[group] = found[0] if len(found) == 1 else found
    shared = {group: value for group, value in mine.items() if group in others and others[group] == value}  # fmt: skip
    return {"features": shared, "feature_columns": columns}

"""Tasks as far as data tells of them: their columns and labels, and the task of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import listed, near
from flix.core.features.cells import names_of
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
        names: the features that its rows name, by group; of streams, none are known.
    """

    name: str
    kind: str
    columns: Mapping[str, str]
    prompt: str | None
    labels: tuple[str, ...] | None
    features: Mapping[str, Any]
    feature_columns: Mapping[str, Any]
    occurring: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class Gathered:
    """The tasks and labels of data sets that are read one after the other."""

    found: list[dict[str, Any]] = field(default_factory=list)
    given: dict[str, set[str]] = field(default_factory=dict)
    occurring: dict[tuple[str, bool], set[str]] = field(default_factory=dict)
    names: dict[tuple[int, str], set[str]] = field(default_factory=dict)

    def with_tasks(
        self, rows: Any, name: str, evaluation: bool, groups: Sequence[str], **said: Any
    ) -> Any:
        """The rows of a data set with the number of their task each, in the column ``flix_task``.

        Args:
            rows: a ``datasets.Dataset`` with the columns of features.
            name: the data set's; its task's, too, if rows have no feature of the group ``task``.
            evaluation: whether the rows are for evaluation.
            groups: the columns of features.
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
        for group in groups:
            for number, named in zip(
                numbers.tolist(), _named(rows, group, codes, len(names)), strict=True
            ):
                self.names.setdefault((number, group), set()).update(named)
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
        for number, spec in enumerate(self.found):
            names = {
                group: tuple(sorted(n)) for (of, group), n in self.names.items() if of == number
            }
            labels: Sequence[str] | None = spec["labels"]
            if labels is None and spec["kind"] in LABELS:
                labels = sorted(self.given[spec["name"]])
            halves = [
                frozenset(self.occurring.get((spec["name"], half), ())) for half in (False, True)
            ]
            kept = None if labels is None else tuple(labels)
            both = (halves[0], halves[1])
            specs.append(Spec(**{**spec, "labels": kept, "occurring": both, "names": names}))
        return tuple(specs)


def _named(rows: Any, group: str, codes: NDArray[np.int64], count: int) -> list[set[str]]:
    """The features of a group that the rows of each task name, by the tasks' numbers in ``codes``."""
    import pyarrow as pa

    # The distinct values alone become Python's: there may be millions of rows, and hundreds of tasks.
    values = pa.chunked_array([rows.data.column(group).combine_chunks()])
    if pa.types.is_string(values.type) and not values.null_count:
        coded = values.dictionary_encode().chunk(0)
        names = coded.dictionary.to_pylist()
        found: list[set[str]] = [set() for _ in range(count)]
        for pair in np.unique(codes * len(names) + coded.indices.to_numpy()).tolist():
            found[pair // len(names)].add(names[pair % len(names)])
        return found
    return [_named_by(values.filter(pa.array(codes == number))) for number in range(count)]


def _named_by(values: Any) -> set[str]:
    import pyarrow as pa
    import pyarrow.compute as compute

    if pa.types.is_struct(values.type):
        kept = values.combine_chunks()
        return {f.name for f in values.type if kept.field(f.name).null_count < len(kept)}
    if pa.types.is_list(values.type):
        values = compute.list_flatten(values)
    return {*compute.unique(values).to_pylist()} - {None}


def columns_of(said: Mapping[str, Any], group: str) -> list[str]:
    """The columns in which the data of a task names its features of a group."""
    found = said.get("feature_columns", {}).get(group, [])
    return [found] if isinstance(found, str) else list(found)


def named_by(said: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The features that the rows of a task are known to name, by group."""
    fixed = {group: names_of(group, value) for group, value in said.get("features", {}).items()}
    return {**{group: names for group, names in fixed.items() if names}, **said.get("names", {})}


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What holds of a task that stands in two data sets: the features that all rows have, and what rows name at all."""
    mine, others = first.get("features", {}), second.get("features", {})
    columns: dict[str, Any] = {}
    for group in (*first.get("feature_columns", {}), *second.get("feature_columns", {})):
        found = list(dict.fromkeys([*columns_of(first, group), *columns_of(second, group)]))
        columns[group] = found[0] if len(found) == 1 else found
    shared = {group: value for group, value in mine.items() if group in others and others[group] == value}  # fmt: skip
    names: dict[str, list[str]] = {}
    if "names" in first and "names" in second:  # otherwise nobody knows all of them
        of = (first["names"], second["names"])
        names = {g: sorted({*of[0].get(g, ()), *of[1].get(g, ())}) for g in {**of[0], **of[1]}}
    return {"features": shared, "feature_columns": columns, "names": names}

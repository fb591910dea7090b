"""From a record of a file to a row that a model is asked: its task, its features, and its columns as in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unicodedata import normalize

from flix.core.errors import listed, near, shown
from flix.core.features.cells import names_of
from flix.data import forms
from flix.data.errors import DataError
from flix.data.loading import feature_of
from flix.tasks.columns import TASK, WHERE, joined, names_in
from flix.tasks.specs import FORMS, LABELS, columns_of, merged, named_by

Said = Mapping[str, Any]
"""What a recipe says of a task."""

_READS = ("kind", "columns", "prompt", "max_source", "max_target")


class Asker:
    """Reads records as the tasks of a recipe.

    Args:
        tasks: the recipe's.
        groups: those that rows name.
        features: of rows that do not name theirs, by group.
    """

    def __init__(
        self, tasks: Sequence[Said], groups: Iterable[str], features: Mapping[str, Any]
    ) -> None:
        self.tasks: list[Said] = list(tasks)
        self.groups, self.features = tuple(groups), dict(features)
        self._numbers: dict[str, list[int]] = {}
        for number, said in enumerate(tasks):
            known = self._numbers.setdefault(normalize("NFC", said["name"]), [])
            for other in known:
                if all(said.get(key) == tasks[other].get(key) for key in _READS):
                    self.tasks[other] = {**self.tasks[other], **merged(self.tasks[other], said)}
                    break
            else:
                known.append(number)

    def __call__(self, where: str, record: Said, named: Mapping[str, Any]) -> dict[str, Any]:
        """A row: the record with its task, its features, and what prompts need as text.

        Args:
            where: where the record stands, for messages.
            record: the record.
            named: what its file's name says.

        Raises:
            DataError: no task, or one of several that cannot be told apart; ill-formed columns or features.
        """
        number = self._task(where, record, named)
        said = self.tasks[number]
        row = {**record, TASK: number, WHERE: where}
        for group in self.groups:
            row.pop(group, None)
            there, value = self._feature(where, record, named, group, [said])
            if not there and group in (fixed := said.get("features", {})):
                there, value = True, fixed[group]
            if there:
                row[group] = value
        kind = FORMS[said["kind"]]
        held = {column: kind.get(what, "messages") for what, column in _columns(said).items()}
        for column in names_in(said.get("prompt") or ""):
            if column in record and column not in self.groups:
                if record[column] is None:
                    raise DataError(f"{where}: column {column!r} holds nothing")
                row[column] = forms.FORMS[held.get(column, "shown")](record[column], column, where)
        return row

    def _feature(
        self, where: str, record: Said, named: Mapping[str, Any], group: str, tasks: Sequence[Said]
    ) -> tuple[bool, Any]:
        """Whether a row's feature of a group is known, and the feature, without what its task says of all rows."""
        asked = [group, *(column for said in tasks for column in columns_of(said, group))]
        columns = [column for column in dict.fromkeys(asked) if column in record]
        found = [_value(record[column], group, where) for column in columns]
        sources = [f"its column {column!r}" for column in columns]
        if group in named:
            found.append(_value(named[group], group, where))
            sources.append("its file's name")
        for value, source in zip(found, sources, strict=True):
            if value != found[0]:
                raise DataError(
                    f"{where}: the row's {group} is {shown(found[0])} by {sources[0]}, and {shown(value)} by {source}"
                )
        if found:
            return True, found[0]
        if group in self.features:
            return True, _value(self.features[group], group, "--features")
        return False, None

    def _task(self, where: str, record: Said, named: Mapping[str, Any]) -> int:
        names = list(self._numbers)
        name = names[0]
        if len(names) > 1:
            there, value = self._feature(where, record, named, "task", self.tasks)
            if not there or value is None:
                raise DataError(
                    f"{where}: the row does not say its task; the tasks are: {listed(names)}"
                )
            name = joined(value)
            if name not in names:
                raise DataError(
                    f"{where}: there is no task {name!r}{near(name, names)}; the tasks are: {listed(names)}"
                )
        numbers = self._numbers[name]
        return numbers[0] if len(numbers) == 1 else self._chosen(where, record, named, numbers)

    def _chosen(
        self, where: str, record: Said, named: Mapping[str, Any], numbers: Sequence[int]
    ) -> int:
        """The one of several tasks of a name that a row is of: they have other prompts, columns or features."""
        fitting = [n for n in numbers if not self._against(where, record, named, self.tasks[n])]
        if len(fitting) == 1:
            return fitting[0]
        tasks = [self.tasks[n] for n in fitting or numbers]
        told = "; ".join(dict.fromkeys(_described(said, self.groups) for said in tasks))
        raise DataError(
            f"{where}: the adapter was trained on several data sets of the task {tasks[0]['name']!r}, and the row "
            f"fits {'several' if fitting else 'none'} of them: {told}. Give it the columns and features of one, or leave only that one "
            "in recipe.json"
        )

    def _against(self, where: str, record: Said, named: Mapping[str, Any], said: Said) -> bool:
        """Whether a row lacks a column of a task, or names features that none of the task's rows named."""
        if any(column not in record for column in _needed(said, self.groups)):
            return True
        for group, names in named_by(said).items():
            _, mine = self._feature(where, record, named, group, [said])
            if not {*names_of(group, mine)} <= {*names}:
                return True
        return False


def _value(value: Any, group: str, where: str) -> Any:
    return None if value is None else feature_of(value, group, where)


def _columns(said: Said) -> Mapping[str, str]:
    kind, given = said["kind"], said.get("columns") or {}
    return given if "messages" in given else {what: given.get(what, what) for what in FORMS[kind]}


def _needed(said: Said, groups: Sequence[str]) -> list[str]:
    """The columns that a row must have to be asked."""
    if said.get("prompt"):
        return [column for column in names_in(said["prompt"]) if column not in groups]
    answer = LABELS.get(said["kind"], "target")
    return [column for what, column in _columns(said).items() if what != answer]


def _described(said: Said, groups: Sequence[str]) -> str:
    how = f"prompt {shown(said['prompt'])}" if said.get("prompt") else f"columns {listed(_needed(said, groups))}"  # fmt: skip
    features = [f"{group}={joined(sorted(names)[:5])}{'...' if len(names) > 5 else ''}" for group, names in named_by(said).items() if group != "task"]  # fmt: skip
    return f"{how} ({listed(features)})" if features else how

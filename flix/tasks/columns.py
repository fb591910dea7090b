"""What a row says in its columns, and prompts made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from flix.core.errors import listed, near, shown
from flix.tasks.errors import DataError

Row = Mapping[str, Any]
"""A row: its columns, and a column of each group of features."""

TASK = "flix_task"
"""The column with the number of a row's task; a row without it is of the first one."""

WHERE = "flix_where"
"""The column that says where a row comes from, such as ``file:12``, for messages."""

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}|[{}]")


def place(row: Row, task: str) -> str:
    """Where a row is, as well as it can be told."""
    if where := row.get(WHERE):
        return str(where)
    # The first column alone: this is asked of every row that is read.
    for name, value in row.items():
        if not name.startswith("flix_"):
            some = value[:60] if isinstance(value, str | list) else value
            return f"task {task!r}, the row whose {name} is {shown(some, 60)}"
    return f"task {task!r}, an empty row"


def value_of(row: Row, column: str, where: str) -> Any:
    """A column's value.

    Raises:
        DataError: the row has no such column, or nothing in it.
    """
    if column not in row:
        present = [name for name in row if not name.startswith("flix_")]
        raise DataError(
            f"{where}: no column {column!r}{near(column, present)}; it has: {listed(present)}"
        )
    if row[column] is None:
        raise DataError(f"{where}: column {column!r} holds nothing")
    return row[column]


def fill(template: str, row: Row, where: str) -> str:
    """A template with ``{name}`` replaced by a column or a group's features; ``{{`` and ``}}`` are braces.

    Several features of a group are joined by ``+``.

    Raises:
        DataError: a name without a value, or a brace without its partner.
    """

    def put(match: re.Match[str]) -> str:
        found, name = match.group(0), match.group(1)
        if found in ("{{", "}}"):
            return found[0]
        if name is None:
            raise DataError(
                f"prompt {template!r}: a single {found!r}; write {found * 2!r} for the brace itself"
            )
        if name not in row:
            present = [column for column in row if not column.startswith("flix_")]
            raise DataError(
                f"{where}: prompt {template!r} needs {name!r}{near(name, present)}; there is: {listed(present)}"
            )
        return joined(row[name])

    return _FIELD.sub(put, template)


def names_in(template: str) -> list[str]:
    """The columns and groups that a template names.

    Raises:
        DataError: a brace without its partner.
    """
    found: dict[str, None] = {}
    for match in _FIELD.finditer(template):
        if match[0] in ("{", "}"):
            raise DataError(
                f"prompt {template!r}: a single {match[0]!r}; write {match[0] * 2!r} for the brace itself"
            )
        if match[1] is not None:
            found[match[1]] = None
    return list(found)


def joined(value: Any) -> str:
    """What a row says of a group, as prompts have it: names joined by ``+``, in the row's order.

    Names with weights ascend: what is read from a file of Arrow has lost the row's own order.
    """
    if isinstance(value, Mapping):
        value = sorted(name for name, weight in value.items() if weight is not None)
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return "" if value is None else str(value)


def states_weights(row: Mapping[str, Any], groups: Iterable[str]) -> bool:
    """Whether a row itself says how much its features of these groups count, as in ``{"language": {"hau": 0.5}}``."""
    return any(isinstance(row.get(group), Mapping) for group in groups)

"""What a column may hold: text, a list of texts, a number, a conversation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from flix.core.checks import is_number
from flix.core.errors import shown
from flix.data.errors import DataError


def text(value: Any, column: str, where: str) -> str:
    """A value as text; numbers are written out.

    Raises:
        DataError: neither text nor a finite number.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(
                    f"{where}: column {column!r} holds half of a surrogate pair, which is not "
                    f"text: {shown(value, 60)}"
                ) from None
        return value
    if is_number(value) and (isinstance(value, int) or math.isfinite(value)):
        return str(value)
    raise DataError(f"{where}: column {column!r} must hold text, got {shown(value)}")


def anything(value: Any, column: str, where: str) -> str:
    """Any value as text, for a prompt.

    Raises:
        DataError: nothing, or half of a surrogate pair.
    """
    if value is None:
        raise DataError(f"{where}: column {column!r} holds nothing")
    return text(value if isinstance(value, str) else str(value), column, where)


def number(value: Any, column: str, where: str) -> float:
    """A value as a finite number; text that spells one is one.

    Raises:
        DataError: anything else.
    """
    found = math.nan
    if is_number(value) or isinstance(value, str):
        with suppress(ValueError, OverflowError):
            found = float(value)
    if not math.isfinite(found):
        raise DataError(f"{where}: column {column!r} must hold a finite number, got {shown(value)}")
    return found


def texts(value: Any, column: str, where: str) -> list[str]:
    """A value as a list of texts.

    Raises:
        DataError: no list, or an entry that is no text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{where}: column {column!r} must hold a list of texts, got {shown(value)}")
    return [text(entry, column, where) for entry in value]


def messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    """A value as a conversation, ``[{"role": ..., "content": ...}, ...]``; other keys go.

    Raises:
        DataError: no list of such messages, or an empty one.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(
            f'{where}: column {column!r} must hold a list of messages, {{"role": ..., "content": ...}}, '
            f"got {shown(value)}"
        )
    found = []
    for turn, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= {*message}:
            raise DataError(
                f'{where}: column {column!r}, message {turn} must be {{"role": ..., "content": ...}}, got {shown(message)}'
            )
        parts = ("role", "content")
        found.append({name: text(message[name], f"{column}[{turn}]", where) for name in parts})
    return found


FORMS: dict[str, Callable[[Any, str, str], Any]] = {
    "text": text,
    "shown": anything,
    "number": number,
    "texts": texts,
    "messages": messages,
}
"""The forms by name."""

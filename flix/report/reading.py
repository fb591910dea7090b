"""JSON of a run's folder, checked where it is read: what is not as it must be is named by file and place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.checks import is_number, is_whole
from flix.core.errors import AdapterError, FlixError, shown
from flix.core.strictjson import parsed


class ReportError(FlixError, ValueError):
    """Runs from which no report can be made, or an option that does not fit them."""


@dataclass(frozen=True)
class Part:
    """A value in a file, and where it stands.

    Attributes:
        value: the value; None where the file has none.
        where: the file and the place in it, for messages.
    """

    value: Any
    where: str

    def get(self, key: str) -> Part:
        """What an object says under a name.

        Raises:
            ReportError: this is no object.
        """
        return Part(self._of(dict, "an object").get(key), f"{self.where}: {key}")

    def items(self) -> Iterator[tuple[str, Part]]:
        """The entries of an object; none where there is no value.

        Raises:
            ReportError: this is another thing.
        """
        for key, value in (self._of(dict, "an object") if self.value is not None else {}).items():
            yield key, Part(value, f"{self.where}: {key}")

    def parts(self) -> list[Part]:
        """The entries of a list; none where there is no value.

        Raises:
            ReportError: this is another thing.
        """
        if self.value is None:
            return []
        found = self._of(list, "a list")
        return [Part(value, f"{self.where}[{i}]") for i, value in enumerate(found)]

    def number(self) -> float | None:
        """A finite number; None for null, or where there is no value.

        Raises:
            ReportError: this is another thing.
        """
        if self.value is None:
            return None
        if not is_number(self.value):
            raise self._wrong("a number or null")
        try:
            found = float(self.value)
        except OverflowError:
            raise self._wrong("a finite number") from None
        return found if math.isfinite(found) else None

    def whole(self) -> int | None:
        """A count of 0 or more; None for null, or where there is no value.

        Raises:
            ReportError: this is another thing.
        """
        if self.value is None:
            return None
        if not is_whole(self.value) or self.value < 0:
            raise self._wrong("a whole number of 0 or more")
        return int(self.value)

    def text(self) -> str | None:
        """A text; None for null, or where there is no value.

        Raises:
            ReportError: this is another thing.
        """
        return None if self.value is None else str(self._of(str, "a text"))

    def flag(self) -> bool | None:
        """Yes or no; None for null, or where there is no value.

        Raises:
            ReportError: this is another thing.
        """
        return None if self.value is None else bool(self._of(bool, "true or false"))

    def needed(self) -> Part:
        """The same, which must be there.

        Raises:
            ReportError: there is no value.
        """
        if self.value is None:
            raise ReportError(f"{self.where} is missing")
        return self

    def plain(self) -> str:
        """Any value as people read it: texts as they are, lists of texts joined by blanks, the rest as JSON."""
        if isinstance(self.value, str):
            return self.value
        if isinstance(self.value, list) and all(isinstance(v, str) for v in self.value):
            return " ".join(self.value)
        return "" if self.value is None else json.dumps(self.value, ensure_ascii=False)

    def _of(self, kind: type, what: str) -> Any:
        if not isinstance(self.value, kind):
            raise self._wrong(what)
        return self.value

    def _wrong(self, what: str) -> ReportError:
        return ReportError(f"{self.where} must be {what}, got {shown(self.value)}")


def read_json(file: Path) -> Part | None:
    """A JSON file; None if there is none.

    Raises:
        ReportError: it is damaged.
        OSError: it cannot be read.
    """
    where = f"{file.name} of {str(file.parent)!r}"
    try:
        return Part(parsed(file.read_bytes(), where), where)
    except FileNotFoundError:
        return None
    except AdapterError as error:
        raise ReportError(str(error)) from None


def read_lines(file: Path) -> Iterator[Part]:
    """The lines of a JSONL file, each an object. A last line without its end is one that was cut off, and is left out.

    Raises:
        ReportError: a line is damaged, or no object; it is named by its number.
        OSError: the file cannot be read.
    """
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file.name} of {str(file.parent)!r}, line {number}"
            if not line.strip():
                continue
            try:
                part = Part(parsed(line, where), where)
            except AdapterError as error:
                if not line.endswith(b"\n"):
                    return
                raise ReportError(str(error)) from None
            if not isinstance(part.value, dict):
                raise ReportError(f"{where} must be an object, got {shown(part.value)}")
            yield part

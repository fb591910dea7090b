"""What commands write: JSON that every reader takes, and files that are whole or as they were before."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from flix.core.files import write_file

_HALF = re.compile("[\ud800-\udfff]")


def json_text(data: Any, *, encoding: str = "utf-8", indent: int | None = None) -> str:
    """Data as JSON.

    A number that is none (NaN, an infinity) is null, as JSON has no word for it. Dates and times are text as ISO 8601
    has it, and decimals are text with all their digits. What the encoding cannot hold is escaped, and so is half of
    a surrogate pair.

    Raises:
        TypeError: something else that JSON cannot hold.
    """
    plain = encoding.lower().replace("-", "").replace("_", "") not in ("utf8", "utf8sig")
    how: dict[str, Any] = {"ensure_ascii": plain, "indent": indent, "default": _as_text}
    try:
        text = json.dumps(data, allow_nan=False, **how)
    except ValueError:  # most data is finite, and is not copied
        text = json.dumps(_finite(data), allow_nan=False, **how)
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def _as_text(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def output_encoding() -> str:
    """That of standard output."""
    return str(getattr(sys.stdout, "encoding", None) or "utf-8")


def write_lines(output: Path, lines: Iterable[str]) -> int:
    """Write lines, and say how many there were.

    A file is written aside and moved into place at the end: if a line fails, the file that was there stays. A link
    keeps leading to it. A pipe, a device, and the file that one of our own streams goes to are written directly.
    """
    count = 0

    def fill(raw: BinaryIO) -> None:
        nonlocal count
        buffer = io.BufferedWriter(raw)  # type: ignore[arg-type]
        for line in lines:
            buffer.write(f"{line}\n".encode())
            count += 1
        buffer.flush()
        buffer.detach()

    if (handle := _directly(output)) is not None:
        with os.fdopen(handle, "wb", 0) as raw:
            fill(raw)  # type: ignore[arg-type]
    else:
        write_file(Path(os.path.realpath(output)), fill)
    return count


def _directly(output: Path) -> int | None:
    """A handle to what no other file can take the place of; None for a file."""
    try:
        there = os.stat(output)
    except OSError:
        return None
    for stream in (1, 2):
        try:
            if os.path.samestat(os.fstat(stream), there):
                return os.dup(stream)  # opened anew, it would be written from its beginning
        except OSError:  # closed
            continue
    held = output.parent.resolve().as_posix()
    if held in ("/dev/fd", f"/proc/{os.getpid()}/fd") and output.name.isdigit():
        return os.dup(int(output.name))
    return None if stat.S_ISREG(there.st_mode) else os.open(output, os.O_WRONLY)

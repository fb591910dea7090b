"""Files of expected failures: one a line, ``check: reason`` or ``check[backend]: reason``; # begins a comment."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_LINE = re.compile(r"(?P<check>\w+)(?:\[(?P<backend>[^\]]+)\])?\s*:\s*(?P<reason>\S.*)")


def read(path: Path, checks: Iterable[str]) -> dict[tuple[str, str | None], str]:
    """{(check, backend or None for all): reason}.

    A check of pairs names both backends, ``cross_files[torch+jax]``.

    Raises:
        ValueError: a line of another form, without a reason, or with an unknown check; the line is named.
        OSError: the file cannot be read.
    """
    known = set(checks)
    found: dict[tuple[str, str | None], str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{path}:{number}: wanted 'check: reason' or 'check[backend]: reason', got {text!r}"
            )
        if match["check"] not in known:
            raise ValueError(f"{path}:{number}: no check {match['check']!r}")
        found[match["check"], match["backend"]] = match["reason"]
    return found


def reason(expected: dict[tuple[str, str | None], str], check: str, backend: str) -> str | None:
    """Why this check is expected to fail on this backend, or None."""
    return expected.get((check, backend), expected.get((check, None)))

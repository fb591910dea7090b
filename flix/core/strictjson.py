"""JSON out of files that anybody may have written."""

from __future__ import annotations

import json
from typing import Any

from flix.core.errors import AdapterError


def parsed(text: str | bytes, what: str) -> Any:
    """What a JSON text says, with every name once in its object, and finite numbers.

    Args:
        text: the text.
        what: where it was read, for the message.

    Raises:
        AdapterError: no JSON of this kind, or one that nests too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        why = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise AdapterError(f"{what} is damaged: {why}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:100]!r} occurs twice in an object")
    return found


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")

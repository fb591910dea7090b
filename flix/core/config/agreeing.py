"""What several processes that train one model must have in common, and in what they differ (pure, of plain data)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flix.core.errors import listed

_SHOWN = 6
"""How many differences a message names."""


def digest(description: Mapping[str, Any]) -> bytes:
    """32 bytes that tell a JSON-able description from others."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).digest()


def disagreement(descriptions: Sequence[Mapping[str, Any]]) -> str | None:
    """How the descriptions of some processes differ from the first one's, and whose they are; None where none does.

    Args:
        descriptions: JSON-able ones, by rank.

    Example::

        >>> disagreement([{"seed": 0, "features": ["hau", "swa"]}, {"seed": 1, "features": ["hau"]}])
        "rank 1 against rank 0: seed: 1 against 0; features: without 'swa'"
    """
    first, ranks = descriptions[0], dict[tuple[str, ...], list[int]]()
    for rank, other in enumerate(descriptions[1:], 1):
        if found := tuple(_differences(other, first, "")):
            ranks.setdefault(found, []).append(rank)
    if not ranks:
        return None
    return "; ".join(
        f"rank{'s' * (len(who) > 1)} {listed(who)} against rank 0: {_some(found)}"
        for found, who in ranks.items()
    )


def _some(found: Sequence[str]) -> str:
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + (f"; and {more} more differences" if more > 0 else "")


def _differences(one: Any, other: Any, path: str) -> Iterator[str]:
    """What ``one`` has otherwise than ``other``, part by part."""
    if one == other:
        return
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        missing = [key for key in other if key not in one]
        extra = [key for key in one if key not in other]
        if missing or extra:
            yield _named(path, missing, extra)
        for key in one:
            if key in other:
                yield from _differences(one[key], other[key], f"{path}.{key}" if path else str(key))
    elif isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        missing = [item for item in other if item not in one]
        extra = [item for item in one if item not in other]
        if missing or extra:
            yield _named(path, missing, extra)
        elif sorted(map(repr, one)) == sorted(map(repr, other)):
            yield f"{path}: in another order"
        else:
            yield f"{path}: {one!r} against {other!r}"
    else:
        yield f"{path}: {one!r} against {other!r}"


def _named(path: str, missing: Sequence[Any], extra: Sequence[Any]) -> str:
    parts = []
    if missing:
        parts.append(f"without {listed(map(repr, missing), 5)}")
    if extra:
        parts.append(f"with {listed(map(repr, extra), 5)}")
    return f"{path}: {', '.join(parts)}" if path else ", ".join(parts)

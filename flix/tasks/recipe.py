"""What is needed to serve an adapter: ``recipe.json`` beside its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flix.core.errors import AdapterError

RECIPE = "recipe.json"
FORMAT = 1


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe beside an adapter's files; None if there is none.

    Raises:
        AdapterError: it is damaged.
    """
    file = folder / RECIPE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or not isinstance(found["model"], str):
            raise ValueError(f"not of format {FORMAT}")
        for task in found["tasks"]:
            if not isinstance(task["name"], str) or not isinstance(task["kind"], str):
                raise ValueError("a task has no name or no kind")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise AdapterError(f"{file}: no recipe of an adapter: {error}") from None
    return dict(found)

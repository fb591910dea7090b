"""What is needed to serve an adapter: ``recipe.json`` beside its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flix.core.adapter.files import RECIPE_FILE
from flix.core.errors import AdapterError
from flix.tasks.specs import Spec
from flix.tasks.task import Task

RECIPE = RECIPE_FILE
FORMAT = 1


def recipe_of(
    model: str,
    tokenizer: str | None,
    tasks: Sequence[Task],
    specs: Sequence[Spec],
    seen: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """A recipe.

    Args:
        model, tokenizer: folders or hub names; the tokenizer is the model's if None.
        tasks: in the order of their numbers.
        specs: the same ones, as the data tells of them.
        seen: the cells that are trained on.
        more: how answers are written.
    """
    return {
        "format": FORMAT,
        "model": _whole(model),
        "tokenizer": None if tokenizer is None else _whole(tokenizer),
        "tasks": [
            {
                **task.described(),
                "features": dict(spec.features),
                "feature_columns": dict(spec.feature_columns),
            }
            for task, spec in zip(tasks, specs, strict=True)
        ],
        "seen": list(seen),
        **more,
    }


def joined(recipe: Mapping[str, Any], start: Path) -> dict[str, Any]:
    """A recipe with what the adapter that it started from learned before: its tasks and the cells it was trained on.

    Raises:
        AdapterError: the earlier recipe is damaged.
    """
    earlier = read_recipe(start) or {"tasks": [], "seen": []}
    names = {task["name"] for task in recipe["tasks"]}
    before = [task for task in earlier["tasks"] if task["name"] not in names]
    seen = dict.fromkeys([*earlier.get("seen", []), *recipe["seen"]])
    return {**recipe, "tasks": [*recipe["tasks"], *before], "seen": [*seen]}


def _whole(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


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
        raise AdapterError(f"{file}: not a recipe of an adapter: {error}") from None
    return dict(found)


def as_trained(specs: Sequence[Spec], folder: Path | None) -> list[Spec]:
    """The tasks with the labels that an adapter's heads were trained with."""
    recipe: Mapping[str, Any] | None = read_recipe(folder) if folder is not None else None
    if recipe is None:
        return list(specs)
    known = {task["name"]: task.get("labels") for task in recipe["tasks"]}
    return [replace(s, labels=tuple(known[s.name])) if known.get(s.name) else s for s in specs]

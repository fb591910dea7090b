"""What is needed to serve an adapter: ``recipe.json`` beside its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flix.core.adapter.files import RECIPE_FILE
from flix.core.checks import is_number, is_whole
from flix.core.errors import AdapterError, FlixError, shown
from flix.core.features.cells import names_of, read_cell
from flix.tasks.columns import names_in
from flix.tasks.specs import Spec, merged, named_by
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
                **(
                    {"names": {g: list(names) for g, names in spec.names.items()}}
                    if spec.names
                    else {}
                ),
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
    tasks, before = list(recipe["tasks"]), []
    for old in earlier["tasks"]:
        same = [number for number, task in enumerate(tasks) if task["name"] == old["name"]]
        if not same or all(_told_apart(old, tasks[number]) for number in same):
            before.append(old)
            continue
        # The new run's prompt and columns hold, but no feature that only its rows have.
        for number in same:
            if not _told_apart(old, tasks[number]):
                tasks[number] = {**tasks[number], **merged(tasks[number], old)}
    seen = dict.fromkeys([*earlier.get("seen", []), *recipe["seen"]])
    return {**recipe, "tasks": [*tasks, *before], "seen": [*seen]}


def _told_apart(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two tasks of a name, which read rows differently, have rows that name different features."""
    alike = all(
        old.get(key) == new.get(key) for key in ("columns", "prompt", "max_source", "max_target")
    )
    if alike or any(old.get(key) != new.get(key) for key in ("kind", "labels")):
        return False
    before, after = named_by(old), named_by(new)
    return any(g in after and not {*names} & {*after[g]} for g, names in before.items())


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
        _check(found)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise AdapterError(f"{file}: not a recipe of an adapter: {error}") from None
    return dict(found)


def _check(found: Any) -> None:
    """Refuse what no run writes: someone edited it.

    Raises:
        ValueError, TypeError, KeyError: a key of another form, which is named.
    """
    if found["format"] != FORMAT or not isinstance(found["model"], str):
        raise ValueError(f"not of format {FORMAT}")
    _hold(found, _RECIPE, "")
    for number, task in enumerate(found["tasks"]):
        if not isinstance(task, Mapping) or not isinstance(task.get("name"), str) or not isinstance(task.get("kind"), str):  # fmt: skip
            raise ValueError(f"tasks[{number}]: a task has no name or no kind")
        _hold(task, _TASK, f"tasks[{number}].")


def _hold(said: Mapping[str, Any], wanted: Mapping[str, _Form], where: str) -> None:
    for key, (what, holds) in wanted.items():
        try:
            right = key not in said or holds(said[key])
        except FlixError as error:  # with its reason
            raise ValueError(f"{where}{key}: {error}") from None
        if not right:
            raise ValueError(f"{where}{key} must be {what}, got {shown(said[key])}")


_Form = tuple[str, Callable[[Any], bool]]


def _whole_or(least: int) -> Callable[[Any], bool]:
    return lambda value: is_whole(value) and value >= least


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _named(value: Any, holds: Callable[[Any], bool] = lambda entry: isinstance(entry, str)) -> bool:
    return isinstance(value, Mapping) and all(map(holds, value.values()))


def _features(value: Any) -> bool:
    return isinstance(value, Mapping) and all(v is None or names_of(g, v) for g, v in value.items())


_RECIPE: dict[str, _Form] = {
    "tokenizer": ("a folder or a name, or null", lambda v: v is None or isinstance(v, str)),
    "tasks": ("a list of tasks", lambda v: isinstance(v, list) and bool(v)),
    "seen": ("a list of combinations, group=name,...", lambda v: _texts(v) and all(map(read_cell, v))),
    "dtype": ("the name of a dtype", lambda v: isinstance(v, str)),
    "unseen_group_weights": ("factors by group, or null", lambda v: v is None or _named(v, is_number)),
    "max_new_tokens": ("a whole number of 1 or more", _whole_or(1)),
    "num_beams": ("a whole number of 1 or more", _whole_or(1)),
}  # fmt: skip

_TASK: dict[str, _Form] = {
    "columns": ("columns by what they hold", _named),
    "prompt": ("a text, or null", lambda v: v is None or (isinstance(v, str) and names_in(v) is not None)),
    "labels": ("a list of labels, or null", lambda v: v is None or _texts(v)),
    "max_source": ("a whole number of 2 or more", _whole_or(2)),
    "max_target": ("a whole number of 2 or more", _whole_or(2)),
    "features": ("features by group", _features),
    "names": ("lists of features by group", lambda v: _named(v, _texts)),
    "feature_columns": ("columns by group", lambda v: _named(v, lambda c: isinstance(c, str) or _texts(c))),
}  # fmt: skip


def as_trained(specs: Sequence[Spec], folder: Path | None) -> list[Spec]:
    """The tasks with the labels that an adapter's heads were trained with."""
    recipe: Mapping[str, Any] | None = read_recipe(folder) if folder is not None else None
    if recipe is None:
        return list(specs)
    known = {task["name"]: task.get("labels") for task in recipe["tasks"]}
    return [replace(s, labels=tuple(known[s.name])) if known.get(s.name) else s for s in specs]

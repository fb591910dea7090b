"""``recipe.json`` that someone edited is refused by file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import flix
from flix.tasks.recipe import read_recipe

TASK: dict[str, Any] = {
    "name": "t", "kind": "seq2seq", "columns": {"source": "source", "target": "target"}, "prompt": "{source}", "labels": [],
    "max_source": 512, "max_target": 256, "features": {"language": "hau"}, "feature_columns": {"task": "kind", "x": ["a", "b"]},
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "format": 1, "model": "m", "tokenizer": None, "tasks": [TASK], "seen": ["language=hau,task=t"], "dtype": "float32",
    "unseen_group_weights": None, "max_new_tokens": 64, "num_beams": 1,
}  # fmt: skip


def test_what_a_run_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    assert read_recipe(tmp_path) == RECIPE
    bare = {"format": 1, "model": "m", "tasks": [{"name": "t", "kind": "seq2seq"}]}
    (tmp_path / "recipe.json").write_text(json.dumps(bare))
    assert read_recipe(tmp_path) == bare


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seen": None}, r"seen must be a list of combinations, group=name,..., got None"),
        ({"seen": [3]}, r"seen must be a list of combinations, group=name,..., got \[3\]"),
        ({"seen": ["hau"]}, r"seen: features are written as group=name"),
        ({"num_beams": None}, "num_beams must be a whole number of 1 or more, got None"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more, got 0"),
        ({"tokenizer": 3}, "tokenizer must be a folder or a name, or null, got 3"),
        ({"unseen_group_weights": {"a": "b"}}, "unseen_group_weights must be factors by group"),
        ({"dtype": 3}, "dtype must be the name of a dtype"),
        ({"tasks": 3}, "tasks must be a list of tasks, got 3"),
        ({"tasks": []}, "tasks must be a list of tasks"),
        ({"tasks": [3]}, r"tasks\[0\]: a task has no name or no kind"),
        ({"model": None}, "not of format 1"),
    ],
)  # fmt: skip
def test_a_key_of_another_form_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps({**RECIPE, **changed}))
    with pytest.raises(flix.AdapterError, match=rf"recipe.json: not a recipe of an adapter: {message}"):  # fmt: skip
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": 3}, "prompt must be a text, or null, got 3"),
        ({"prompt": "{"}, "prompt: prompt '{': a single '{'"),
        ({"features": None}, "features must be features by group, got None"),
        ({"features": {"language": []}}, "features: the language of a row is"),
        ({"feature_columns": None}, "feature_columns must be columns by group, got None"),
        ({"feature_columns": {"language": 3}}, "feature_columns must be columns by group"),
        ({"columns": {"source": 3}}, "columns must be columns by what they hold"),
        ({"labels": 3}, "labels must be a list of labels, or null"),
        ({"max_source": None}, "max_source must be a whole number of 2 or more, got None"),
    ],
)  # fmt: skip
def test_so_is_one_of_a_task(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({**RECIPE, "tasks": [{**TASK, **changed}]}))
    with pytest.raises(flix.AdapterError, match=rf"recipe.json: not a recipe of an adapter: tasks\[0\]\.{message}"):  # fmt: skip
        read_recipe(tmp_path)

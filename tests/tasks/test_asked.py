"""Records of files become the rows that training would have made of them, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import yaml

from flix.data.errors import DataError
from flix.tasks import make_task
from flix.tasks.asked import Asker
from flix.tasks.recipe import joined, recipe_of
from flix.training.data import read_data
from flix.training.reading import read_settings
from tests.helpers.training import one_thread, rows_of

__all__ = ["one_thread"]

NFD = "e\u0301we"
NFC = "\u00e9we"
Served = tuple[list[dict[str, Any]], list[Any], Any]


@pytest.fixture
def served(tmp_path: Path) -> Callable[..., Served]:
    """Data sets as a recipe has them: (its tasks, tasks, data)."""

    def make(*datasets: dict[str, Any], kind: str = "seq2seq") -> Served:
        for number, dataset in enumerate(datasets):
            rows = dataset.pop("rows")
            file = tmp_path / dataset.pop("name", f"{number}.jsonl")
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            dataset.setdefault("files", file.name)
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump({"model": "m", "kind": kind, "datasets": list(datasets)}))
        data = read_data(read_settings(path))
        tasks = [
            make_task(spec.kind, tf.ByT5Tokenizer(), name=spec.name, columns=spec.columns, prompt=spec.prompt)
            for spec in data.specs
        ]  # fmt: skip
        recipe = recipe_of("m", None, tasks, data.specs, data.mixture.cells)
        return json.loads(json.dumps(recipe))["tasks"], tasks, data

    return make


def rows(name: str, **more: Any) -> list[dict[str, Any]]:
    return [{"source": f"{name}{i}", "target": f"{name * 2}{i}", **more} for i in range(3)]


def asker(said: list[dict[str, Any]], *groups: str, **features: Any) -> Asker:
    return Asker(said, groups or ("task", "language"), features)


def features(row: dict[str, Any]) -> dict[str, Any]:
    return {group: row[group] for group in ("task", "language") if group in row}


def test_only_features_that_all_data_sets_of_a_task_have_are_those_of_rows_that_name_none(served: Callable[..., Served]) -> None:  # fmt: skip
    said, tasks, _ = served(
        {"rows": rows("h"), "features": {"task": "t", "language": "hau"}},
        {"rows": rows("s"), "features": {"task": "t", "language": "swa"}},
    )
    assert len(tasks) == 1 and said[0]["features"] == {"task": "t"}
    ask = asker(said)
    assert features(ask("f:1", {"source": "h0"}, {})) == {
        "task": "t"
    }  # and is refused, without a language
    assert features(ask("f:1", {"source": "h0", "language": "swa"}, {})) == {"task": "t", "language": "swa"}  # fmt: skip
    # What one data set alone says still holds.
    said, _, _ = served({"rows": rows("h"), "features": {"task": "t", "language": "hau"}})
    assert features(asker(said)("f:1", {"source": "h0"}, {})) == {"task": "t", "language": "hau"}


def test_features_in_columns_and_in_names_of_files_are_not_those_of_all_rows(served: Callable[..., Served]) -> None:  # fmt: skip
    said, tasks, _ = served(
        {"rows": rows("h"), "features": {"task": "t", "language": "hau"}},
        {"rows": rows("s", lang="swa"), "features": {"task": "t"}, "feature_columns": {"language": "lang"}},
        {"rows": rows("y", spoken="yor"), "features": {"task": "t"}, "feature_columns": {"language": "spoken"}},
        {"rows": rows("z"), "name": "zul.jsonl", "files": "{language}.jsonl", "features": {"task": "t"}},
    )  # fmt: skip
    assert len(tasks) == 1 and said[0]["features"] == {"task": "t"}
    ask = asker(said)
    for column in ("lang", "spoken", "language"):
        assert features(ask("f:1", {"source": "a", column: "swa"}, {}))["language"] == "swa"
    assert "language" not in ask("f:1", {"source": "a"}, {})
    with pytest.raises(DataError, match="f:1: the row's language is 'swa' by its column 'lang', and 'yor' by its column 'spoken'"):  # fmt: skip
        ask("f:1", {"source": "a", "lang": "swa", "spoken": "yor"}, {})


@pytest.mark.parametrize("second", [{"prompt": "translate: {source}"}, {"prompt": "{text}", "source": "text"}])  # fmt: skip
def test_rows_find_their_prompt_as_in_training_by_features_and_columns(served: Callable[..., Served], second: dict[str, Any]) -> None:  # fmt: skip
    given = [{**row, "text": row["source"]} if "source" in second else row for row in rows("s")]
    said, tasks, data = served(
        {"rows": rows("h"), "features": {"task": "t", "language": "hau"}, "prompt": "copy: {source}"},
        {"rows": given, "features": {"task": "t", "language": "swa"}, **second},
    )  # fmt: skip
    assert [task["name"] for task in said] == ["t", "t"]
    ask = asker(said)
    for row in rows_of(data)[0]:
        record = {k: v for k, v in row.items() if not k.startswith("flix_") and k != "task" and v is not None}  # fmt: skip
        mine = ask("f:1", record, {})
        assert mine["flix_task"] == row["flix_task"]
        assert tasks[mine["flix_task"]].asked(mine) == tasks[row["flix_task"]].asked(row)
    # By the name of the file, or by --features, too.
    assert ask("f:1", {"source": "a", "text": "a"}, {"language": "swa"})["flix_task"] == 1
    assert asker(said, language="swa")("f:1", {"source": "a", "text": "a"}, {})["flix_task"] == 1


def test_rows_find_their_prompt_by_the_features_that_each_data_set_names(served: Callable[..., Served]) -> None:  # fmt: skip
    several = [{"source": "a", "target": "b", "lang": lang} for lang in (["ibo", "twi"], "ibo")]
    weights = [{"source": "a", "target": "b", "lang": {"zul": 0.5, "xho": 0.5}}, {"source": "a", "target": "b", "lang": "zul"}]  # fmt: skip
    said, _, _ = served(
        {"features": {"task": "t"}, "rows": rows("h"), "name": "a-hau.jsonl", "files": "a-{language}.jsonl", "prompt": "copy: {source}"},
        {"features": {"task": "t"}, "rows": rows("s", lang="swa"), "feature_columns": {"language": "lang"}, "prompt": "say: {source}"},
        {"features": {"task": "t"}, "rows": several, "feature_columns": {"language": "lang"}, "prompt": "several: {source}"},
        {"features": {"task": "t"}, "rows": weights, "feature_columns": {"language": "lang"}, "prompt": "weights: {source}"},
    )  # fmt: skip
    assert [task["names"]["language"] for task in said] == [["hau"], ["swa"], ["ibo", "twi"], ["xho", "zul"]]  # fmt: skip
    ask = asker(said)
    for number, value in [(0, "hau"), (1, "swa"), (2, ["twi"]), (2, "ibo"), (3, {"xho": 0.5}), (3, ["zul", "xho"])]:  # fmt: skip
        assert ask("f:1", {"source": "a", "language": value}, {})["flix_task"] == number
    with pytest.raises(DataError, match=r"f:3: .*the row fits none of them: prompt 'copy: \{source\}' \(language=hau\); prompt 'say"):  # fmt: skip
        ask("f:3", {"source": "a", "language": "yor"}, {})


def test_rows_that_fit_several_prompts_of_a_task_are_refused(served: Callable[..., Served]) -> None:
    both = {"feature_columns": {"language": "lang"}, "features": {"task": "t"}}
    said, _, _ = served(
        {"rows": rows("h", lang="hau"), **both, "prompt": "copy: {source}"},
        {"rows": rows("s", lang="hau", hint="x"), **both, "prompt": "{hint}: {source}"},
    )
    ask = asker(said)
    assert ask("f:1", {"source": "a", "language": "hau"}, {})["flix_task"] == 0
    with pytest.raises(DataError, match=r"f:2: .*several data sets of the task 't', and the row fits several of them: prompt 'copy: \{source\}' \(language=hau\); prompt '\{hint\}: \{source\}' \(language=hau\)\. Give it"):  # fmt: skip
        ask("f:2", {"source": "a", "hint": "x", "language": "hau"}, {})
    with pytest.raises(DataError, match=r"f:3: .*the row fits none of them"):
        ask("f:3", {"sorce": "a", "language": "hau"}, {})


def test_tasks_that_read_rows_alike_are_one(served: Callable[..., Served]) -> None:
    said, _, _ = served({"rows": rows("h"), "features": {"task": "t", "language": "hau"}})
    ask = asker([*said, {**said[0], "features": {"task": "t"}}])
    assert features(ask("f:1", {"source": "a"}, {})) == {"task": "t"}


def test_the_task_of_rows_may_stand_in_a_column_of_the_training_data(served: Callable[..., Served]) -> None:  # fmt: skip
    given = [{**row, "kindof": kind} for kind in ("up", "down") for row in rows(kind)]
    said, tasks, _ = served({"rows": given, "feature_columns": {"task": "kindof"}, "features": {"language": "hau"}})  # fmt: skip
    ask = asker(said)
    for record in given:
        row = ask("f:1", record, {})
        assert tasks[row["flix_task"]].name == row["task"] == record["kindof"]
    assert ask("f:1", {"source": "a"}, {"task": "up"})["task"] == "up"
    with pytest.raises(DataError, match="f:1: the row does not say its task"):
        ask("f:1", {"source": "a"}, {})
    with pytest.raises(DataError, match=r"f:1: there is no task 'dwn' \(did you mean 'down'\?\)"):
        ask("f:1", {"source": "a", "kindof": "dwn"}, {})
    with pytest.raises(DataError, match="f:1: the row's task is 'up' by its column 'task', and 'down' by its column 'kindof'"):  # fmt: skip
        ask("f:1", {"source": "a", "task": "up", "kindof": "down"}, {})


def test_prompts_are_those_of_training(served: Callable[..., Served]) -> None:
    given = [
        {"source": f"a{i}", "target": "b", "lang": lang, "words": ["a", "b"], "n": 1.0, "yes": True, "more": {"k": [1]}}
        for i, lang in enumerate([NFD, ["swa", "hau"], "hau"])
    ]  # fmt: skip
    said, tasks, data = served(
        {"rows": given, "features": {"task": "t"}, "feature_columns": {"language": "lang"}, "prompt": "{language} {words} {n} {yes} {more}: {source}"},
    )  # fmt: skip
    ask = asker(said)
    trained = {row["source"]: tasks[0].asked(row) for row in rows_of(data)[0]}
    for record in given:
        assert tasks[0].asked(ask("f:1", record, {})) == trained[record["source"]]
    assert trained["a0"] == f"{NFC} ['a', 'b'] 1.0 True {{'k': [1]}}: a0"
    row = asker(said, language=NFD)("f:1", {k: v for k, v in given[0].items() if k != "lang"}, {})
    assert tasks[0].asked(row) == trained["a0"]


def test_names_with_weights_stand_in_one_order(served: Callable[..., Served]) -> None:
    given = [{"source": f"a{i}", "target": "b", "lang": lang} for i, lang in enumerate([{"swa": 0.5, "hau": 0.5}, {"hau": 0.5, "swa": 0.5}])]  # fmt: skip
    said, tasks, data = served({"rows": given, "features": {"task": "t"}, "feature_columns": {"language": "lang"}, "prompt": "{language}: {source}"})  # fmt: skip
    trained = [tasks[0].asked(row) for row in rows_of(data)[0]]
    assert sorted(trained) == ["hau+swa: a0", "hau+swa: a1"]
    assert [tasks[0].asked(asker(said)("f:1", record, {})) for record in given] == sorted(trained)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"lang": []}, "f:1: the language of a row is a name, a list of names"),
        ({"lang": {}}, "f:1: the language of a row is a name, a list of names"),
        ({"lang": {"eng": None}}, "f:1: the language of a row is a name, a list of names"),
        ({"lang": 3}, "f:1: the language must be a name, a list of names or"),
        ({"lang": {"eng": 1e39}}, "f:1: .*must be finite in float32"),
        ({"lang": "hau", "source": "\ud83d"}, "f:1: column 'source' holds half of a surrogate pair"),
        ({"lang": "hau", "source": None}, "f:1: column 'source' holds nothing"),
        ({"lang": "hau", "source": ["a"]}, "f:1: column 'source' must hold text"),
    ],
)  # fmt: skip
def test_ill_formed_rows_are_refused_with_their_place(served: Callable[..., Served], record: dict[str, Any], message: str) -> None:  # fmt: skip
    said, _, _ = served({"rows": rows("h", lang="hau"), "features": {"task": "t"}, "feature_columns": {"language": "lang"}, "prompt": "x: {source}"})  # fmt: skip
    with pytest.raises(DataError, match=message):
        asker(said)("f:1", {"source": "a", **record}, {})


def test_a_row_and_its_files_name_agree(served: Callable[..., Served]) -> None:
    said, _, _ = served({"rows": rows("h", lang="hau"), "features": {"task": "t"}, "feature_columns": {"language": "lang"}})  # fmt: skip
    ask = asker(said)
    for record in ({}, {"lang": "hau"}, {"language": "hau"}):
        assert ask("f:1", {"source": "a", **record}, {"language": "hau"})["language"] == "hau"
    with pytest.raises(DataError, match="f:1: the row's language is 'swa' by its column 'lang', and 'hau' by its file's name"):  # fmt: skip
        ask("f:1", {"source": "a", "lang": "swa"}, {"language": "hau"})


def test_a_run_that_starts_from_another_keeps_only_the_features_of_both(tmp_path: Path) -> None:
    def recipe(language: str, prompt: str | None = None) -> dict[str, Any]:
        task = {"name": "t", "kind": "seq2seq", "columns": {}, "prompt": prompt, "labels": [], "features": {"task": "t", "language": language}, "feature_columns": {}}  # fmt: skip
        return {"format": 1, "model": "m", "tasks": [task], "seen": [f"task=t,language={language}"]}

    (tmp_path / "recipe.json").write_text(json.dumps(recipe("hau")))
    (task,) = joined(recipe("swa"), tmp_path)["tasks"]
    assert task["features"] == {"task": "t"}
    # With another prompt, the earlier rows keep theirs.
    (tmp_path / "recipe.json").write_text(json.dumps(recipe("hau", "say: {source}")))
    tasks = joined(recipe("swa"), tmp_path)["tasks"]
    ask = asker(tasks)
    assert ask("f:1", {"source": "a", "language": "hau"}, {})["flix_task"] == 1
    assert ask("f:1", {"source": "a", "language": "swa"}, {})["flix_task"] == 0
    # Nothing tells these apart: the new prompt holds.
    (tmp_path / "recipe.json").write_text(json.dumps(recipe("swa", "say: {source}")))
    (task,) = joined(recipe("swa"), tmp_path)["tasks"]
    assert task["prompt"] is None and task["features"] == {"task": "t", "language": "swa"}


def test_what_earlier_runs_named_is_kept(tmp_path: Path) -> None:
    def recipe(prompt: str, **named: Any) -> dict[str, Any]:
        task = {"name": "t", "kind": "seq2seq", "prompt": prompt, "features": {"task": "t"}, "feature_columns": {}, **named}  # fmt: skip
        return {"format": 1, "model": "m", "tasks": [task], "seen": []}

    def together(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
        (tmp_path / "recipe.json").write_text(json.dumps(old))
        found: list[dict[str, Any]] = joined(new, tmp_path)["tasks"]
        return found

    hau, swa = {"names": {"language": ["hau"]}}, {"names": {"language": ["swa"]}}
    (task,) = together(recipe("a", **hau), recipe("a", **swa))
    assert task["names"] == {"language": ["hau", "swa"]}
    # Of an earlier flix, it is not known.
    (task,) = together(recipe("a"), recipe("a", **swa))
    assert task["names"] == {}
    tasks = together(recipe("a", **hau), recipe("b", **swa))
    ask = asker(tasks)
    assert [ask("f:1", {"source": "x", "language": name}, {})["flix_task"] for name in ("swa", "hau")] == [0, 1]  # fmt: skip

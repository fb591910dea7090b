"""``flix init``: what it takes data for, and that ``flix train`` reads what it writes."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flix.cli.app import app
from flix.cli.drafting import flow, scalar, suggest_held_out, suggest_ranks, suggest_temperature
from flix.cli.guessing import guess
from flix.cli.looking import Files, find_data, look
from flix.core.features.cells import cell_of
from flix.data.errors import DataError
from flix.training.reading import parse_settings, read_settings

run = CliRunner().invoke
Row = dict[str, Any]

NER = [{"tokens": ["a", "Lagos"], "tags": ["O", "B-LOC"]}] * 8
TOPIC = [{"text": f"word {i}", "label": ("sport", "health")[i % 2]} for i in range(8)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, rows: list[Row]) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".csv" in name or ".tsv" in name:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ".tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
        return name
    opened: Callable[..., Any] = gzip.open if name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def kind_of(rows: list[Row], **more: Any) -> Any:
    return guess(look(Files(put("data.jsonl", rows), None, {"task": "x"})), **more)


@pytest.mark.parametrize(
    ("rows", "kind", "columns"),
    [
        (NER, "tagging", {}),
        ([{"words": ["a", "b"], "ner_tags": [0, 1]}] * 4, "tagging", {"tokens": "words", "tags": "ner_tags"}),
        (TOPIC, "classification", {"source": "text", "target": "label"}),
        ([{"sentence": f"s {i}", "label": i % 3} for i in range(9)], "classification", {"source": "sentence", "target": "label"}),
        ([{"source": "x", "target": f"yes {i % 2}"} for i in range(9)], "classification", {}),
        ([{"text": "x", "score": i / 7} for i in range(9)], "regression", {"source": "text", "target": "score"}),
        ([{"source": f"s {i}", "target": f"t {i}"} for i in range(9)], "seq2seq", {}),
        ([{"src": f"s {i}", "tgt": f"t {i}"} for i in range(9)], "seq2seq", {"source": "src", "target": "tgt"}),
        ([{"prompt": f"s {i}", "completion": f"t {i}"} for i in range(9)], "causal", {"source": "prompt", "target": "completion"}),
        ([{"messages": [{"role": "user", "content": "x"}]}] * 3, "causal", {"messages": "messages"}),
        ([{"text": f"s {i}"} for i in range(9)], "masked", {"source": "text"}),
    ],
)  # fmt: skip
def test_the_kind_is_told_by_the_columns(rows: list[Row], kind: str, columns: Row) -> None:
    found = kind_of(rows)
    assert (found.kind, found.columns) == (kind, columns)


def test_two_texts_with_a_label_make_a_prompt() -> None:
    rows = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": i % 3} for i in range(9)]
    found = kind_of(rows)
    assert found.kind == "classification" and found.prompt == "{premise} {hypothesis}"
    assert found.columns == {"source": "premise", "target": "label"} and found.labels == 3


def test_a_kind_that_is_said_is_held_to_the_columns() -> None:
    assert kind_of([{"prompt": f"s {i}", "response": f"t {i}"} for i in range(9)], kind="seq2seq").kind == "seq2seq"  # fmt: skip
    with pytest.raises(DataError, match=r"data\.jsonl: its columns do not fit tagging; they are: text \(text\), label \(text\)\. tagging needs tokens \+ tags;"):  # fmt: skip
        kind_of(TOPIC, kind="tagging")
    with pytest.raises(
        DataError, match=r"data\.jsonl: its kind cannot be guessed; they are: x \(number\)"
    ):
        kind_of([{"x": 1}])


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_labels_in_words_are_texts_to_write_if_that_is_asked_for(kind: str) -> None:
    found = kind_of(TOPIC, kind=kind)
    assert (found.kind, found.columns, found.labels) == (kind, {"source": "text", "target": "label"}, 0)  # fmt: skip
    two = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": f"l {i % 2}"} for i in range(9)]
    assert kind_of(two, kind=kind).prompt == "{premise} {hypothesis}"
    with pytest.raises(DataError, match=f"do not fit {kind}.*{kind} needs"):
        kind_of([{"sentence": f"s {i}", "label": i % 3} for i in range(9)], kind=kind)


def test_files_of_one_folder_are_a_data_set_with_languages_in_their_names() -> None:
    for language in ("hau", "swa"):
        for half in ("train", "dev", "test"):
            put(f"data/ner/{language}.{half}.jsonl.gz", NER)
    put("data/ner/yor.test.jsonl.gz", NER)
    (found,) = find_data(["data"])
    assert found == Files("data/ner/{language}.train.jsonl.gz", "data/ner/{language}.test.jsonl.gz", {"task": "ner"})  # fmt: skip
    looked = look(found)
    assert looked.rows == 16 and len(looked.cells) == 2 and len(looked.evaluation_cells) == 3
    assert find_data(["data/ner/{language}.train.jsonl.gz"]) == [found]


@pytest.mark.parametrize(
    ("names", "pattern", "evaluation", "features"),
    [
        (["ner_hau.jsonl", "ner_swa.jsonl"], "ner_{language}.jsonl", None, {"task": "ner"}),
        (["pos.jsonl"], "pos.jsonl", None, {"task": "pos"}),
        (["d/train/hau.csv", "d/train/swa.csv", "d/test/hau.csv"], "d/train/{language}.csv", "d/test/{language}.csv", {"task": "d"}),
        (["t/train.jsonl", "t/validation.jsonl"], "t/train.jsonl", "t/validation.jsonl", {"task": "t"}),
        (["x/hau_Latn.tsv", "x/amh_Ethi.tsv"], "x/{language}.tsv", None, {"task": "x"}),
    ],
)  # fmt: skip
def test_names_of_files(names: list[str], pattern: str, evaluation: str | None, features: Row) -> None:  # fmt: skip
    for name in names:
        put(name, TOPIC)
    assert find_data(names) == [Files(pattern, evaluation, features)]


def test_names_that_no_pattern_tells_apart_are_written_file_by_file() -> None:
    for name in ("a/hau.jsonl", "a/swa.jsonl", "a/many words.jsonl"):
        put(name, TOPIC)
    found = find_data(["a/hau.jsonl", "a/swa.jsonl"])
    assert found == [
        Files("a/hau.jsonl", None, {"language": "hau", "task": "a"}),
        Files("a/swa.jsonl", None, {"language": "swa", "task": "a"}),
    ]


def test_features_are_read_from_columns() -> None:
    rows = [{"source": f"s {i}", "target": f"t {i}", "lang": ("hau", "swa")[i % 2], "task": "mt"} for i in range(8)]  # fmt: skip
    looked = look(find_data([put("all.jsonl", rows)])[0])
    assert looked.feature_columns == {"language": "lang", "task": "task"} and looked.files.features == {}  # fmt: skip
    cells = [cell_of({"language": name, "task": "mt"}) for name in ("hau", "swa")]
    assert looked.cells == dict.fromkeys(cells, 4)


def test_a_file_whose_rows_tell_their_languages_has_none_in_its_name() -> None:
    rows = [{"text": f"s {i}", "lang": ("hau", "swa")[i % 2]} for i in range(8)]
    looked = look(find_data([put("web.jsonl", rows)])[0])
    assert looked.files == Files("web.jsonl", None, {"task": "web"})
    assert looked.feature_columns == {"language": "lang"} and len(looked.cells) == 2


def africa() -> None:
    for language in ("hau", "swa", "yor"):
        put(f"data/ner/{language}.train.jsonl.gz", NER * (1 if language == "yor" else 40))
        put(f"data/ner/{language}.test.jsonl.gz", NER)
    for language in ("hau", "swa"):
        put(f"data/topic/{language}.train.jsonl", TOPIC)
    put("data/chat.jsonl", [{"text": f"t {i}", "lang": "no"} for i in range(9)])


def test_what_is_written_is_read_and_says_what_was_found(here: Path) -> None:
    africa()
    result = run(app, ["init", "data", "--out", "conf/my.yaml"])
    assert result.exit_code == 0, result.output
    settings = read_settings("conf/my.yaml")
    assert settings.kind == "tagging" and settings.model == "FacebookAI/xlm-roberta-base"
    chat, ner, topic = settings.datasets
    assert (ner.files, ner.eval_files, ner.features) == ("../data/ner/{language}.train.jsonl.gz", "../data/ner/{language}.test.jsonl.gz", {"task": "ner"})  # fmt: skip
    assert (topic.kind, topic.source, topic.target, topic.eval_rows) == ("classification", "text", "label", 1)  # fmt: skip
    assert (chat.kind, chat.feature_columns) == ("masked", {"language": "lang"})
    assert settings.temperature == 2 and settings.ranks.model_extra == {"language": 2, "task": 4}
    text = Path("conf/my.yaml").read_text()
    assert "# 648 rows in 3 cells, 2 labels" in text and "hau, swa, yor" in text
    uncommented = text.replace("# held_out:\n#   - ", "held_out:\n  - ").replace("# feature_dropout", "feature_dropout")  # fmt: skip
    again = parse_settings(uncommented, folder=here)
    assert again.held_out and again.feature_dropout is not None
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stdout.splitlines()[-1] == "wrote conf/my.yaml; next: flix plan conf/my.yaml"


def test_json() -> None:
    put("ner/hau.train.jsonl", NER)
    data = json.loads(run(app, ["init", "ner", "--model", "some/model", "--json"]).stdout)
    assert data["out"] == "train.yaml" and data["features"] == {"language": {"hau": 8}, "task": {"ner": 8}}  # fmt: skip
    assert data["datasets"][0] == {"files": "ner/{language}.train.jsonl" if "{" in data["datasets"][0]["files"] else "ner/hau.train.jsonl", "eval_files": None, "kind": "tagging", "rows": 8, "evaluation_rows": 0, "cells": 1}  # fmt: skip
    assert read_settings("train.yaml").model == "some/model"


ODD = ["no", "1", "a: b", "#", "{x}", "x, y", "é", '"', "'", "- a", "true", "2020-01-01", "~", "&a", "*", "%", "@", "a#b", " a"]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_quoted(name: str) -> None:
    import yaml

    assert yaml.safe_load(f"a: {scalar(name)}") == {"a": name}
    assert yaml.safe_load(f"a: {flow({name: name, 'b': 1})}") == {"a": {name: name, "b": 1}}


def test_columns_and_files_with_odd_names_are_read() -> None:
    rows = [{"text": f"w {i}", "label": i % 2, "lang": "no"} for i in range(8)]
    put("my data #1/no.csv", rows)
    assert run(app, ["init", "my data #1", "--out", "a b.yaml"]).exit_code == 0
    (found,) = read_settings("a b.yaml").datasets
    assert found.files.startswith("my data #1/")


def refused(*arguments: str) -> str:
    result = run(app, ["init", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("flix: error: ") and result.stderr.count("\n") == 1
    return str(result.stderr)


def test_wrong_values_are_refused_by_name() -> None:
    put("ner/hau.jsonl", NER)
    put("mt.jsonl", [{"source": f"s {i}", "target": f"t {i}"} for i in range(9)])
    Path("empty").mkdir()
    put("none.jsonl", [])
    put("broken.jsonl", NER)
    with open("broken.jsonl", "a") as file:
        file.write("{\n")
    for arguments, said in (
        (["ner", "--kind", "tag"], "--kind: no kind 'tag' (did you mean 'tagging'?)"),
        (["ner", "--model", ""], "--model must name a folder or a model of the hub"),
        (["ner", "--out", "empty"], "--out must be a file, but 'empty' is a folder"),
        (["ner", "--out", "mt.jsonl"], "--out: 'mt.jsonl' exists already; --force"),
        (["ner", "--out", "mt.jsonl/x.yaml"], "mt.jsonl"),
        (["nothing"], "no file matches 'nothing'"),
        (["{language}.nothing"], "no file matches"),
        (["empty"], "the folder 'empty' holds no data"),
        (["none.jsonl"], "no rows for training in 'none.jsonl'"),
        (["broken.jsonl"], "broken.jsonl:9: not valid JSON"),
        (["ner", "mt.jsonl"], "one model learns seq2seq alone"),
        (["mt.jsonl", "--kind", "tagging"], "its columns do not fit tagging"),
    ):
        assert said in refused(*arguments), arguments
    assert run(app, ["init", "ner", "--out", "mt.jsonl", "--force"]).exit_code == 0


def test_a_draft_never_overwrites_the_data() -> None:
    put("mt.train.jsonl", [{"source": f"s {i}", "target": f"t {i}"} for i in range(9)])
    put("mt.test.jsonl", [{"source": f"s {i}", "target": f"t {i}"} for i in range(9)])
    Path("link.yaml").symlink_to("mt.train.jsonl")
    for data, out in (
        ("mt.train.jsonl", "mt.train.jsonl"),
        ("mt.*.jsonl", "mt.test.jsonl"),
        ("mt.train.jsonl", "link.yaml"),
    ):
        before = Path(out).read_bytes()
        said = refused(data, "--out", out, "--force")
        assert f"--out: '{out}' is one of the data files" in said
        assert Path(out).read_bytes() == before


def test_suggestions_follow_the_sizes() -> None:
    cells = {cell_of({"language": a, "task": b}): n for (a, b), n in {("hau", "x"): 10, ("hau", "y"): 30, ("swa", "x"): 1000, ("swa", "y"): 9}.items()}  # fmt: skip
    assert suggest_temperature(dict(list(cells.items())[:2])) == 1
    assert suggest_temperature(cells) == 3 and suggest_temperature({}) == 1
    assert suggest_held_out(cells) == cell_of({"language": "swa", "task": "y"})
    assert suggest_held_out({cell_of({"language": "hau"}): 3}) is None
    ranks = suggest_ranks({"language": {"a": 10, "b": 50_000, "c": 30_000}, "task": {"x": 10}})
    assert ranks == {"language": 8, "task": 4}

"""Rows from files and data sets, and what is said of damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flix
from flix.training.errors import DataError
from flix.training.records import read_jsonl
from flix.training.sources import fill
from tests.helpers.training import corpus_of


def test_prompt_templates() -> None:
    assert fill("{{{a}}} {b}", {"a": 1, "b": "x"}, "f:1") == "{1} x"
    with pytest.raises(DataError, match=r"f:1.*needs 'sorce'.*'source'"):
        fill("{sorce}", {"source": "x"}, "f:1")
    with pytest.raises(DataError, match="single"):
        fill("{", {}, "f:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "bad.jsonl:2: not valid JSON"), ("[1]", "bad.jsonl:2: a row is a JSON object")],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"a": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_jsonl(file))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "nope.jsonl"}, "no file matches"),
        ({"source": "sorce"}, "no column 'sorce' (did you mean 'source'?)"),
        ({"feature_columns": {"language": "language"}}, "no column 'language'"),
        ({"prompt": "{txt}"}, "needs 'txt'"),
        ({"eval_rows": 100}, "too few"),
    ],
)
def test_data_mistakes(
    config: Callable[..., Path], data: Path, change: dict[str, Any], message: str
) -> None:
    dataset = {
        "files": str(data / "ner.jsonl"),
        "features": {"task": "ner"},
        "feature_columns": {"language": "lang"},
        **change,
    }
    with pytest.raises(flix.FlixError) as caught:
        corpus_of(config(datasets=[dataset], held_out=[]))
    assert message in str(caught.value)


def test_hub_datasets_through_a_local_folder(
    config: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets").disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hubset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((data / "ner.jsonl").read_bytes())
    (folder / "test.jsonl").write_bytes((data / "pos.jsonl").read_bytes())
    entry = {
        "hub": "hubset",
        "features": {"task": "ner"},
        "feature_columns": {"language": "lang"},
        "eval_split": "test",
    }
    corpus = corpus_of(config(datasets=[entry], held_out=[]))
    assert len(corpus.train) == 36 and len(corpus.evaluation) == 36
    with pytest.raises(DataError, match="cannot be loaded"):
        corpus_of(config(datasets=[{**entry, "split": "none"}], held_out=[]))

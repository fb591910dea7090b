"""Rows from files and data sets, and what is said of damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flix
from flix.cli.app import app
from flix.training.errors import DataError
from flix.training.sources import fill
from tests.helpers.training import corpus_of, run


def test_prompt_templates() -> None:
    assert fill("{{{a}}} {b}", {"a": 1, "b": "x"}, "f:1") == "{1} x"
    with pytest.raises(DataError, match=r"f:1.*needs 'sorce'.*'source'"):
        fill("{sorce}", {"source": "x"}, "f:1")
    with pytest.raises(DataError, match="single"):
        fill("{", {}, "f:1")


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


ROWS = [{"lang": "no", "source": "a é", "target": "01"}, {"lang": "NA", "source": "x, y", "target": "b"}]  # fmt: skip
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = b'lang,source,target\nno,a \xc3\xa9,01\nNA,"x, y",b\n'


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_run_reads_norwegian_and_namibia(config: Callable[..., Path], tmp_path: Path, form: str) -> None:  # fmt: skip
    (tmp_path / f"rows.{form}").write_bytes(LINES if form == "jsonl" else TABLE)
    dataset = {"files": f"rows.{form}", "features": {"task": "up"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    path = config(datasets=[dataset], held_out=[], implies={}, ranks=2)
    corpus = corpus_of(path)
    assert corpus.registry.names("language") == ("no", "NA")
    assert [row.target for row in corpus.train.rows] == ["01", "b"]
    assert run(app, ["plan", str(path)]).exit_code == 0


NFC, NFD = "español", "espan\u0303ol"


@pytest.mark.parametrize("held", [NFC, NFD, f"language={NFD},task=ner"])
def test_rows_of_either_form_are_held_out(config: Callable[..., Path], tmp_path: Path, held: str) -> None:  # fmt: skip
    rows = [{"lang": name, "source": "a", "target": "b"} for name in (NFC, NFD, "yor", "eng+hin")]
    rows.append({"lang": ["eng", "hin"], "source": "a", "target": "b"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    dataset = {"files": "rows.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    entry = held if "=" in held else {"language": held}
    corpus = corpus_of(config(datasets=[dataset], held_out=[entry], implies={}, ranks=1))
    assert [row.features["language"] for row in corpus.train.rows] == ["yor", "eng+hin", ["eng", "hin"]]  # fmt: skip
    assert corpus.registry.names("language") == (NFC, "yor", "eng+hin", "eng", "hin")
    # Two cells that print alike are two.
    assert set(corpus.names[1:]) == {"task=ner,language=yor", 'task=ner,language="eng+hin"', "task=ner,language=eng+hin"}  # fmt: skip
    assert sum(corpus.cell_sizes().values()) == 3 and len(corpus.evaluation) == 2


def test_names_that_are_almost_one_get_a_warning(config: Callable[..., Path], tmp_path: Path) -> None:  # fmt: skip
    rows = [{"lang": name, "source": "a", "target": "b"} for name in ("eng", "Eng")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"files": "rows.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    path = config(datasets=[dataset], held_out=[], implies={}, ranks=1)
    result = run(app, ["plan", str(path)])
    assert result.exit_code == 0 and "flix: warning: group 'language': 'eng' and 'Eng'" in result.stderr  # fmt: skip
    with pytest.raises(flix.FlixError, match="blank"):
        corpus_of(config(datasets=[{**dataset, "features": {"task": "ner "}}], held_out=[], implies={}, ranks=1))  # fmt: skip


def test_numbers_are_text_whatever_their_size(config: Callable[..., Path], tmp_path: Path) -> None:
    huge = -(10**400)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"source": huge, "target": 1.5, "lang": "eng"}))
    dataset = {"files": "rows.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    corpus = corpus_of(config(datasets=[dataset], held_out=[], implies={}, ranks=1))
    (row,) = corpus.train.rows
    assert (row.source, row.target) == (str(huge), "1.5")
    (tmp_path / "rows.jsonl").write_text('{"source": NaN, "target": "a", "lang": "eng"}')
    with pytest.raises(DataError, match="NaN is no JSON"):
        corpus_of(config(datasets=[dataset], held_out=[], implies={}, ranks=1))

"""Files of rows in every form that people have them in."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import flix
from flix.cli.app import app
from flix.training.errors import DataError
from flix.training.records import find_files, read_file
from tests.helpers.training import corpus_of, run

ROWS = [{"lang": "no", "source": "a é", "target": "01"}, {"lang": "NA", "source": "x, y", "target": "b"}]  # fmt: skip
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = b'lang,source,target\nno,a \xc3\xa9,01\nNA,"x, y",b\n'
BOM = b"\xef\xbb\xbf"

FORMS = {
    "rows.jsonl": LINES,
    "bom.jsonl": BOM + LINES,
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "blank lines.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n\n"),
    "no end.jsonl": LINES.rstrip(),
    "part[1].jsonl": LINES,
    "what?*.jsonl": LINES,
    "rows.jsonl.gz": gzip.compress(LINES),
    "bom.jsonl.gz": gzip.compress(BOM + LINES),
    "two.jsonl.gz": b"".join(gzip.compress(line + b"\n") for line in LINES.splitlines()),
    "packed.jsonl": gzip.compress(LINES),
    "plain.jsonl.gz": LINES,
    "rows.csv": TABLE,
    "bom.csv": BOM + TABLE,
    "windows.csv": TABLE.replace(b"\n", b"\r\n"),
    "ROWS.CSV": TABLE,
    "rows.csv.gz": gzip.compress(TABLE),
    "rows.tsv": b"lang\tsource\ttarget\nno\ta \xc3\xa9\t01\nNA\tx, y\tb\n",
    "no ending": LINES,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    (file,) = find_files(name, tmp_path)
    assert find_files(str(tmp_path / name), Path("/elsewhere")) == [file]
    found = list(read_file(file))
    assert [record for _, record in found] == ROWS
    assert all(where.startswith(f"{file}:") for where, _ in found)


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert [record for _, record in read_file(tmp_path / "rows.parquet")] == ROWS
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"x" * 30)
    with pytest.raises(DataError, match=r"bad\.parquet: not readable as Parquet"):
        list(read_file(tmp_path / "bad.parquet"))


def test_a_csv_of_long_fields_and_lines_in_fields(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f'source,target\n"a\nb",{"x" * 300_000}\nc,d\n')
    (where, record), (after, _) = read_file(tmp_path / "a.csv")
    assert record["source"] == "a\nb" and len(record["target"]) == 300_000
    assert where.endswith(":3") and after.endswith(":4")
    assert csv.field_size_limit() == before


def test_patterns_and_the_files_that_are_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name in ("part[1].jsonl", "part1.jsonl", "b.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "folder.jsonl").mkdir()
    assert [p.name for p in find_files("part[1].jsonl", tmp_path)] == ["part[1].jsonl"]
    assert [p.name for p in find_files("part[12].jsonl", tmp_path)] == ["part1.jsonl"]
    assert [p.name for p in find_files("[ab].jsonl", tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert len(find_files("*.jsonl", tmp_path)) == len(find_files(f"{tmp_path}/*.jsonl", Path("/"))) == 4  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~/a.jsonl", Path("/elsewhere")) == [tmp_path / "a.jsonl"]
    assert len(find_files("~/*.jsonl", Path("/elsewhere"))) == 4
    for pattern, message in (
        ("c.jsonl", r"no file matches .*did you mean"),
        ("folder.jsonl", r"is a folder; name its files"),
        ("**x", "neither a file nor a pattern|no file matches"),
        ("x" * 5000, "cannot be read|no file"),
        ("a\0b", "neither a file nor a pattern|no file matches"),
    ):
        with pytest.raises(DataError, match=message):
            find_files(pattern, tmp_path)


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

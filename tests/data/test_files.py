"""Files of rows in every form that people have them in."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from flix.data.errors import DataError
from flix.data.files import Found, find_files, groups_of, read_file, read_jsonl

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
    found = list(read_file(file.path))
    assert [record for _, record in found] == ROWS
    assert all(where.startswith(f"{file.path}:") for where, _ in found)


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
    assert [f.path.name for f in find_files("part[1].jsonl", tmp_path)] == ["part[1].jsonl"]
    assert [f.path.name for f in find_files("part[12].jsonl", tmp_path)] == ["part1.jsonl"]
    assert [f.path.name for f in find_files("[ab].jsonl", tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert len(find_files("*.jsonl", tmp_path)) == len(find_files(f"{tmp_path}/*.jsonl", Path("/"))) == 4  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~/a.jsonl", Path("/elsewhere")) == [Found(tmp_path / "a.jsonl")]
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


def test_features_in_the_names_of_files(tmp_path: Path) -> None:
    for name in ("ner/hau.train.jsonl", "ner/swa.train.jsonl", "ner/hau.test.jsonl", "pos/hau.train.jsonl", "a/hau-hau.txt", "a/hau-swa.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)

    def found(pattern: str) -> list[tuple[str, dict[str, str]]]:
        files = find_files(pattern, tmp_path)
        return [(f.path.relative_to(tmp_path).as_posix(), dict(f.features)) for f in files]

    assert found("ner/{language}.train.jsonl") == [
        ("ner/hau.train.jsonl", {"language": "hau"}), ("ner/swa.train.jsonl", {"language": "swa"}),
    ]  # fmt: skip
    assert found("{task}/{language}.train.jsonl")[-1] == ("pos/hau.train.jsonl", {"task": "pos", "language": "hau"})  # fmt: skip
    assert found("n?[er]/{language}.t*.jsonl") == [
        (f"ner/{name}.jsonl", {"language": name[:3]}) for name in ("hau.test", "hau.train", "swa.train")
    ]  # fmt: skip
    assert len(found("**/{language}.train.jsonl")) == 3
    # The same group twice is one name.
    assert found("a/{language}-{language}.txt") == [("a/hau-hau.txt", {"language": "hau"})]
    # A file that is called so is itself.
    (tmp_path / "{language}.jsonl").write_bytes(LINES)
    assert found("{language}.jsonl") == [("{language}.jsonl", {})]
    assert groups_of("{a}/{b}-{a}.{1}") == ["a", "b"]
    with pytest.raises(DataError, match="no file matches"):
        find_files("ner/{language}.dev.jsonl", tmp_path)


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

"""What ``flix predict`` reads and writes: files, links, pipes, standard input and output; answers are made up here."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from flix.cli.app import app
from flix.cli.written import json_text, write_lines
from tests.helpers.training import run

MODULE = sys.modules["flix.cli.commands.predict"]  # as an attribute, it is the command
HALF = "\ud83d"


class Echo:
    """Answers every row with its source, and fails at the source "bad"."""

    asked: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        Echo.asked = []

    def __call__(self, records: Iterator[Any]) -> Iterator[dict[str, Any]]:
        from flix.data.errors import DataError

        for where, record, named in records:
            Echo.asked.append((where, named))
            if record["source"] == "bad":
                raise DataError(f"{where}: bad")
            yield {**record, "output": record["source"]}


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flix.tasks.prediction.Predictor", Echo)
    monkeypatch.chdir(tmp_path)


def predict(adapter: Path, *arguments: object, **more: Any) -> Any:
    return run(app, ["predict", str(adapter), *map(str, arguments)], **more)


def refused(adapter: Path, *arguments: object, **more: Any) -> str:
    result = predict(adapter, *arguments, **more)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return str(result.stderr)


def rows(file: Path, *sources: str) -> Path:
    file.write_text("".join(json.dumps({"source": source}) + "\n" for source in sources))
    return file


def test_a_file_that_is_read_is_not_written(adapter: Path, tmp_path: Path) -> None:
    given = rows(tmp_path / "rows.jsonl", "a", "b")
    before = given.read_bytes()
    (tmp_path / "link").symlink_to(given)
    os.link(given, tmp_path / "hard")
    for output in ("rows.jsonl", given, "link", "hard"):
        assert "is also read, as rows.jsonl; give the answers a file of their own" in refused(adapter, "rows.jsonl", "--output", output)  # fmt: skip
    assert "is also read" in refused(adapter, "link", "--output", given)
    rows(tmp_path / "other.jsonl", "c")
    assert "is also read, as rows.jsonl" in refused(adapter, "*.jsonl", "--output", given)
    assert given.read_bytes() == before


def test_standard_input_is_not_written_either(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    given = rows(tmp_path / "rows.jsonl", "a")
    monkeypatch.setattr(MODULE, "_standard_input", lambda: os.stat(given))
    assert "as standard input" in refused(adapter, "-", "--output", given, input="{}")
    assert given.stat().st_size


def test_a_run_that_fails_leaves_the_older_answers(adapter: Path, tmp_path: Path) -> None:
    given, output = rows(tmp_path / "rows.jsonl", "a", "bad"), tmp_path / "answers.jsonl"
    output.write_text("older")
    assert "rows.jsonl:2: bad" in refused(adapter, given, "--output", output)
    assert output.read_text() == "older"
    rows(given, "a", "b")
    assert predict(adapter, given, "--output", output).stdout == f"2 rows: {output}\n"
    assert [json.loads(line)["output"] for line in output.read_text().splitlines()] == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "answers.jsonl", "rows.jsonl"]
    # A link leads where it led.
    (tmp_path / "link").symlink_to(output)
    rows(given, "c")
    assert predict(adapter, given, "--output", "link").exit_code == 0
    assert (tmp_path / "link").is_symlink() and json.loads(output.read_text())["output"] == "c"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and /dev")
def test_pipes_devices_and_our_own_streams_are_written_directly(tmp_path: Path) -> None:
    assert write_lines(Path(os.devnull), ["a"]) == 1
    assert not Path(os.devnull).is_file()
    write = "import sys; from pathlib import Path; from flix.cli.written import write_lines; write_lines(Path(sys.argv[1]), ['a', 'é'])"  # fmt: skip

    def shell(line: str) -> bytes:
        whole = line.replace("WRITE", f'"{sys.executable}" -c "{write}"')
        return subprocess.run(["bash", "-c", whole], check=True, capture_output=True, cwd=tmp_path).stdout  # fmt: skip

    assert shell("WRITE /dev/stdout | cat") == "a\né\n".encode()
    assert shell("WRITE >(cat)") == "a\né\n".encode()
    shell("echo before > out; WRITE /dev/stdout >> out; WRITE /dev/fd/3 3>> out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "before\na\né\na\né\n"


def test_json_is_json() -> None:
    inner = {"a": [math.inf, -math.inf, math.nan, 1.5], "é": HALF, "\U0001f600": None}
    assert json_text(inner) == '{"a": [null, null, null, 1.5], "é": "\\ud83d", "\U0001f600": null}'
    assert json_text(inner, encoding="ascii").isascii()
    assert json.loads(json_text(inner, encoding="latin-1")) == json.loads(json_text(inner))
    json_text(inner).encode()
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    said = [moment, moment.date(), moment.time(), datetime.timedelta(seconds=90), decimal.Decimal("1.50")]  # fmt: skip
    assert json_text(said) == '["2026-01-02T03:04:05+00:00", "2026-01-02", "03:04:05", "0:01:30", "1.50"]'  # fmt: skip
    with pytest.raises(TypeError, match="bytes is not JSON"):
        json_text([b""])


def test_what_is_written_can_be_read(adapter: Path, tmp_path: Path) -> None:
    row = '{"source": "é", "n": 1e400, "half": "\\ud83d"}\n'
    wanted = {"source": "é", "n": None, "half": HALF, "output": "é"}
    (tmp_path / "rows.jsonl").write_text(row, encoding="utf-8")
    assert json.loads(predict(adapter, "rows.jsonl").stdout_bytes.decode("utf-8")) == wanted
    assert predict(adapter, "rows.jsonl", "--output", "out").exit_code == 0
    assert json.loads((tmp_path / "out").read_bytes().decode("utf-8")) == wanted


def test_standard_output_that_is_no_utf_8_gets_escapes(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(MODULE, "output_encoding", lambda: "ascii")
    rows(tmp_path / "rows.jsonl", "é")
    found = predict(adapter, "rows.jsonl").stdout
    assert found.isascii() and json.loads(found)["output"] == "é"


def test_standard_input_is_read_as_files_are(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    text = '{"source": "é"}\n'.encode()
    for given in (text, b"\xef\xbb\xbf" + text):
        result = CliRunner(charset="latin-1").invoke(
            app, ["predict", str(adapter), "-"], input=given
        )
        assert json.loads(result.stdout)["output"] == "é"
    assert refused(adapter, "-", input=b'{"source": "\xe9"}\n') == (
        "flix: error: standard input: not UTF-8 text (invalid continuation byte)\n"
    )

    class Closed:
        stdin, stdout = None, sys.stdout

    monkeypatch.setattr(MODULE, "sys", Closed)
    assert "standard input is closed" in refused(adapter, "-")


def test_a_column_that_cannot_be_written_is_refused_before_anything_is_answered(adapter: Path, tmp_path: Path) -> None:  # fmt: skip
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day = datetime.datetime(2026, 1, 2)
    parquet.write_table(pa.table({"source": ["a"], "day": [day], "cost": [decimal.Decimal("1.50")]}), "d.parquet")  # fmt: skip
    found = json.loads(predict(adapter, "d.parquet").stdout)
    assert found == {"source": "a", "day": "2026-01-02T00:00:00", "cost": "1.50", "output": "a"}
    parquet.write_table(pa.table({"source": ["a"], "picture": [b"\x00"]}), "b.parquet")
    said = refused(adapter, "b.parquet")
    assert "b.parquet row 0: column 'picture' cannot be written as JSON (bytes is not JSON)" in said
    assert Echo.asked == []


def test_names_of_files_give_features(adapter: Path, tmp_path: Path) -> None:
    for name in ("hau", "swa"):
        rows(tmp_path / f"{name}.jsonl", name)
    assert predict(adapter, "{language}.jsonl", "--features", "task=ner").exit_code == 0
    assert Echo.asked == [("hau.jsonl:1", {"language": "hau"}), ("swa.jsonl:1", {"language": "swa"})]  # fmt: skip
    assert predict(adapter, "hau.jsonl").exit_code == 0 and Echo.asked == [("hau.jsonl:1", {})]
    said = refused(adapter, "{language}.jsonl", "--features", "language=hau")
    assert "the files' names give the language, and so does --features" in said
    said = refused(adapter, "{langage}.jsonl")
    assert "has no group 'langage' (did you mean 'language'?)" in said and "language, task" in said


def test_an_interruption_says_so(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Echo, "__call__", stop)
    rows(tmp_path / "rows.jsonl", "a")
    result = predict(adapter, "rows.jsonl")
    assert result.exit_code == 130 and result.stderr == "flix: interrupted\n"

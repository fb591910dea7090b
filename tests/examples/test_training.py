"""The example configuration trains."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from flix.cli.app import app
from tests.helpers.training import run


def last_row(output: str, name: str) -> str:
    return next(line for line in output.splitlines() if line.startswith(name))


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.setattr("sys.argv", ["make_tiny.py", "--out", str(tmp_path / "tiny")])
    runpy.run_path(str(examples / "make_tiny.py"), run_name="__main__")
    text = (examples / "train.yaml").read_text()
    for long, short in (("steps: 60", "steps: 4"), ("max_new_tokens: 24", "max_new_tokens: 4")):
        assert long in text
        text = text.replace(long, short)
    (tmp_path / "train.yaml").write_text(text)
    result = run(app, ["train", str(tmp_path / "train.yaml")])
    assert result.exit_code == 0, result.output
    assert last_row(result.stdout, "average, held out").split()[3:6] == [
        "seq2seq",
        "2",
        "exact_match",
    ]
    assert (tmp_path / "tiny" / "run" / "report.html").is_file()

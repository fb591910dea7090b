"""Standard output that nobody takes: closed by its reader, full, closed from the start, without the letters."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import flix
from flix.cli import main
from flix.cli.app import app
from flix.core.adapter.adapter import LayerShape
from tests.helpers.runs import similar_adapter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes as POSIX has them")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose table is longer than a pipe holds; one of its features was never trained."""
    registry = flix.FeatureRegistry({"language": [f"é{i}" for i in range(3000)]})
    made = flix.FlixConfig(registry=registry, ranks=1)
    tensors = {}
    for number, (group, name) in enumerate(registry.features):
        tensors[f"a.A.{group}.{name}"] = np.ones((1, 4), "f4")
        tensors[f"a.B.{group}.{name}"] = np.full((4, 1), min(number, 1), "f4")
    folder = tmp_path_factory.mktemp("large") / "adapter"
    flix.save_adapter(flix.Adapter(made, {"a": LayerShape(d_in=4, d_out=4)}, tensors), folder)
    return folder


def flix_with(*arguments: object, out: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a shell that does with its standard output what ``out`` says."""
    command = f'"{sys.executable}" -m flix.cli {" ".join(map(str, arguments))} {out}'
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; {command}; echo "codes ${{PIPESTATUS[*]}}" >&2'],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("command", ["inspect FOLDER", "inspect FOLDER --json", "inspect FOLDER --layers"])  # fmt: skip
@pytest.mark.parametrize("reader", ["| head -1", "| true"])
def test_a_reader_that_goes_away_is_no_error(large: Path, command: str, reader: str) -> None:
    result = flix_with(command.replace("FOLDER", str(large)), out=reader)
    assert result.stderr == "codes 0 0\n"


@pytest.mark.parametrize("command", ["backends", "--help", "--version", "train --help"])
def test_small_outputs_to_a_reader_that_is_gone(command: str) -> None:
    result = flix_with(command, out="| true")
    assert "Traceback" not in result.stderr and "ignored" not in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("command", ["inspect FOLDER", "backends --json", "--help", "--version"])
def test_a_full_output_is_one_line(large: Path, command: str) -> None:
    result = flix_with(command.replace("FOLDER", str(large)), out="> /dev/full")
    assert result.stderr == "flix: error: standard output: No space left on device\ncodes 2\n"


def test_an_output_that_was_closed_from_the_start(large: Path) -> None:
    for command in ("backends", f"inspect {large} --json"):
        assert flix_with(command, out=">&-").stderr == "codes 0\n"


def test_letters_that_the_output_lacks(large: Path, tmp_path: Path) -> None:
    text = flix_with(f"inspect {large}", out="", PYTHONIOENCODING="ascii")
    assert text.stderr == "codes 0\n" and r"language=\xe97" in text.stdout
    data = json.loads(flix_with(f"inspect {large} --json", out="", PYTHONIOENCODING="ascii").stdout)
    assert data["features"][7]["feature"] == "é7"
    assert data["features"][1]["norm"] == 4.0 and data["never_trained"] == ["language=é0"]
    odd = flix_with("inspect", shlex.quote(str(tmp_path / "d'é")), out="", PYTHONIOENCODING="ascii")
    assert odd.stderr.startswith("flix: error: ") and odd.stderr.endswith("\ncodes 2\n")
    assert r"d'\xe9" in odd.stderr and odd.stderr.count("\n") == 2


def test_json_holds_no_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    from flix.cli.console import show_json

    show_json({"a": [float("nan"), (1.5, {"b": float("-inf")})], "c": 3})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, [1.5, {"b": None}]],
        "c": 3,
    }


def test_training_goes_on_when_nobody_reads(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(training={"steps": 2, "log_every": 1})
    result = flix_with("train", path, out="| true")
    # What libraries say as they are imported is their own affair.
    said = [line for line in result.stderr.splitlines() if line.startswith(("flix", "codes"))]
    assert said == ["flix: nobody reads the output any more; the work continues", "codes 0 0"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]["steps"] == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "No such command 'trian'"),
        ("plan", "Missing argument 'CONFIG'; see"),
        ("plan a b", "unexpected extra argument"),
        ("quickstart --steps x", "Invalid value for '--steps'"),
        ("quickstart --seeds 99999999999999999999", "Invalid value for '--seeds'"),
        ("plan a --batch-size 0", "Invalid value for '--batch-size'"),
        ("share a --nope", "No such option"),
    ],
)
def test_mistakes_in_arguments_are_one_line(command: str, message: str) -> None:
    result = flix_with(command, out="")
    assert result.stdout == "" and result.stderr.endswith("\ncodes 2\n")
    line = result.stderr.removesuffix("codes 2\n")
    assert line.startswith("flix: error: ") and message in line and line.count("\n") == 1


def test_no_arguments_show_the_help() -> None:
    result = flix_with(out="")
    assert "Commands" in result.stdout + result.stderr and "codes 2" in result.stderr


def test_warnings_are_one_line(large: Path, tmp_path: Path) -> None:
    registry = flix.FeatureRegistry({"language": ["eng", "hau"]})
    made = flix.FlixConfig(registry=registry, ranks=1)
    tensors = {f"a.{p}.language.{n}": np.ones(s, "f4") for n in ("eng", "hau") for p, s in (("A", (1, 4)), ("B", (4, 1)))}  # fmt: skip
    adapter = flix.Adapter(made, {"a": LayerShape(d_in=4, d_out=4)}, tensors)
    with pytest.warns(UserWarning):
        flix.save_adapter(flix.rename_feature(adapter, "language", "hau", "Eng"), tmp_path / "two")
    result = flix_with("inspect", tmp_path / "two", out="")
    warned = "flix: warning: group 'language': 'eng' and 'Eng' differ only in case"
    assert result.stderr.startswith(warned) and result.stderr.count("\n") == 2


def test_tables_fit_80_columns_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    languages = [f"language {i} of many" for i in range(12)]
    adapter = similar_adapter(languages, ["ner", "pos"])
    flix.save_adapter(adapter, "many")
    for command in (["inspect", "--layers"], ["plan"], ["plan", "--explain"]):
        shown = CliRunner().invoke(app, [command[0], "many", *command[1:]]).stdout
        assert shown and max(map(len, shown.splitlines())) <= 80, command
        if "--layers" in command:
            assert all(f"language={name}" in shown for name in languages)
            assert shown.count("encoder.block.1.v ") > 1


@pytest.mark.parametrize("where", ["imports", "arguments"])
def test_ctrl_c_before_a_command_runs_is_one_line(monkeypatch, capsys, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt if where == "imports" else typer.Abort

    monkeypatch.setattr("flix.cli.app.app", interrupted)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err == "flix: interrupted\n"

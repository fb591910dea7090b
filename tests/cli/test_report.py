"""``flix report``: what it says, and its message for every wrong value."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flix.cli import main
from flix.cli.app import app
from tests.helpers.runs import make_run

run = CliRunner().invoke


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def refused(*arguments: object) -> str:
    result = run(app, ["report", *map(str, arguments)])
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert result.stderr.startswith("flix: error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""
    return str(result.stderr)


def test_the_sentences_and_the_page_are_told(made: Path) -> None:
    (made / "log.jsonl").unlink()
    result = run(app, ["report", str(made)])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Worst cell: ") and any(line.startswith("Command: ") for line in lines)  # fmt: skip
    assert "not on the page: Learning curves: there is no log.jsonl." in lines
    assert lines[-1].startswith(f"report: {made / 'report.html'} (")


def test_json_has_the_same(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "x.html"
    other = make_run(tmp_path / "other")
    options = ["--rows", "task", "--columns", "language", "--out", str(out), "--json"]
    result = run(app, ["report", str(made), str(other), *options])
    data = json.loads(result.stdout)
    assert data["out"] == str(out) and data["bytes"] == out.stat().st_size
    assert data["missing"] == [] and data["short"][0].startswith("run against other: ")
    assert "task \\ language" in out.read_text()


def test_wrong_runs(made: Path, tmp_path: Path) -> None:
    assert f"there is no run '{tmp_path / 'none'}'" in refused(tmp_path / "none")
    assert "is an adapter; give the run's folder" in refused(made / "adapter")
    assert "a run is a folder, but" in refused(made / "config.yaml")
    assert "is given twice" in refused(made, made)
    (made / "metrics.json").write_text("{")
    assert "metrics.json of" in refused(made)


def test_wrong_groups(made: Path) -> None:
    assert "--rows: no cell names the group 'langage' (did you mean 'language'?)" in refused(made, "--rows", "langage")  # fmt: skip
    assert "--columns: no cell names the group 'domain'; the groups are: language, task" in refused(made, "--columns", "domain")  # fmt: skip
    assert "--rows and --columns must be two groups" in refused(made, "--rows", "task", "--columns", "task")  # fmt: skip


def test_wrong_places(made: Path, tmp_path: Path) -> None:
    assert "--out must be a file" in refused(made, "--out", tmp_path)
    (tmp_path / "notes").write_text("mine")
    message = refused(made, "--out", tmp_path / "notes")
    assert "is not a flix report; --force overwrites it" in message
    assert run(app, ["report", str(made), "--out", str(tmp_path / "notes"), "--force"]).exit_code == 0  # fmt: skip
    refused(made, "--out", tmp_path / "notes" / "x.html")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "adapter/flix.safetensors"])
def test_a_page_never_overwrites_what_it_is_about(made: Path, name: str) -> None:
    file = made / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    before = file.read_bytes()
    for force in ([], ["--force"]):
        assert "belongs to what the page is about" in refused(made, "--out", file, *force)
    assert file.read_bytes() == before
    (made / "report.html").write_text("mine")
    assert "--force overwrites it" in refused(made)
    assert run(app, ["report", str(made), "--force"]).exit_code == 0


def test_no_run_and_unknown_options(made: Path, monkeypatch, capsys) -> None:
    for arguments, said in (
        ([], "Missing argument 'RUN'; see "),
        ([str(made), "--row", "task"], "No such option: --row"),
        ([str(made), "--out"], "Option '--out' requires an argument"),
    ):
        monkeypatch.setattr(sys, "argv", ["flix", "report", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        error = capsys.readouterr().err
        assert end.value.code == 2 and said in error and error.count("\n") == 1


def test_no_framework_is_loaded_and_a_missing_library_is_named(made: Path) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['flix', 'report', {!r}]\n"
        "for name in {!r}: sys.modules[name] = None\n"
        "from flix.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == {}, end.code\n"
    )
    frameworks = ("torch", "transformers", "datasets", "jax", "tensorflow", "keras", "sacrebleu")
    for gone, rc in ((frameworks, 0), (("jinja2",), 2), (("matplotlib",), 2)):
        result = subprocess.run([sys.executable, "-c", code.format(str(made), gone, rc)], capture_output=True, text=True, timeout=60)  # fmt: skip
        assert result.returncode == 0, result.stderr
        if rc:
            assert gone[0] in result.stderr and 'pip install "flix-peft[report]"' in result.stderr


def test_training_ends_with_a_page_which_can_be_left_out_and_loses_no_run(
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(training={"steps": 2})
    page = path.parent / "run" / "report.html"
    data = json.loads(run(app, ["train", str(path), "--no-report", "--json"]).stdout)
    assert data["report"] is None and not page.exists()
    data = json.loads(run(app, ["train", str(path), "--overwrite", "--json"]).stdout)
    assert data["report"] == str(page) and "Worst cell: " in page.read_text()
    result = run(app, ["train", str(path), "--overwrite"])
    assert result.stdout.splitlines()[-1] == f"report: {page}"
    page.write_text("notes of mine")
    result = run(app, ["train", str(path), "--overwrite"])
    assert result.exit_code == 0 and page.read_text() == "notes of mine"
    assert "note: no report was written: --out: " in result.stdout

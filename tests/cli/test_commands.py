"""The commands that need no framework, and what every command does with a user's mistake."""

from __future__ import annotations

import json
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
from flix.cli.app import COMMANDS, app
from flix.cli.commands.quickstart import check_place
from flix.cli.features import parse_features
from flix.core.adapter.composition import delta
from flix.core.adapter.files import save_adapter

run = CliRunner().invoke

HEAVY = "('torch', 'transformers', 'jax', 'tensorflow', 'datasets')"


def in_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``flix`` in a fresh interpreter, after some code."""
    script = f"import sys\nsys.argv = ['flix', *{list(arguments)!r}]\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("arguments", [["--help"], ["backends"], ["train", "--help"], ["inspect"]])
def test_light_commands_load_no_framework(arguments: list[str], adapter: Path) -> None:
    if arguments == ["inspect"]:
        arguments = ["inspect", str(adapter)]
    code = f"""
from flix.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in {HEAVY} if name in sys.modules]
assert not loaded, loaded
"""
    result = in_process(code, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_module_runs(adapter: Path) -> None:
    command = [sys.executable, "-m", "flix.cli", "inspect", str(adapter / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("flix: error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("typer", ["backends"], "flix-peft[cli]"),
        ("yaml", ["plan", "CONFIG"], "flix-peft[cli]"),
        ("pydantic", ["train", "CONFIG"], "flix-peft[cli]"),
        ("torch", ["train", "CONFIG"], "flix-peft[train]"),
        ("sacrebleu", ["train", "CONFIG"], "flix-peft[train]"),
        ("transformers", ["train", "CONFIG"], "flix-peft[train]"),
    ],
)
def test_a_missing_package_is_one_line(
    package: str, arguments: list[str], extra: str, config: Callable[..., Path]
) -> None:
    path = str(config())
    code = f"sys.modules[{package!r}] = None\nfrom flix.cli import main\nmain()"
    result = in_process(code, *(path if a == "CONFIG" else a for a in arguments))
    assert result.returncode == 2, result.stderr
    assert extra in result.stderr and package in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_backends() -> None:
    result = run(app, ["backends", "--json"])
    found = {entry["backend"]: entry for entry in json.loads(result.stdout)}
    assert found["torch"]["installed"] and found["torch"]["version"].startswith("2.")
    assert "torch" in run(app, ["backends"]).stdout


@pytest.mark.parametrize("command, example", COMMANDS, ids=[c.__name__ for c, _ in COMMANDS])
def test_each_command_has_a_file_and_an_example_that_parses(command, example) -> None:
    assert command.__module__ == f"flix.cli.commands.{command.__name__}"
    _, name, *arguments = shlex.split(example)
    parser = typer.main.get_command(app).commands[name]
    parser.make_context(name, arguments)  # raises for what the command does not take
    shown = " ".join(run(app, [name, "--help"]).stdout.split())
    assert f"Example: {example}" in shown


def test_shells_complete_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the script that ``flix --install-completion`` sets up asks."""
    for name, value in (("_FLIX_COMPLETE", "complete_bash"), ("COMP_WORDS", "flix ins"), ("COMP_CWORD", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert in_process("from flix.cli import main; main()").stdout.split() == ["inspect"]


def test_inspect_check_names_what_is_not_finite(adapter: Path, tmp_path: Path) -> None:
    assert "all values are finite" in run(app, ["inspect", str(adapter), "--check"]).stdout
    held = flix.load_adapter(adapter)
    name = sorted(held.tensors)[0]
    held.tensors[name][:] = float("nan")
    save_adapter(held, tmp_path / "broken")
    result = run(app, ["inspect", str(tmp_path / "broken"), "--check"])
    assert (
        result.exit_code == 1
        and "NaN or infinite in layer" in result.stdout
        and len(result.stdout.splitlines()) == 1
    )
    found = json.loads(run(app, ["inspect", str(tmp_path / "broken"), "--check", "--json"]).stdout)
    assert len(found["not_finite"]) == 1


def test_inspect(adapter: Path) -> None:
    result = run(app, ["inspect", str(adapter), "--json"])
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    loaded = flix.load_adapter(adapter)
    assert data["parameters"] == sum(t.size for t in loaded.tensors.values())
    for entry in data["features"]:
        active = (((entry["group"], entry["feature"]), 1.0),)
        for layer, norm in entry["norms"].items():
            assert norm == pytest.approx(np.linalg.norm(delta(loaded, layer, active)), rel=1e-6)
        assert entry["norm"] == pytest.approx(sum(n * n for n in entry["norms"].values()) ** 0.5)
    assert data["features"][1]["implies"] == ["task=ner"]
    text = run(app, ["inspect", str(adapter), "--layers"]).stdout
    assert "language=swa" in text and "norm of update" in text and "linear" in text


def test_plan_of_an_adapter(adapter: Path) -> None:
    whole = run(app, ["plan", str(adapter), "--json"])
    alone = run(app, ["plan", str(adapter / "flix_config.json"), "--json"])
    data = json.loads(whole.stdout)
    assert json.loads(alone.stdout) == data and data["datasets_known"] is False
    assert data["mixture"]["rank"] == 5 and data["parameter_matched_lora"]["rank"] == 7
    text = run(app, ["plan", str(adapter)]).stdout
    assert "LoRA, compute-matched" in text and "datasets unknown" in text


def test_plan_explains_strategies(adapter: Path) -> None:
    command = ["plan", str(adapter), "--explain", "--batch-size", "8", "--length", "1"]
    data = json.loads(run(app, [*command, "--json"]).stdout)
    assert data["strategies"] and "strategies" not in json.loads(
        run(app, ["plan", str(adapter), "--json"]).stdout
    )
    for choice in data["strategies"]:
        assert choice["strategy"] in ("gather", "masked")
        assert "gather is faster" in choice["reason"] and choice["rows"] <= choice["union"]
    text = run(app, command).stdout
    assert "gather is faster" in " ".join(text.split()) and "measured on torch-cpu: 20" in text
    other = run(app, [*command, "--device", "jax-gpu"])
    assert other.exit_code == 0 and "measured on jax-cpu: 20" in other.stdout
    unknown = run(app, ["plan", str(adapter), "--explain", "--device", "abacus"])
    assert unknown.exit_code == 2 and "nothing was measured on 'abacus'" in unknown.stderr


def test_plan_of_a_configuration(config: Callable[..., Path]) -> None:
    result = run(app, ["plan", str(config()), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["mixture"]["rank"] == 5 and data["parameter_matched_lora"]["rank"] == 11
    assert data["mixture"]["parameters"] == data["parameter_matched_lora"]["parameters"]
    assert data["datasets"] == 8 and data["layers"] == 16
    assert "largest of 8 trained combinations" in run(app, ["plan", str(config())]).stdout


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["language=hau,task=ner"], {"language": "hau", "task": "ner"}),
        (["language=hau", "task=ner"], {"language": "hau", "task": "ner"}),
        (["language=hau+swa"], {"language": {"hau": 1.0, "swa": 1.0}}),
        (["language = hau:0.25+swa:.75"], {"language": {"hau": 0.25, "swa": 0.75}}),
        (["task=a:b+c"], {"task": "a:b+c"}),
        (["task=a:b+c:0.5"], None),
        (["a=b=c,d"], {"a=b": "c,d"}),
        (["a=b=c,d", "task=ner"], {"a=b": "c,d", "task": "ner"}),
        (["a=b=e:2"], {"a=b": {"e": 2.0}}),
    ],
)
def test_features_option(texts: list[str], wanted: object) -> None:
    registry = flix.FeatureRegistry(
        {"language": ["hau", "swa"], "task": ["ner", "a:b+c"], "a=b": ["c,d", "e"]}
    )
    if wanted is None:
        with pytest.raises(flix.FeatureError):
            parse_features(texts, registry)
    else:
        assert parse_features(texts, registry) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("language", "not of the form group=name"),
        ("language:hau", "write 'language=hau'"),
        ("language=h\u200bau", "U+200B (ZERO WIDTH SPACE)"),
        ("langage=hau", "did you mean 'language'?"),
        ("language=hua", "did you mean 'hau'?"),
        ("language=hau:x", "must be a number"),
        ("language=hau:nan", "finite"),
        ("language=hau,language=swa", "given twice"),
        (",", "names no feature"),
    ],
)
def test_feature_mistakes_end_with_2(
    adapter: Path, text: str, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["merge", str(adapter), "--base", "x", "--features", text, "--out", str(out)]
    result = run(app, arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    assert result.stderr.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, "unknown key 'sede' (did you mean 'seed'?)"),
        ({"model": "./none"}, "no model folder"),
        ({"kind": "causal"}, "is seq2seq, not causal; say kind: seq2seq"),
        ({"target_modules": ["qq"]}, "'qq' matches no layer"),
        ({"ranks": {"rule": "by_group", "language": 1}}, "must cover every feature"),
        ({"ranks": {"rule": "parameter_matched", "lora_rank": 2}}, "smallest feasible"),
        ({"held_out": [{"language": "zul"}]}, "held_out[0]"),
        ({"implies": {"task": "shared=all"}}, "group=name"),
    ],
)
def test_configuration_mistakes_end_with_2(
    config: Callable[..., Path], changes: dict[str, object], message: str
) -> None:
    for command in ("plan", "train"):
        result = run(app, [command, str(config(**changes))])
        assert result.exit_code == 2, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_folder_without_a_model(config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(app, ["train", str(config(model="t5", tokenizer="empty"))])
    assert result.exit_code == 2 and "no tokenizer in" in result.stderr


def test_unknown_command_and_missing_argument() -> None:
    result = run(app, ["trian"])
    assert result.exit_code == 2 and "trian" in result.stderr
    assert run(app, ["train"]).exit_code == 2
    assert run(app, ["--version"]).stdout.strip() == f"flix {flix.__version__}"


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_quickstart_overwrites_nothing_but_its_own(tmp_path: Path, name: str) -> None:
    check_place(tmp_path / "none")
    (tmp_path / "results.json").write_text('{"arms": {}, "sources": {}}')
    check_place(tmp_path)
    (tmp_path / name).write_text("mine")
    result = CliRunner().invoke(app, ["quickstart", "--out", str(tmp_path)])
    assert result.exit_code == 2 and f"did not write '{tmp_path / name}'" in result.stderr
    assert (tmp_path / name).read_text() == "mine"


def test_quickstart_hands_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import types

    seen: dict[str, object] = {}
    module = types.ModuleType("flix.quickstart.run")
    module.main = lambda **kwargs: seen.update(kwargs) or 3  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "flix.quickstart.run", module)
    arguments = [
        "quickstart",
        "--seeds",
        "2",
        "--fast",
        "--json",
        "--out",
        str(tmp_path),
        "--steps",
        "7",
    ]
    assert run(app, arguments).exit_code == 3
    assert seen == {"seeds": 2, "fast": True, "as_json": True, "out": tmp_path, "steps": 7}

"""``flix plan`` with ``[cli]`` alone: rows and layers are those that training finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flix.cli import counting
from flix.cli.app import app
from flix.cli.counting import checkpoint_layers
from flix.core.adapter.adapter import LayerShape
from flix.core.errors import ConfigError, FlixError, TargetError
from tests.helpers.training import ok

Write = Callable[..., Path]


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "lacking", lambda: ["torch"])


def without_notes(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "notes"}


RANKS: list[Any] = [
    {"rule": "by_group", "language": 1, "task": 2, "shared": 2},
    {"rule": "proportional", "budget": 60},
    {"rule": "compute_matched", "lora_rank": 12},
]


@pytest.mark.parametrize("ranks", RANKS, ids=[r["rule"] for r in RANKS])
@pytest.mark.parametrize("model", ["t5", "llama", "gpt2"])
def test_the_plan_is_that_of_training(config: Write, monkeypatch: pytest.MonkeyPatch, model: str, ranks: Any) -> None:  # fmt: skip
    path = config(model, ranks=ranks)
    whole = ok("plan", path)
    alone(monkeypatch)
    found = ok("plan", path)
    assert without_notes(found) == without_notes(whole)
    assert found["notes"][0].startswith("torch not installed: rows are counted")


def test_targets_features_of_evaluation_and_rows_held_back_count(
    config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config("t5", target_modules=["q", "v"], exclude_modules=[])
    settings = yaml.safe_load(path.read_text())
    (tmp_path / "zul.jsonl").write_text(
        '{"lang": "zul", "source": "a", "target": "b"}\n' * 3, encoding="utf-8"
    )
    settings["datasets"][0]["eval_files"] = "zul.jsonl"
    settings["datasets"][1]["limit"] = 20
    settings["datasets"][2]["eval_rows"] = 11
    settings["ranks"] = {"rule": "proportional", "budget": 200, "temperature": 1}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    whole = ok("plan", path)
    alone(monkeypatch)
    found = ok("plan", path)
    assert without_notes(found) == without_notes(whole)
    assert "zul" in json.dumps(found["features"]) and "language=zul" in found["notes"][-1]


GONE = (
    "torch", "transformers", "datasets", "accelerate", "jax", "tensorflow", "sacrebleu", "pyarrow", "huggingface_hub",
    "matplotlib", "jinja2",
)  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "init"])
def test_it_runs_where_nothing_else_can_be_imported(config: Write, data: Path, command: str) -> None:  # fmt: skip
    path = config("t5")
    (path.parent / "ner.jsonl").write_bytes((data / "ner.jsonl").read_bytes())
    arguments = ["plan", path.name] if command == "plan" else ["init", "ner.jsonl", "--out", "new.yaml"]  # fmt: skip
    code = (
        f"import sys\nfor name in {GONE!r}: sys.modules[name] = None\n"
        f"sys.argv = ['flix', *{arguments!r}]\n"
        "from flix.cli import main\nmain()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=path.parent
    )
    assert result.returncode == 0, result.stderr
    if command == "plan":
        assert "note: datasets, torch, transformers not installed" in result.stdout
        assert "LoRA, compute-matched" in result.stdout
    assert max(len(x) for x in result.stdout.splitlines() if not x.startswith("note: ")) <= 80


def test_ranks_are_shown_where_the_model_is_elsewhere(config: Write, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = config("some/model")
    alone(monkeypatch)
    found = ok("plan", path)
    assert "parameters and FLOPs are not known: the model '" in found["notes"][1]
    assert found["layers"] is None and found["mixture"]["rank"] == 5
    whole = ok("plan", config("t5"))
    assert [(f["feature"], f["rank"]) for f in found["features"]] == [(f["feature"], f["rank"]) for f in whole["features"]]  # fmt: skip
    shown = CliRunner().invoke(app, ["plan", str(config("some/model"))]).stdout
    assert "most active rank of 8 trained combinations: 5" in shown and "task=ner" in shown


def test_what_training_refuses_is_refused(config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    for changes, said in (
        ({"held_out": [{"language": "yor", "task": "rex"}]}, "held_out[0]"),
        ({"held_out": [{"language": n} for n in ("hau", "swa", "yor")]}, "nothing is left to train on"),
        ({"target_modules": ["nothing"]}, "'nothing' matches no layer"),
        ({"datasets": [{"hub": "a/b", "features": {"task": "x"}}]}, "the data set 'a/b' is read with the package datasets"),
        ({"datasets": [{"files": "none.jsonl", "features": {"task": "x"}}]}, "no file matches"),
    ):  # fmt: skip
        result = CliRunner().invoke(app, ["plan", str(config("t5", **changes))])
        assert result.exit_code == 2 and said in result.stderr, (changes, result.output)
    path = config("t5")
    result = CliRunner().invoke(app, ["plan", str(path), "--explain"])
    assert "--explain needs the model itself, but torch is not installed" in result.stderr
    settings = yaml.safe_load(path.read_text())
    settings["datasets"][0].update(eval_rows=500)
    path.write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["plan", str(path)])
    assert "too few to hold back eval_rows=500" in result.stderr
    settings["datasets"][0].update(eval_rows=0, feature_columns={"language": "lung"})
    path.write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["plan", str(path)])
    assert "ner.jsonl:1: no column 'lung', which names the language" in result.stderr


def test_checkpoints_that_tell_no_layers_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:  # fmt: skip
    def layers(folder: Path, **more: Any) -> dict[str, LayerShape]:
        return checkpoint_layers(folder, **{"targets": "all-linear", "excluded": [], "headed": False, **more})  # fmt: skip

    assert all(shape.kind == "linear" for shape in layers(models["t5"]).values())
    assert "shared" in layers(models["t5"], targets=["shared"])
    with pytest.raises(TargetError, match="matches no layer"):
        layers(models["t5"], targets=["nothing"])
    with pytest.raises(ConfigError, match="is not a local folder"):
        layers(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors"):
        layers(tmp_path)
    file = tmp_path / "model.safetensors"
    for data, said in (
        (b"", "damaged: its header has 0 bytes"),
        (b"\xff" * 20, "damaged: its header has"),
        ((2).to_bytes(8, "little") + b"[]", "holds no object"),
        ((2).to_bytes(8, "little") + b"{x", "is damaged"),
        ((16).to_bytes(8, "little") + b'{"a.weight": {}}', "'a.weight' has no shape"),
    ):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=said):
            layers(tmp_path)
    for shape, dtype, said in (([2, 3, 4], "F32", "3 axes, as experts have"), ([4, 4], "U8", r"is packed \(U8\)")):  # fmt: skip
        header = json.dumps({"a.weight": {"dtype": dtype, "shape": shape}}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(FlixError, match=said):
            layers(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "gone.safetensors"}}')  # fmt: skip
    with pytest.raises(FlixError, match="is packed"):  # the whole file counts, as in transformers
        layers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        layers(tmp_path)

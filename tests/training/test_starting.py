"""Runs that start from an adapter: what it knew stays, what is new is learned, what cannot be right is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import flix
from flix.cli.app import app
from tests.helpers.training import TASKS, Write, ok, run, weights_of

SMALL = {"training": {"steps": 4}, "evaluation": {"at_end": False}}


def only(data: Path, folder: Path, *languages: str) -> list[dict[str, Any]]:
    """Data sets of some languages alone."""
    found = []
    for task in TASKS:
        lines = (data / f"{task}.jsonl").read_text().splitlines()
        file = folder / f"{task}-{'-'.join(languages)}.jsonl"
        file.write_text(
            "".join(f"{line}\n" for line in lines if json.loads(line)["lang"] in languages)
        )
        found.append(
            {
                "files": str(file), "features": {"task": task}, "feature_columns": {"language": "lang"},
                "prompt": "{task}: {source}",
            }
        )  # fmt: skip
    return found


@pytest.fixture
def first(config: Write, data: Path, tmp_path: Path) -> Path:
    """The folder of a run over two languages."""
    ok("train", config(name="first.yaml", output="first", datasets=only(data, tmp_path, "hau", "swa"), held_out=[], **SMALL))  # fmt: skip
    return tmp_path / "first"


def second(config: Write, data: Path, folder: Path, **more: Any) -> Path:
    """A configuration that adds a language to it."""
    given = {"datasets": only(data, folder, "yor"), "held_out": [], "start_from": "first", "output": "second", **SMALL, **more}  # fmt: skip
    return config(name="second.yaml", **given)


def tensors(folder: Path) -> dict[str, Any]:
    return dict(flix.load_adapter(folder / "adapter").tensors)


def test_a_language_joins_and_the_others_keep_every_bit(config: Write, data: Path, tmp_path: Path, first: Path) -> None:  # fmt: skip
    result = run(app, ["train", str(second(config, data, tmp_path, freeze_start=True))])
    assert result.exit_code == 0, result.stderr
    assert "never trained" not in result.stderr + result.stdout
    before, after = tensors(first), tensors(tmp_path / "second")
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    new = {name for name in after if name not in before}
    assert new and all(".language.yor" in name for name in new)
    assert any(after[name].any() for name in new if ".B." in name)
    # The recipe knows what both runs trained on, so answers to the first run's rows are the same.
    recipe = json.loads((tmp_path / "second/adapter/recipe.json").read_text())
    assert {"task=ner,language=hau", "task=ner,language=yor"} <= {",".join(sorted(c.split(","), reverse=True)) for c in recipe["seen"]}  # fmt: skip
    row = json.dumps({"task": "ner", "lang": "swa", "source": "maji 3"}) + "\n"
    told = [run(app, ["predict", str(tmp_path / name / "adapter"), "-"], input=row) for name in ("first", "second")]  # fmt: skip
    assert told[0].exit_code == told[1].exit_code == 0, told[0].stderr + told[1].stderr
    assert json.loads(told[0].stdout)["output"] == json.loads(told[1].stdout)["output"]


def test_without_freezing_all_go_on_from_where_they_were(config: Write, data: Path, tmp_path: Path, first: Path) -> None:  # fmt: skip
    # A rate of nearly nothing: what is saved is what the run began with.
    still = {"training": {"steps": 1, "learning_rate": 1e-30}}
    ok("train", second(config, data, tmp_path, **still))
    before, after = tensors(first), tensors(tmp_path / "second")
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    ok("train", second(config, data, tmp_path), "--overwrite")
    moved = tensors(tmp_path / "second")
    assert any(not np.array_equal(moved[name], before[name]) for name in before if ".task.ner" in name)  # fmt: skip


def test_a_started_run_resumes_bit_for_bit(config: Write, data: Path, tmp_path: Path, first: Path) -> None:  # fmt: skip
    path = second(config, data, tmp_path, training={"steps": 4, "save_every": 2}, freeze_start=True)
    ok("train", path)
    output = tmp_path / "second"
    weights = weights_of(output)
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(output / name)
    (output / "metrics.json").unlink()
    ok("train", path, "--resume")
    assert weights_of(output) == weights


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"start_from": "frist"}, "start_from: there is no folder"),
        ({"scaling": "rslora"}, "scaling is 'lora' in the adapter to start from"),
        ({"implies": {"task=*": ["shared=all", "language=yor"]}}, "a feature's implications stay as they are"),
        ({"output": "first"}, "is in the folder that the new run writes"),
        ({"start_from": None, "freeze_start": True}, "freeze_start: goes with start_from:"),
        ({"model": "gpt2"}, "start_from: the adapter was made for another architecture"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(
    more: dict[str, Any], why: str, config: Write, data: Path, tmp_path: Path, first: Path
) -> None:
    before = tensors(first)
    result = run(app, ["train", str(second(config, data, tmp_path, **more)), "--overwrite"])
    assert result.exit_code == 2, result.stdout
    assert why in result.stderr, result.stderr
    assert all(np.array_equal(value, before[name]) for name, value in tensors(first).items())


def test_another_base_is_refused(config: Write, data: Path, tmp_path: Path, first: Path, models: dict[str, Path]) -> None:  # fmt: skip
    import torch
    import transformers as tf

    other = tmp_path / "other"
    shutil.copytree(models["t5"], other)
    model = tf.T5ForConditionalGeneration.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(other)
    result = run(app, ["train", str(second(config, data, tmp_path, model=str(other)))])
    assert result.exit_code == 2 and "start_from: " in result.stderr, result.stderr
    assert not (tmp_path / "second").exists()


def test_freezing_needs_something_new(config: Write, data: Path, tmp_path: Path, first: Path) -> None:  # fmt: skip
    path = second(config, data, tmp_path, datasets=only(data, tmp_path, "swa"), freeze_start=True)
    result = run(app, ["train", str(path)])
    assert result.exit_code == 2 and "nothing would train" in result.stderr


def test_plans_count_the_earlier_features(config: Write, data: Path, tmp_path: Path, first: Path) -> None:  # fmt: skip
    path = second(config, data, tmp_path)
    found = run(app, ["plan", str(path), "--json"])
    assert found.exit_code == 0, found.stderr
    assert "hau" in found.stdout and "never trained" not in found.stdout
    said = yaml.safe_load(path.read_text())
    assert said["start_from"] == "first"

"""Several kinds of tasks over one encoder, from one configuration."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import flix
from flix.cli.app import app
from flix.cli.scores import show_scores
from tests.helpers.training import ok, run

LANGUAGES = ("hau", "swa", "yor")
WORDS = {"hau": ["gida", "ruwa", "kogi"], "swa": ["nyumba", "maji", "mto"], "yor": ["ile", "omi", "odo"]}  # fmt: skip


def rows_of(task: str, language: str, count: int) -> list[dict[str, Any]]:
    words = WORDS[language]
    found = []
    for i in range(count):
        text = [words[(i + j) % 3] for j in range(4)]
        if task == "ner":
            found.append({"tokens": text, "tags": ["B-LOC" if w == words[0] else "O" for w in text]})  # fmt: skip
        elif task == "topic":
            found.append({"text": " ".join(text), "label": f"t{i % 2}"})
        elif task == "long":
            found.append({"text": " ".join(text[: 1 + i % 4]), "value": 1 + i % 4})
        else:
            found.append({"text": " ".join(text)})
    return found


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    import torch
    import transformers as tf

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(w for ws in WORDS.values() for w in ws)]  # fmt: skip
    folder = tmp_path / "encoder"
    config = tf.BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    tf.BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    tf.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, encoder: Path) -> Path:
    kinds = {"ner": "tagging", "topic": "classification", "long": "regression", "text": "masked"}
    for task in kinds:
        (tmp_path / task).mkdir()
        for language in LANGUAGES:
            for half, count in (("train", 12), ("test", 4)):
                text = "".join(json.dumps(row) + "\n" for row in rows_of(task, language, count))
                (tmp_path / task / f"{language}.{half}.jsonl").write_text(text)
    columns = {
        "ner": {}, "topic": {"source": "text", "target": "label"}, "long": {"source": "text", "target": "value"},
        "text": {"source": "text"},
    }  # fmt: skip
    settings = {
        "model": "encoder",
        "output": "run",
        "datasets": [
            {
                "files": f"{task}/{{language}}.train.jsonl", "eval_files": f"{task}/{{language}}.test.jsonl",
                "kind": kind, "features": {"task": task}, **columns[task],
            }
            for task, kind in kinds.items()
        ],
        "held_out": [{"language": "yor", "task": "topic"}],
        "implies": {"task=*": "shared=all"},
        "ranks": {"rule": "by_group", "language": 1, "task": 2, "shared": 2},
        "feature_dropout": {"per_group": {"language": 0.3}},
        "training": {
            "steps": 8, "batch_size": 8, "learning_rate": 0.01, "learning_rates": {"heads": 0.05}, "eval_every": 4,
            "save_every": 2, "log_every": 2, "threads": 1, "max_source_tokens": 16,
        },
    }  # fmt: skip
    path = tmp_path / "kinds.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def test_what_the_scores_need_is_asked_for_before_training(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("seqeval", "seqeval.metrics.sequence_labeling"):
        monkeypatch.setitem(sys.modules, name, None)
    found = run(app, ["train", str(config)])
    assert found.exit_code == 2, found.stdout
    assert "seqeval" in found.stderr and "flix-peft[train]" in found.stderr
    assert not (config.parent / "run").exists()


def test_what_no_row_needs_is_not_asked_for(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = yaml.safe_load(config.read_text())
    said["datasets"] = [d for d in said["datasets"] if d["kind"] != "tagging"]
    said["training"]["steps"] = 1
    config.write_text(yaml.safe_dump(said))
    for name in ("seqeval", "seqeval.metrics.sequence_labeling"):
        monkeypatch.setitem(sys.modules, name, None)
    ok("train", config)


def test_four_kinds_from_one_configuration(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    metrics = ok("train", config)
    cells = {cell["cell"]: cell for cell in metrics["cells"]}
    assert len(cells) == 12 and not cells["task=topic,language=yor"]["seen"]
    kinds = {cell["task"]: (cell["kind"], cell["metric"]) for cell in cells.values()}
    assert kinds == {
        "ner": ("tagging", "entity_f1"), "topic": ("classification", "accuracy"), "long": ("regression", "pearson"),
        "text": ("masked", "accuracy"),
    }  # fmt: skip
    assert {*metrics["seen"]["by_kind"]} == {"tagging", "classification", "regression", "masked"}
    assert {*metrics["left_out"]} >= {"task=ner", "task=text", "language=yor", "shared=all"}
    # Scores cost no more than losses here, and are followed.
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    evaluations = [entry["evaluation"] for entry in log if "evaluation" in entry]
    assert len(evaluations) == 2 and all("score" in c for c in evaluations[0]["cells"].values())
    # Heads belong to the adapter, and another process answers alike.
    adapter = tmp_path / "run" / "adapter"
    heads = flix.load_adapter(adapter).heads
    assert any("ner" in name for name in heads) and any("topic" in name for name in heads)
    again = ok("evaluate", config, adapter)
    assert again["cells"] == metrics["cells"]
    rows = [
        {"text": "gida ruwa", "task": "topic", "language": "hau"},
        {"tokens": ["maji", "mto"], "task": "ner", "language": "swa"},
        {"text": "omi", "task": "long", "language": "yor"},
    ]
    given = "".join(json.dumps(row) + "\n" for row in rows)
    result = run(app, ["predict", str(adapter), "-"], input=given)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[0]["output"] in ("t0", "t1") and len(found[1]["output"].split()) == 2
    float(found[2]["output"])
    # A grid of languages and tasks, within 80 columns.
    show_scores(again)
    text = capsys.readouterr().out
    assert "language \\ task" in text and max(map(len, text.splitlines())) <= 80


def test_a_cell_without_entities_has_no_score_and_breaks_no_average(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    text = json.dumps({"tokens": ["gida"], "tags": ["O"]})
    (tmp_path / "ner" / "hau.test.jsonl").write_text(text)
    settings = yaml.safe_load(config.read_text())
    settings["training"].update(steps=2, best="score", eval_every=1, save_every=None)
    config.write_text(yaml.safe_dump(settings))
    metrics = ok("train", config)
    none = next(c for c in metrics["cells"] if c["cell"] == "task=ner,language=hau")
    assert none["score"] in (None, 0.0)  # 0 if an entity is told where there is none
    assert metrics["seen"]["score"] is not None and metrics["training"]["best"]["value"] is not None
    evaluated = run(app, ["evaluate", str(config), str(tmp_path / "run" / "adapter"), "--out", str(tmp_path / "o.json")])  # fmt: skip
    assert evaluated.exit_code == 0 and "nan" not in evaluated.stdout
    assert json.loads((tmp_path / "o.json").read_text(), parse_constant=pytest.fail)["cells"]
    show_scores({"cells": [{**none, "score": math.nan, "interval": [math.nan] * 2}], "seen": None, "held_out": None})  # fmt: skip
    assert "nan" not in capsys.readouterr().out


def test_averages_leave_out_cells_without_a_score() -> None:
    from flix.tasks.evaluation import average

    cells = [
        {"kind": "tagging", "rows": 2, "metric": "entity_f1", "score": s, "scores": {"entity_f1": s, "accuracy": 50.0}}
        for s in (math.nan, 30.0, 40.0)
    ]  # fmt: skip
    found = average(cells)
    assert found is not None and found["score"] == 35.0 and found["cells"] == 3
    assert found["by_kind"]["tagging"]["scores"] == {"entity_f1": 35.0, "accuracy": 50.0}
    tags = {"kind": "tagging", "rows": 2, "metric": "accuracy", "score": 90.0, "scores": {"accuracy": 90.0}}  # fmt: skip
    both = average([*cells, tags])  # F1 and accuracy have no mean
    assert both is not None and {k: v["score"] for k, v in both["by_kind"].items()} == {
        "tagging, entity_f1": 35.0,
        "tagging, accuracy": 90.0,
    }
    nothing = average(cells[:1])
    assert nothing is not None and math.isnan(nothing["score"])


def test_labels_that_no_training_row_has_are_named(config: Path, tmp_path: Path) -> None:
    (tmp_path / "topic" / "hau.test.jsonl").write_text('{"text": "gida", "label": "t9"}')
    settings = yaml.safe_load(config.read_text())
    settings["training"]["steps"] = 1
    config.write_text(yaml.safe_dump(settings))
    result = run(app, ["train", str(config)])
    assert "task 'topic': no training row has the labels t9" in result.stdout


def test_killed_and_resumed(config: Path, tmp_path: Path) -> None:
    """Killed -9 after a checkpoint, and resumed to the same bytes as a run that was not, masked texts included."""
    settings = yaml.safe_load(config.read_text())
    settings["evaluation"] = {"left_out": False, "limit": 1}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump({**settings, "output": "whole"}))
    config.write_text(yaml.safe_dump(settings))
    whole = ok("train", tmp_path / "whole.yaml")
    killed = subprocess.Popen(
        [sys.executable, "-m", "flix.cli", "train", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    manifest = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "flix_checkpoint.json"
    until = time.monotonic() + 120
    while not manifest.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "run" / "adapter").exists()
    resumed = ok("train", config, "--resume")
    one, two = (flix.load_adapter(tmp_path / name / "adapter") for name in ("run", "whole"))
    assert {k: v.tobytes() for k, v in one.tensors.items()} == {k: v.tobytes() for k, v in two.tensors.items()}  # fmt: skip
    assert {k: v.values.tobytes() for k, v in one.heads.items()} == {k: v.values.tobytes() for k, v in two.heads.items()}  # fmt: skip
    assert resumed["cells"] == whole["cells"]
    assert resumed["training"]["losses"] == whole["training"]["losses"]


def without(config: Path, task: str, **more: Any) -> Path:
    """The configuration without a task, under another name."""
    said = yaml.safe_load(config.read_text())
    said["datasets"] = [d for d in said["datasets"] if d["features"]["task"] != task]
    said["held_out"] = []
    path = config.with_name(f"without-{task}.yaml")
    path.write_text(yaml.safe_dump({**said, "output": f"without-{task}", **more}))
    return path


def test_a_task_joins_and_earlier_heads_keep_every_bit(config: Path, tmp_path: Path) -> None:
    ok("train", without(config, "topic"))
    said = yaml.safe_load(config.read_text())
    for name, freeze in (("frozen", True), ("free", False)):
        path = tmp_path / f"{name}.yaml"
        more = {"start_from": "without-topic", "freeze_start": freeze, "output": name}
        path.write_text(yaml.safe_dump({**said, **more}))
        ok("train", path)
    before, frozen, free = (flix.load_adapter(tmp_path / name / "adapter").heads for name in ("without-topic", "frozen", "free"))  # fmt: skip
    assert any("ner" in name for name in before) and not any("topic" in name for name in before)
    equal = [np.array_equal(frozen[name].values, head.values) for name, head in before.items()]
    assert all(equal)
    assert any("topic" in name for name in frozen)
    assert not all(np.array_equal(free[name].values, head.values) for name, head in before.items())


def test_heads_of_a_task_that_is_gone_are_not_lost(config: Path, tmp_path: Path) -> None:
    ok("train", config)
    result = run(app, ["train", str(without(config, "ner", start_from="run"))])
    assert result.exit_code == 2
    assert "the adapter has heads of ner, which no data set here is of" in result.stderr


def test_a_task_that_the_adapter_never_had_is_not_evaluated(config: Path, tmp_path: Path) -> None:
    said = yaml.safe_load(config.read_text())
    short = {"training": {"steps": 1, "threads": 1}, "evaluation": {"at_end": False}}
    ok("train", without(config, "topic", **short))
    adapter = tmp_path / "without-topic" / "adapter"
    path = config.with_name("other.yaml")
    path.write_text(yaml.safe_dump({**said, "unknown": "skip", "held_out": []}))
    result = run(app, ["evaluate", str(path), str(adapter)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "the adapter has no head of the task 'topic', which would answer at random" in result.stderr  # fmt: skip
    assert "its heads are of: long, ner" in result.stderr
    # Beside a task that it has, and called otherwise without a feature of the group task.
    datasets = [{k: v for k, v in d.items() if k != "features"} for d in said["datasets"]]
    names = {"name": "long"}, {"name": "other"}
    rest = {"implies": {}, "held_out": [], "ranks": 1, **short, "output": "unnamed"}
    path.write_text(yaml.safe_dump({**said, **rest, "feature_dropout": None, "datasets": [{**datasets[2], **names[0]}]}))  # fmt: skip
    ok("train", path)
    both = [{**datasets[2], **name} for name in names]
    path.write_text(yaml.safe_dump({**said, **rest, "feature_dropout": None, "datasets": both}))
    result = run(app, ["evaluate", str(path), str(tmp_path / "unnamed" / "adapter")])
    assert result.exit_code == 2 and "no head of the task 'other'" in result.stderr


def test_texts_longer_than_the_base_reads(config: Path, tmp_path: Path) -> None:
    """The base has 32 positions; its tokenizer does not say so."""
    said = yaml.safe_load(config.read_text())
    row = {"text": "gida " * 60, "label": "t0"}
    (tmp_path / "topic" / "hau.train.jsonl").write_text(json.dumps(row) + "\n")
    short = {"datasets": said["datasets"][1:2], "held_out": [], "evaluation": {"at_end": False}}
    path = config.with_name("long.yaml")
    path.write_text(yaml.safe_dump({**said, **short, "training": {"steps": 1, "threads": 1}}))
    result = run(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    assert "training.max_source_tokens is 32 instead of 512" in " ".join(result.output.split())
    recipe = json.loads((tmp_path / "run" / "adapter" / "recipe.json").read_text())
    assert recipe["tasks"][0]["max_source"] == 32
    path.write_text(yaml.safe_dump({**said, **short, "output": "other", "training": {"max_source_tokens": 40}}))  # fmt: skip
    result = run(app, ["train", str(path)])
    assert result.exit_code == 2 and "max_source_tokens is 40, but the base has positions for 32" in result.stderr  # fmt: skip

"""``flix train`` on tiny models: what trains, what is written, and that runs resume and repeat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import flix
from flix.cli.app import app
from flix.core.adapter.initial import initial_a
from flix.training.reading import read_settings
from tests.helpers.tolerance import assert_close
from tests.helpers.training import Write, ok, run


def weights_of(run_folder: Path) -> dict[str, bytes]:
    """The trained values, bit for bit. (The file's header may order its metadata differently.)"""
    tensors = flix.load_adapter(run_folder / "adapter").tensors
    return {name: value.tobytes() for name, value in tensors.items()}


@pytest.mark.parametrize("model", ["t5", "llama", "gpt2"])
def test_train_from_the_outside(
    config: Write, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flix.training import batches

    drawn: list[dict[str, Any]] = []
    collate = batches.Collator.__call__

    def spy(self: Any, items: Any) -> Any:
        drawn.extend(i.row.features for i in items if i.position is not None)
        return collate(self, items)

    monkeypatch.setattr(batches.Collator, "__call__", spy)
    # Yoruba is held out whole: its feature must not learn anything.
    path = config(model, held_out=[{"language": "yor"}], training={"eval_every": 5})
    result = run(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    assert "step 10/10" in result.stdout and "average, held out" in result.stdout
    assert result.stderr == ""

    assert len(drawn) == 40 and all(f["language"] != "yor" for f in drawn)
    output = tmp_path / "run"
    adapter = flix.load_adapter(output / "adapter")
    moved = dict.fromkeys(adapter.config.registry.features, 0.0)
    for layer, shape in adapter.layers.items():
        for feature in moved:
            a, b = adapter.pair(layer, feature)
            moved[feature] = max(moved[feature], float(np.abs(b).max()))
            if feature == ("language", "yor"):
                fresh = initial_a(
                    seed=3, layer=layer, group="language", feature="yor",
                    rank=a.shape[0], d_in=shape.d_in,
                )  # fmt: skip
                assert np.array_equal(a, fresh)
    assert moved["language", "yor"] == 0.0
    assert all(value > 0 for f, value in moved.items() if f != ("language", "yor"))

    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == 10 and len(metrics["training_rows"]) == 6
    assert [e["step"] for e in metrics["evaluation_losses"]] == [5, 10]
    assert set(metrics["evaluation_losses"][0]) == {"step", "seen_loss", "held_out_loss"}
    seen = {c["cell"]: c["seen"] for c in metrics["evaluation"]["cells"]}
    assert len(seen) == 9 and sum(seen.values()) == 6
    # The resolved configuration is a configuration, with every default spelled out.
    resolved = yaml.safe_load((output / "config.yaml").read_text())
    assert resolved["training"]["schedule"] == "cosine"
    assert read_settings(output / "config.yaml").to_dict() == read_settings(path).to_dict()
    # A checkpoint holds the adapter and what resuming needs, not the base.
    files = {p.name for p in (output / "checkpoints" / "checkpoint-10").iterdir()}
    assert {"flix.safetensors", "flix_config.json", "optimizer.pt", "scheduler.pt"} <= files
    assert {"rng_state.pth", "trainer_state.json"} <= files
    assert not any("model" in name or "pytorch" in name for name in files)


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_resume_is_bit_for_bit(config: Write, tmp_path: Path, model: str) -> None:
    """With the base's dropout (T5), feature dropout, accumulation, momentum, a schedule and evaluations."""
    training = {
        "steps": 8, "save_every": 3, "eval_every": 2, "gradient_accumulation": 2, "warmup_steps": 2,
        "weight_decay": 0.1, "log_every": 1, "batch_size": 3, "keep_checkpoints": 5,
    }  # fmt: skip
    path = config(model, training=training, evaluation={"at_end": False})
    whole = ok("train", path)
    output = tmp_path / "run"
    weights = weights_of(output)
    # As if the run had been killed between steps 3 and 6, in the middle of writing a checkpoint.
    for name in ("adapter", "checkpoints/checkpoint-6", "checkpoints/checkpoint-8"):
        shutil.rmtree(output / name)
    (output / "metrics.json").unlink()
    (output / "checkpoints" / "checkpoint-6").mkdir()
    torch.manual_seed(12345)
    resumed = ok("train", path, "--resume")
    assert weights_of(output) == weights
    assert resumed["losses"] == whole["losses"]
    assert resumed["evaluation_losses"] == whole["evaluation_losses"]
    # A run that is done trains no more.
    done = ok("train", path, "--resume")
    assert done["steps"] == 8
    assert weights_of(output) == weights


def test_runs_repeat(config: Write, tmp_path: Path) -> None:
    small = {"training": {"steps": 3}, "evaluation": {"at_end": False}}
    for name in ("one", "two"):
        ok("train", config(name=f"{name}.yaml", output=name, **small))
    ok("train", config(name="three.yaml", output="three", seed=4, **small))
    one, two, three = (weights_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three


def test_resume_and_overwrite_mistakes(config: Write, tmp_path: Path) -> None:
    small = {"training": {"steps": 1}, "evaluation": {"at_end": False}}
    path = config(**small)
    result = run(app, ["train", str(path), "--resume"])
    assert result.exit_code == 2 and "nothing to resume" in result.stderr
    ok("train", path)
    result = run(app, ["train", str(path)])
    assert result.exit_code == 2 and "--resume continues it" in result.stderr
    changed = config(temperature=1.0, **small)
    result = run(app, ["train", str(changed), "--resume"])
    assert result.exit_code == 2 and "temperature was 2.0 and is 1.0 now" in result.stderr
    result = run(app, ["train", str(config(training={"steps": 2, "batch_size": 5})), "--resume"])
    assert result.exit_code == 2 and "training.batch_size was 4 and is 5 now" in result.stderr
    # A mistake found before training leaves the earlier run alone; otherwise it is replaced.
    result = run(app, ["train", str(config(kind="causal", **small)), "--overwrite"])
    assert result.exit_code == 2 and (tmp_path / "run" / "adapter").is_dir()
    ok("train", config(**small), "--overwrite")


def test_diverging_runs_stop(config: Write) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0, "log_every": 1, "schedule": "constant"}
    result = run(app, ["train", str(config(training=training))])
    assert result.exit_code == 2 and "lower training.learning_rate" in result.stderr


@pytest.mark.parametrize(
    "training", [{"gradient_checkpointing": True}, {"bf16": True}, {"dtype": "bfloat16"}]
)
@pytest.mark.parametrize("model", ["t5", "llama"])
def test_precision_and_checkpointing(
    config: Write, tmp_path: Path, model: str, training: dict[str, Any]
) -> None:
    common = {"evaluation": {"at_end": False}}
    ok("train", config(model, training={"steps": 3}, **common))
    plain = flix.load_adapter(tmp_path / "run" / "adapter").tensors
    ok("train", config(model, training={"steps": 3, **training}, **common), "--overwrite")
    other = flix.load_adapter(tmp_path / "run" / "adapter").tensors
    moved = [name for name in plain if ".B." in name and np.abs(plain[name]).max() > 0]
    assert moved and all(np.abs(other[name]).max() > 0 for name in moved)
    if training == {"gradient_checkpointing": True}:
        for name, value in plain.items():
            assert_close(other[name], value)


def test_a_finished_run_keeps_its_history_when_it_is_resumed(config: Write, tmp_path: Path) -> None:
    path = config(training={"steps": 6, "log_every": 2, "eval_every": 3, "save_every": 3})
    assert run(app, ["train", str(path)]).exit_code == 0
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())
    weights = weights_of(tmp_path / "run")
    assert [e["step"] for e in before["losses"]] == [2, 4, 6] and before["seconds"] > 0
    for _ in range(2):
        result = run(app, ["train", str(path), "--resume"])
        assert result.exit_code == 0 and "has its 6 steps already" in result.stdout
        assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == before
        assert weights_of(tmp_path / "run") == weights
    # Fewer steps than there are change nothing, and are not said to be what was done.
    config(training={"steps": 3, "log_every": 2, "eval_every": 3, "save_every": 3})
    result = run(app, ["train", str(path), "--resume"])
    assert "has its 6 steps already" in result.stdout
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == before
    # More go on from there, and every step stands in the history once.
    config(training={"steps": 8, "log_every": 2, "eval_every": 3, "save_every": 3})
    assert run(app, ["train", str(path), "--resume"]).exit_code == 0
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [e["step"] for e in after["losses"]] == [2, 4, 6, 8] and after["steps"] == 8
    assert after["losses"][:3] == before["losses"]
    assert [e["step"] for e in after["evaluation_losses"]] == [3, 6, 8]
    assert after["seconds"] > before["seconds"]


def test_features_that_are_never_trained_are_named(config: Write, tmp_path: Path) -> None:
    registry = {"language": ["hau", "swa", "yor", "zul"], "task": ["ner", "pos", "rev"], "shared": ["all"]}  # fmt: skip
    path = config(registry=registry, held_out=[{"language": "yor"}], training={"steps": 2})
    said = "language=yor, language=zul, which are never trained: they will change nothing"
    result = run(app, ["train", str(path)])
    assert result.exit_code == 0 and f"no training row activates {said}" in result.stdout
    assert said in run(app, ["plan", str(path)]).stdout
    adapter = str(tmp_path / "run" / "adapter")
    # yor occurs in the rows to evaluate on, zul does not.
    text = run(app, ["evaluate", str(path), adapter]).stdout
    assert "language=yor was never trained: its update is zero and changes nothing" in text
    assert "zul" not in text
    shown = run(app, ["inspect", adapter]).stdout
    assert "language=yor, language=zul were never trained: their updates are zero" in shown
    assert ok("inspect", adapter)["never_trained"] == ["language=yor", "language=zul"]
    base = yaml.safe_load(path.read_text())["model"]
    for command in ("merge", "export"):
        arguments = [command, adapter, "--base", base, "--features", "language=zul,task=ner"]
        result = run(app, [*arguments, "--out", str(tmp_path / command)])
        assert result.exit_code == 0 and "language=zul was never trained" in result.stdout
        said_json = ok(*arguments, "--out", tmp_path / f"{command}2")
        assert said_json["never_trained"] == ["language=zul"]


def test_targets_that_the_tokenizer_has_no_tokens_for(config: Write, tmp_path: Path, models: dict[str, Path]) -> None:  # fmt: skip
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers  # isort: skip
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *(f"{t}{i}" for t in "nr" for i in range(12)),
        *(f"p{i}" for i in range(6)),
    ]
    inner = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")  # fmt: skip
    made.save_pretrained(tmp_path / "words")
    path = config(tokenizer="words", training={"steps": 1})
    # Of pos, half of the targets have a token: the rest is said.
    result = run(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    said = "unknown tokens, which the model cannot write: in "
    assert result.stdout.count(said) == 3  # of pos, in three languages
    assert "of task=pos,language=hau that were looked at, such as 'p" in result.stdout
    rows = [{"lang": "hau", "source": "a", "target": text} for text in ("ŋ", "ɓ", "ɗ")]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"files": "new.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    path = config(tokenizer="words", datasets=[data], held_out=[], implies={}, ranks=1, output="other")  # fmt: skip
    result = run(app, ["train", str(path)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "no token for the targets of task=ner,language=hau" in result.stderr

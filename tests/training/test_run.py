"""``flix train`` on tiny models: what trains, and what is written."""

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
from flix.core.adapter.initial import initial_a
from flix.training.reading import read_settings
from tests.helpers.tolerance import assert_close
from tests.helpers.training import Write, ok, run


@pytest.mark.parametrize("model", ["t5", "llama", "gpt2"])
def test_train_from_the_outside(
    config: Write, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flix.transformers import FlixCollator
    from flix.transformers.numbering import NUMBER

    drawn: list[dict[str, Any]] = []
    batches: dict[int, Any] = {}
    collate = FlixCollator.__call__

    def spy(self: Any, rows: Any) -> Any:
        batch = collate(self, rows)
        if NUMBER in rows[0]:
            drawn.extend(rows)
            batches[rows[0][NUMBER][0]] = ([{**row} for row in rows], batch)
        return batch

    monkeypatch.setattr(FlixCollator, "__call__", spy)
    # Yoruba is held out whole: its feature must not learn anything.
    path = config(model, held_out=[{"language": "yor"}], training={"eval_every": 5})
    result = run(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    assert "step 10/10" in result.stdout and "average, held out" in result.stdout
    assert result.stderr == ""

    assert len(drawn) == 40 and all(f["language"] != "yor" for f in drawn)
    output = tmp_path / "run"
    adapter = flix.load_adapter(output / "adapter")
    # Dropout is flix's own, keyed by step and row.
    config_ = adapter.config
    for step, (rows, batch) in batches.items():
        named = [{g: row.get(g) for g in ("task", "language")} for row in rows]
        plain = config_.registry.encode(named)
        wanted = config_.feature_dropout(plain, seed=3, step=step)  # type: ignore[misc]
        assert np.array_equal(batch["flix_features"].numpy(), wanted.ids)
    languages = [len({*row.tolist()} & {*config_.registry.ids_of("language")}) for _, b in batches.values() for row in b["flix_features"]]  # fmt: skip
    assert sorted(batches) == list(range(10)) and 8 < sum(languages) < 32
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
    training = metrics["training"]
    assert training["steps"] == 10 and len(training["training_rows"]) == 6
    assert [e["step"] for e in training["evaluation_losses"]] == [5, 10]
    assert set(training["evaluation_losses"][0]) == {"step", "loss", "seen", "held_out"}
    seen = {c["cell"]: c["seen"] for c in metrics["cells"]}
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


def test_rows_of_similar_length_come_together_and_are_the_same_rows(
    config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flix.transformers import FlixCollator
    from flix.transformers.numbering import NUMBER

    drawn: dict[bool, list[list[str]]] = {True: [], False: []}
    collate = FlixCollator.__call__
    for chosen, batches in drawn.items():

        def spy(self: Any, rows: Any, batches: list[list[str]] = batches) -> Any:
            if NUMBER in rows[0]:
                batches.append([row["source"] for row in rows])
            return collate(self, rows)

        monkeypatch.setattr(FlixCollator, "__call__", spy)
        training = {"similar_lengths": chosen, "steps": 12}
        ok("train", config("t5", training=training, evaluation={"at_end": False}), "--overwrite")
    alike, plain = drawn[True], drawn[False]
    assert alike != plain and list(map(len, alike)) == list(map(len, plain)) == [4] * 12
    rows = [sorted(row for batch in batches for row in batch) for batches in (alike, plain)]
    assert rows[0] == rows[1]
    widths = [sum(max(map(len, batch)) for batch in batches) for batches in (alike, plain)]
    assert widths[0] < widths[1]


def test_packed_batches_train_as_padded_ones(
    config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flix.core.adapter.files import load_adapter
    from flix.tasks.packing import PackingCollator

    shapes = []
    collate = PackingCollator.__call__

    def spy(self: Any, rows: Any, **given: Any) -> Any:
        batch = collate(self, rows, **given)
        if self.length is not None:
            shapes.append(
                (len(rows), tuple(batch["input_ids"].shape), batch["flix_features"].dim())
            )
        return batch

    monkeypatch.setattr(PackingCollator, "__call__", spy)
    lengths = {"max_source_tokens": 40, "max_target_tokens": 24, "steps": 3, "batch_size": 6}
    scores = {}
    for packing in (None, 64):
        training = {**lengths, "packing": packing}
        plain = {"feature_dropout": None, "output": f"run-{packing}"}
        scores[packing] = ok("train", config("llama", training=training, **plain))
    assert len(shapes) == 3 and all(rows == 6 and dim == 3 for rows, _, dim in shapes)
    assert all(shape[0] < 6 and shape[1] == 64 for _, shape, _ in shapes)
    found = [load_adapter(tmp_path / f"run-{packing}" / "adapter") for packing in (None, 64)]
    for path in found[0].layers:
        for feature in found[0].config.registry.features:
            for one, other in zip(*(a.pair(path, feature) for a in found), strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=2e-4)
    losses = [scores[p]["training"]["losses"] for p in (None, 64)]
    assert [x["loss"] for x in losses[0]] == pytest.approx([x["loss"] for x in losses[1]], abs=1e-4)
    # Evaluation and what is predicted are those of rows alone.
    cells = [[(c["cell"], c["score"]) for c in scores[p]["cells"]] for p in (None, 64)]
    assert cells[0] == cells[1]


def test_diverging_runs_stop(config: Write) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0, "log_every": 1, "schedule": "constant"}
    result = run(app, ["train", str(config(training=training))])
    assert (
        result.exit_code == 2
        and "lower the learning rate (training.learning_rate)" in result.stderr
    )


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
    assert "of task=pos,language=hau that were checked, such as 'p" in result.stdout
    rows = [{"lang": "hau", "source": "a", "target": text} for text in ("ŋ", "ɓ", "ɗ")]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"files": "new.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    path = config(tokenizer="words", datasets=[data], held_out=[], implies={}, ranks=1, output="other")  # fmt: skip
    result = run(app, ["train", str(path)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "no token for the targets of task=ner,language=hau" in result.stderr


@pytest.mark.parametrize("best", ["loss", "held_out.score"])
def test_the_best_evaluation_is_kept_and_waited_for(config: Write, tmp_path: Path, best: str) -> None:  # fmt: skip
    training = {
        "steps": 12, "eval_every": 2, "best": best, "patience": 2, "learning_rate": 0.3, "schedule": "constant",
        "log_every": 1,
    }  # fmt: skip
    path = config(
        training=training, evaluation={"left_out": False, "limit": 2, "max_new_tokens": 1}
    )
    metrics = ok("train", path)
    training = metrics["training"]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = [(e["step"], e["evaluation"]) for e in log if "evaluation" in e]
    if best == "loss":
        values = [(evaluation["loss"], step) for step, evaluation in found]
        value, step = min(values)
    else:
        values = [(evaluation["scores"]["held_out"], -step) for step, evaluation in found]
        value, step = max(values)
    assert training["best"] == {"metric": best, "value": pytest.approx(value), "step": abs(step)}
    assert training["steps"] == min(abs(step) + 4, 12)
    kept = flix.load_adapter(tmp_path / "run" / "checkpoints" / f"checkpoint-{abs(step)}")
    mine = flix.load_adapter(tmp_path / "run" / "adapter")
    assert all(np.array_equal(mine.tensors[name], kept.tensors[name]) for name in kept.tensors)
    assert metrics["left_out"] is None


def test_learning_rates_by_group(config: Write, tmp_path: Path) -> None:
    rates = {"language": 0.0, "task": 1e-3}
    common = {"training": {"steps": 3, "learning_rates": rates, "schedule": "constant"}, "evaluation": {"at_end": False}}  # fmt: skip
    ok("train", config(**common))
    adapter = flix.load_adapter(tmp_path / "run" / "adapter")
    most = {
        group: max(np.abs(v).max() for name, v in adapter.tensors.items() if f".B.{group}." in name)
        for group in ("language", "task", "shared")
    }
    # AdamW moves by about the rate a step: the shared feature by the rate for all, 0.01.
    assert most["language"] == 0.0 and 0 < most["task"] <= 3.1e-3 < most["shared"] <= 3.1e-2
    wrong = config(training={"steps": 3, "learning_rates": {"langage": 1.0}})
    result = run(app, ["train", str(wrong), "--overwrite"])
    assert result.exit_code == 2 and "'langage' (did you mean 'language'?)" in result.stderr


def test_trackers_that_are_not_installed_are_named(config: Write, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from flix.tasks import needing

    plain = needing.find_spec
    monkeypatch.setattr(
        needing, "find_spec", lambda name: None if name == "mlflow" else plain(name)
    )
    result = run(app, ["train", str(config(training={"report_to": ["mlflow"]}))])
    assert result.exit_code == 2 and "training.report_to: mlflow is not installed" in result.stderr


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_accumulation_changes_nothing(config: Write, tmp_path: Path, models: dict[str, Path], data: Path, model: str) -> None:  # fmt: skip
    """Steps of micro-batches are those of whole batches, of models that divide by a step's labels and of those that do
    not (T5)."""
    shutil.copytree(models[model], tmp_path / "model")
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**said, "dropout_rate": 0.0}))
    rows = [
        {"source": "a", "target": "b" * (1 + 7 * (i % 3))} for i in range(16)
    ]  # of unlike lengths
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"files": "rows.jsonl", "features": {"task": "ner", "language": "hau"}}
    logs = []
    for batch_size, micro in ((8, 1), (2, 4)):
        training = {
            "steps": 3, "batch_size": batch_size, "gradient_accumulation": micro, "log_every": 1, "max_grad_norm": 0,
        }  # fmt: skip
        path = config(str(tmp_path / "model"), kind={"t5": "seq2seq"}.get(model, "causal"), datasets=[entry], held_out=[], feature_dropout=None, training=training)  # fmt: skip
        ok("train", path, "--overwrite")
        log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        logs.append([e for e in map(json.loads, log) if "loss" in e])
    for whole, parts in zip(*logs, strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-3)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-2)
        assert parts["by_feature"]["task=ner"] == pytest.approx(whole["loss"], rel=1e-3)


def test_two_processes_train_and_one_writes(config: Write, tmp_path: Path) -> None:
    """Started once for all: every rows' share, the loss by feature over both, one writer, and resuming."""
    from tests.helpers.processes import run_together

    training = {
        "steps": 4,
        "save_every": 2,
        "eval_every": 2,
        "log_every": 1,
        "batch_size": 2,
        "device": "cpu",
    }
    common = {"feature_dropout": None, "evaluation": {"left_out": False}}
    path = config("llama", training=training, **common)
    texts = run_together(2, "flix.cli", "train", str(path), timeout=300)
    assert "step 4/4" in texts[0] and "adapter: " in texts[0]
    assert "step" not in texts[1] and "adapter" not in texts[1]
    both = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sum(cell["drawn"] for cell in json.loads((tmp_path / "run" / "mixture.json").read_text())["cells"]) == 16  # fmt: skip
    # The same rows in one process, twice the batch: the same training, but for rounding.
    one = config(
        "llama", name="one.yaml", output="one", training={**training, "batch_size": 4}, **common
    )
    alone = ok("train", one)
    pairs = zip(both["training"]["evaluation_losses"], alone["training"]["evaluation_losses"], strict=True)  # fmt: skip
    for mine, its in pairs:
        assert mine["step"] == its["step"] and mine["seen"] == pytest.approx(its["seen"], rel=1e-4)
    for mine, its in zip(both["training"]["losses"], alone["training"]["losses"], strict=True):
        assert mine == {"step": its["step"], "loss": pytest.approx(its["loss"], rel=1e-3)}
    result = run(app, ["train", str(path), "--resume"])
    assert (
        result.exit_code == 2 and "started in 2 processes and would continue in 1" in result.stderr
    )


@pytest.mark.filterwarnings("default:exclude_modules:UserWarning")
def test_settings_that_match_nothing_are_named(config: Write) -> None:
    nothing = {
        "exclude_modules": ["nothing"], "rank_pattern": {"none": 3}, "unknown": {"nope": "eng"},
        "training": {"steps": 1}, "evaluation": {"at_end": False}, "held_out": [],
    }  # fmt: skip
    for command in ("train", "plan"):
        result = run(app, [command, str(config(**nothing))])
        assert result.exit_code == 0, result.output
        said = " ".join(result.output.split())
        for text in ("exclude_modules: 'nothing' matches no layer", "rank_pattern: 'none' matches no adapted layer", "unknown: no group has a feature 'eng', which stands for 'nope'"):  # fmt: skip
            assert text in said, command
    wrong = config(**{**nothing, "evaluation": {"unseen_group_weights": {"nope": 1}}}, output="x")
    for command in ("train", "plan"):
        result = run(app, [command, str(wrong)])
        assert result.exit_code == 2
        assert "evaluation.unseen_group_weights: no feature group 'nope'" in result.stderr

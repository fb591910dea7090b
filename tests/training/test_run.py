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


@pytest.mark.parametrize("model", ["t5", "llama", "llama, packed"])
def test_resume_is_bit_for_bit(config: Write, tmp_path: Path, model: str) -> None:
    """With the base's dropout (T5), feature dropout, accumulation, momentum, a schedule and evaluations."""
    training = {
        "steps": 8, "save_every": 3, "eval_every": 2, "gradient_accumulation": 2, "warmup_steps": 2,
        "weight_decay": 0.1, "log_every": 1, "batch_size": 3, "keep_checkpoints": 5,
        "similar_lengths": model == "llama",
    }  # fmt: skip
    if model == "llama, packed":
        training |= {"packing": 64, "max_source_tokens": 40, "max_target_tokens": 24}
    path = config(model.split(",")[0], training=training, evaluation={"at_end": False})
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
    for part in ("losses", "evaluation_losses"):
        assert resumed["training"][part] == whole["training"][part]
    # A run that is done trains no more.
    done = ok("train", path, "--resume")
    assert done["training"]["steps"] == 8
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


def test_nothing_of_an_earlier_run_is_left(config: Write, tmp_path: Path) -> None:
    small = {"training": {"steps": 1}, "evaluation": {"at_end": False}}
    ok("train", config(**small))
    page, resolved = tmp_path / "run" / "report.html", tmp_path / "run" / "config.yaml"
    assert page.is_file() and resolved.is_file()
    first = page.read_bytes()
    answers = tmp_path / "run" / "predictions.jsonl"
    answers.write_text("{}\n")  # of the shorter run
    ok("train", config(**{**small, "training": {"steps": 2}}), "--resume", "--no-report")
    assert not page.exists() and not answers.exists()
    ok("train", config(**{**small, "training": {"steps": 2}}), "--resume")
    assert page.read_bytes() != first
    # A run that ends in its middle has neither the page nor the settings of the one that it discarded.
    broken = {"learning_rate": 1e30, "max_grad_norm": 0, "schedule": "constant", "log_every": 1}
    result = run(app, ["train", str(config(training=broken)), "--overwrite"])
    assert result.exit_code == 2 and not page.exists() and not resolved.exists()
    ok("train", config(**small), "--overwrite", "--no-report")
    page.write_text("<p>mine</p>")
    ok("train", config(**{**small, "training": {"steps": 2}}), "--resume", "--no-report")
    assert page.read_text() == "<p>mine</p>"


def test_a_run_writes_over_no_configuration(config: Write, tmp_path: Path) -> None:
    path = config(name="config.yaml", output=".", training={"steps": 1})
    before = path.read_bytes()
    result = run(app, ["train", str(path)])
    assert (
        result.exit_code == 2
        and "belongs to no run" in result.stderr
        and "output:" in result.stderr
    )
    assert path.read_bytes() == before and not (tmp_path / "adapter").exists()


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


def test_a_finished_run_keeps_its_history_when_it_is_resumed(config: Write, tmp_path: Path) -> None:
    path = config(training={"steps": 6, "log_every": 2, "eval_every": 3, "save_every": 3})
    assert run(app, ["train", str(path)]).exit_code == 0

    def metrics() -> dict[str, Any]:
        return dict(json.loads((tmp_path / "run" / "metrics.json").read_text()))

    before = metrics()
    weights = weights_of(tmp_path / "run")
    assert [e["step"] for e in before["training"]["losses"]] == [2, 4, 6]
    assert before["training"]["seconds"] > 0
    for _ in range(2):
        result = run(app, ["train", str(path), "--resume"])
        assert result.exit_code == 0 and "has its 6 steps already" in result.stdout
        assert metrics() == before
        assert weights_of(tmp_path / "run") == weights
    # Fewer steps than there are change nothing, and are not said to be what was done.
    config(training={"steps": 3, "log_every": 2, "eval_every": 3, "save_every": 3})
    result = run(app, ["train", str(path), "--resume"])
    assert "has its 6 steps already" in result.stdout
    assert metrics() == before
    # More go on from there, and every step stands in the history once.
    config(training={"steps": 8, "log_every": 2, "eval_every": 3, "save_every": 3})
    assert run(app, ["train", str(path), "--resume"]).exit_code == 0
    after = metrics()["training"]
    assert [e["step"] for e in after["losses"]] == [2, 4, 6, 8] and after["steps"] == 8
    assert after["losses"][:3] == before["training"]["losses"]
    assert [e["step"] for e in after["evaluation_losses"]] == [3, 6, 8]
    assert after["seconds"] > before["training"]["seconds"]


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


def test_what_a_run_leaves(config: Write, tmp_path: Path) -> None:
    path = config(training={"steps": 6, "log_every": 2, "eval_every": 3}, cap=8)
    ok("train", path)
    folder = tmp_path / "run"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses, evaluations = [e for e in log if "loss" in e], [e for e in log if "evaluation" in e]
    assert [e["step"] for e in losses] == [2, 4, 6] and [e["step"] for e in evaluations] == [3, 6]
    assert {"seconds", "learning_rate", "grad_norm"} <= {*losses[0]}
    assert {"task=ner", "language=hau", "shared=all"} <= {*losses[0]["by_feature"]}
    found = evaluations[-1]["evaluation"]
    assert {"task=rev", "language=yor", "shared=all"} <= {*found["by_feature"]}
    assert len(found["cells"]) == 9 and found["loss"] == found["seen"] != found["held_out"]
    # Of as many tokens: the mean over the cells' rows is the mean of all.
    mixture = json.loads((folder / "mixture.json").read_text())
    cells = {cell["cell"]: cell for cell in mixture["cells"]}
    assert mixture["cap"] == 8 and mixture["epoch_size"] == 64 and len(cells) == 9
    assert sum(cell["drawn"] for cell in cells.values()) == 24
    held = cells["task=rev,language=yor"]
    assert held["held_out"] and held["drawn"] == 0 and (held["rows"], held["evaluation_rows"]) == (12, 12)  # fmt: skip
    seen = cells["task=ner,language=hau"]
    assert (seen["rows"], seen["counted"], seen["evaluation_rows"]) == (10, 8, 2)
    assert seen["features"] == {"task": ["ner"], "language": ["hau"]}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {*metrics["left_out"]} == {
        *metrics["left_out"],
        "task=ner",
        "language=hau",
        "shared=all",
    }
    assert "language=yor" in metrics["left_out"]  # trained in two of its three cells
    left = metrics["left_out"]["shared=all"]
    assert left["rows"] == 16 and left["loss"] != left["without"]
    said = json.loads((folder / "run.json").read_text())
    assert said["steps"] == 6 and said["seed"] == 3 and said["cost"]["tokens"] > 0
    by_feature = said["parameters"]["by_feature"]
    assert sum(by_feature.values()) == said["parameters"]["trainable"] == metrics["training"]["trainable_parameters"]  # fmt: skip
    assert all(
        len(f["sha256"]) == 64 and f["bytes"] for part in said["data"] for f in part["files"]
    )
    recipe = json.loads((folder / "adapter" / "recipe.json").read_text())
    assert [task["name"] for task in recipe["tasks"]] == ["ner", "pos", "rev"]
    assert Path(recipe["model"]).is_dir() and len(recipe["seen"]) == 8


def test_a_run_that_is_interrupted_goes_on_as_if_it_was_not(config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import signal

    from flix.transformers.watch import Watch

    common = {"training": {"steps": 6, "log_every": 1}, "evaluation": {"at_end": False}}
    ok("train", config(output="whole", **common))
    path = config(**common)
    step_end = Watch.on_step_end

    def press(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        step_end(self, args, state, control, **more)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", press)
        result = run(app, ["train", str(path)])
    assert result.exit_code == 130 and signal.getsignal(signal.SIGINT) is before
    assert (
        result.stderr
        == "flix: interrupted at step 3, which was saved; --resume goes on from there\n"
    )
    assert not (tmp_path / "run" / "adapter").exists()
    ok("train", path, "--resume")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    logs = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("run", "whole")]  # fmt: skip
    assert logs[0] == logs[1]


def test_runs_that_cannot_go_on(config: Write, tmp_path: Path, data: Path) -> None:
    (tmp_path / "ner.jsonl").write_bytes((data / "ner.jsonl").read_bytes())
    entry = {"files": "ner.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    path = config(
        datasets=[entry], held_out=[], training={"steps": 1}, evaluation={"at_end": False}
    )
    ok("train", path)
    file = tmp_path / "run" / "checkpoints" / "run.json"
    now = json.loads(file.read_text())

    def refused(said: Any) -> str:
        file.write_text(json.dumps(said))
        result = run(app, ["train", str(path), "--resume"])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        return result.stderr

    # As earlier versions wrote it: the settings alone.
    assert "started by an earlier flix, which drew its rows in another order" in refused(now["settings"])  # fmt: skip
    assert "of format 3, not 2" in refused({**now, "format": 3})
    assert "started in 2 processes and would continue in 1" in refused({**now, "processes": 2})
    assert "the files of training rows are not those" in refused({**now, "data": ["0"]})
    file.write_text(json.dumps(now))
    ok("train", path, "--resume")
    (tmp_path / "ner.jsonl").write_bytes((data / "pos.jsonl").read_bytes())
    result = run(app, ["train", str(path), "--resume"])
    assert result.exit_code == 2 and "files of training rows are not those" in result.stderr


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
    from flix.training import models

    plain = models.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "mlflow" else plain(name))
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


def streamed(data: Path, **changes: Any) -> list[dict[str, Any]]:
    """The tests' data sets, each a language of one task, with the held-out one left out; one of them not streamed."""
    return [
        {
            "files": str(data / f"{task}.jsonl"), "features": {"task": task, "language": "hau"}, "prompt": "{task}: {source}",
            "eval_files": str(data / f"{task}.jsonl"), **({"stream": True, "rows": 36} if task != "pos" else {}), **changes,
        }
        for task in ("ner", "pos", "rev")
    ]  # fmt: skip


def test_streamed_data_trains_and_resumes_bit_for_bit(config: Write, tmp_path: Path, data: Path) -> None:  # fmt: skip
    common = {
        "datasets": streamed(data), "held_out": [], "evaluation": {"at_end": False},
        "training": {"steps": 40, "save_every": 15, "log_every": 5, "batch_size": 4, "keep_checkpoints": 9},
    }  # fmt: skip
    path = config(**common)
    whole = ok("train", path)
    weights = weights_of(tmp_path / "run")
    mixture = json.loads((tmp_path / "run" / "mixture.json").read_text())
    assert [(c["cell"], c["rows"], c["drawn"]) for c in mixture["cells"]] == [
        (f"task={task},language=hau", 36, None) for task in ("pos", "ner", "rev")
    ]
    assert {*whole["training"]["training_rows"].values()} == {36}
    for name in ("adapter", "checkpoints/checkpoint-30", "checkpoints/checkpoint-40"):
        shutil.rmtree(tmp_path / "run" / name)
    resumed = ok("train", path, "--resume")
    assert weights_of(tmp_path / "run") == weights
    assert resumed["training"]["losses"] == whole["training"]["losses"]


def test_what_streams_cannot_do(config: Write, data: Path) -> None:
    def refused(**changes: Any) -> str:
        result = run(app, ["train", str(config(datasets=streamed(data, **changes), held_out=[]))])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        return result.stderr

    assert "rows: goes with stream: true" in refused(stream=False)
    assert "leave out eval_rows: and give eval_files:" in refused(eval_rows=2)
    assert "say how many rows they have: rows:" in refused(rows=None, stream=True)
    named = {"files": str(data / "{language}.jsonl"), "features": {"task": "ner"}, "stream": True, "rows": 3}  # fmt: skip
    assert "features: must say the language of all rows" in refused(**named)
    labelled = {"kind": "classification", "stream": True, "rows": 36}
    assert "the labels of a stream are not known before it is read; give labels:" in refused(**labelled)  # fmt: skip
    path = config(datasets=streamed(data), held_out=[], training={"similar_lengths": True})
    assert "looks ahead, which streams do not allow" in run(app, ["train", str(path)]).stderr
    column = {"features": {"task": "ner"}, "feature_columns": {"language": "lang"}, "stream": True, "rows": 36}  # fmt: skip
    assert "what its rows activate is not known before they are read" in refused(**column)


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

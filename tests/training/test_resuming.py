"""What a run of ``flix train`` leaves, and how another one goes on from it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flix.cli.app import app
from tests.helpers.training import Write, ok, run, weights_of


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


def test_a_run_of_an_earlier_flix_goes_on_and_one_of_a_later_flix_is_refused(
    config: Write, tmp_path: Path
) -> None:
    def written(change: Callable[[dict[str, Any]], object]) -> None:
        said = json.loads(file.read_text())
        change(said["settings"])
        file.write_text(json.dumps(said))

    small = {"training": {"steps": 1}, "evaluation": {"at_end": False}}
    ok("train", config(**small))
    longer = config(name="longer.yaml", **{**small, "training": {"steps": 2}})
    file = tmp_path / "run" / "checkpoints" / "run.json"
    # What the earlier one did not have yet was at its default, at the top, in training: and in each dataset.
    for later in ("freeze_start", "start_from"):
        written(lambda s, later=later: s.pop(later))
    written(lambda s: s["training"].pop("packing"))
    written(lambda s: s["datasets"][0].pop("stream"))
    assert ok("train", longer, "--resume")["training"]["steps"] == 2
    written(lambda s: s.pop("seed"))
    result = run(app, ["train", str(config(seed=4, **small)), "--resume"])
    assert result.exit_code == 2 and "seed was 0 and is 4 now" in result.stderr
    written(lambda s: s.update(of_tomorrow=1))
    result = run(app, ["train", str(longer), "--resume"])
    assert (
        result.exit_code == 2 and "of_tomorrow" in result.stderr and "cannot read" in result.stderr
    )


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


def _begun(config: Write, **changes: Any) -> tuple[Path, Path]:
    """A run of one step, and what it says that it goes by."""
    common = {"held_out": [], "implies": {}, "ranks": 1, "feature_dropout": None}
    small = {"training": {"steps": 1}, "evaluation": {"at_end": False}}
    path = config(**common, **small, **changes)
    ok("train", path)
    return path, path.parent / "run" / "checkpoints" / "run.json"


def _not_resumed(path: Path) -> str:
    result = run(app, ["train", str(path), "--resume"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "the files of training rows are not those" in result.stderr
    return str(result.stderr)


def _lines(path: Path, *names: str) -> None:
    rows = [{"source": name, "target": "t"} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("stream", [False, True])
def test_a_hubs_folder_with_other_rows_is_not_resumed(config: Write, tmp_path: Path, stream: bool) -> None:  # fmt: skip
    folder = tmp_path / "hub"
    folder.mkdir()
    _lines(folder / "train.jsonl", "a", "b")
    more = {"stream": True, "rows": 2} if stream else {}
    path, file = _begun(config, datasets=[{"hub": "hub", "features": {"language": "hau"}, **more}])
    ok("train", path, "--resume")
    now = json.loads(file.read_text())
    _lines(folder / "train.jsonl", "a", "c")
    assert "hub [train] has another content" in _not_resumed(path)
    # An earlier flix noted nothing of a hub's rows.
    file.write_text(json.dumps({**now, "data": [None]}))
    ok("train", path, "--resume")


def test_a_stream_with_other_rows_is_not_resumed(config: Write, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    _lines(rows, "a", "b")
    entry = {"files": "rows.jsonl", "features": {"language": "hau"}, "stream": True, "rows": 2}
    path, _ = _begun(config, datasets=[entry])
    ok("train", path, "--resume")
    written = rows.stat().st_mtime_ns
    _lines(rows, "a", "c")
    assert "rows.jsonl was written since" in _not_resumed(path)
    _lines(rows, "a", "cc")
    os.utime(rows, ns=(written, written))
    size = rows.stat().st_size
    assert f"rows.jsonl had {size - 1} bytes and has {size} now" in _not_resumed(path)


def test_files_that_are_called_otherwise_are_not_resumed(config: Write, tmp_path: Path) -> None:
    for name in ("eng", "swa"):
        _lines(tmp_path / f"{name}.rows.jsonl", name)
    registry = {"language": ["eng", "fin", "swa", "zul"]}
    path, file = _begun(config, datasets=[{"files": "{language}.rows.jsonl"}], registry=registry)
    now = json.loads(file.read_text())
    # An earlier flix noted digests alone.
    file.write_text(json.dumps({**now, "data": [one["sha256"] for one in now["data"]]}))
    ok("train", path, "--resume")
    file.write_text(json.dumps(now))
    for name, other in (("eng", "fin"), ("swa", "zul")):
        (tmp_path / f"{name}.rows.jsonl").rename(tmp_path / f"{other}.rows.jsonl")
    assert "fin.rows.jsonl was eng.rows.jsonl" in _not_resumed(path)


def test_damaged_checkpoints_are_named(config: Write, tmp_path: Path) -> None:
    path = config(training={"steps": 2, "save_every": 1}, evaluation={"at_end": False})
    ok("train", path)
    first, last = (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" for step in (1, 2))
    (first / "optimizer.pt").write_bytes(b"x")
    (last / "flix.safetensors").unlink()
    result = run(app, ["train", str(path), "--resume"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "checkpoint-2: flix.safetensors is missing" in result.stderr
    assert "checkpoint-1: optimizer.pt is another than the one that was saved" in result.stderr


def test_two_runs_never_write_in_one_folder(config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from flix.core.holding import alone_in
    from flix.training import run as running
    from flix.transformers import folders

    output, small = tmp_path / "run", {"training": {"steps": 1}, "evaluation": {"at_end": False}}
    path = config(**small)
    output.mkdir()
    with alone_in(output, "flix train"):
        result = run(app, ["train", str(path)])
    assert result.exit_code == 2 and "another flix train is working in this folder" in result.stderr
    assert not [*output.iterdir()]
    # Of several processes of one run, only the first one holds the folder.
    monkeypatch.setenv("RANK", "1")
    with alone_in(output, "flix train"), folders.held(output):
        pass
    monkeypatch.delenv("RANK")
    # The other one is done when this one is about to begin.
    start = running.start

    def late(*given: Any) -> Any:
        found = start(*given)
        (output / "adapter").mkdir()
        return found

    monkeypatch.setattr(running, "start", late)
    result = run(app, ["train", str(path)])
    assert result.exit_code == 2 and "holds a run already" in result.stderr
    assert [file.name for file in output.iterdir()] == ["adapter"]
    (output / "adapter").rmdir()
    result = run(app, ["train", str(path), "--overwrite"])
    assert result.exit_code == 2 and "another flix train wrote there meanwhile" in result.stderr

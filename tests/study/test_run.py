"""Whole studies of a tiny model: what they leave, what they never do twice, and what kill -9 costs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")

from flix.core.errors import RunError, TrainingError
from flix.core.holding import alone_in
from flix.core.progress import Silent
from flix.study import run as running
from flix.study.jobs import Failed, Job, run_jobs
from flix.study.reading import read_study
from flix.study.run import StudyError, planned, study
from flix.study.working import do, rights
from flix.training.reading import read_settings
from flix.training.run import train
from tests.helpers.training import models, one_thread
from tests.study.toys import make_data, write_study

__all__ = ["models", "one_thread"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("toys")
    make_data(folder, models["t5"])
    return folder


@pytest.fixture
def here(monkeypatch):
    """Jobs run in this process; the names of those that did."""
    done = []

    def run_here(jobs, follow, parallel):
        failed = {}
        for job in jobs:
            done.append(job.name)
            try:
                do(job, Silent())
                follow(job, {"event": "done"})
            except Exception as error:
                event = {"event": "failed", "reason": str(error), "diverged": isinstance(error, TrainingError)}  # fmt: skip
                failed[job.name] = Failed(event["reason"], "", event["diverged"])
                follow(job, event)
        return failed

    monkeypatch.setattr(running, "run_jobs", run_here)
    return done


ARMS = {
    "base": {"adapt": False},
    "flix": {"title": "FLix"},
    "lora": {"lora": {"equal_compute": "flix"}},
}


def test_a_study_chooses_then_trains_every_seed_and_tells_all_answers(tmp_path, toys, here):
    path = write_study(tmp_path, toys, arms=ARMS, seeds=2, weights={"language": [1, 0, "searched"]})
    scores = study(read_study(path))
    assert here[:4] == [f"{a}, learning_rate={r}" for r in ("0.01", "0.02") for a in ("flix", "lora")]  # fmt: skip
    assert here[4].startswith("flix, learning_rate=")  # weighs language in held-out cells
    assert here[5:] == [f"{a}, seed {s}" for s in (0, 1) for a in ("base", "flix", "lora")]
    out = tmp_path / "study"
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(scores))
    assert scores["missing"] == [] and all(arm["complete"] for arm in scores["arms"].values())
    flix, lora, base = (scores["arms"][name] for name in ("flix", "lora", "base"))
    assert (flix["active_rank"], flix["total_rank"], lora["total_rank"], base["total_rank"]) == (6, 12, 6, 0)  # fmt: skip
    assert base["trainable"] == 0 and flix["trainable"] == 2 * lora["trainable"]
    for arm in (flix, lora, base):
        assert list(arm["seeds"]) == ["0", "1"]
        cells = arm["seeds"]["1"]["cells"]
        assert len(cells) == 8 and all(len(c["right"]) == c["rows"] == 3 for c in cells.values())
        groups = {name: cell["group"] for name, cell in cells.items()}
        assert groups.pop("task=pos,language=hau") == "last_word" and {*groups.values()} == {"seen"}
    assert [len(e["cells"]) for e in flix["seeds"]["0"]["weights"]] == [1, 1, 1]
    assert "weights" not in lora["seeds"]["0"] and next(iter(scores["data"])).startswith("ner")
    chosen = json.loads((out / "chosen.json").read_text())
    assert set(chosen) == {"base", "flix", "lora"}
    assert [entry["choice"] for entry in chosen["lora"]["table"]] == [
        {"training.learning_rate": "0.01"}, {"training.learning_rate": "0.02"},
    ]  # fmt: skip
    assert len(chosen["flix"]["weights_table"]) == 3 and chosen["flix"]["weights"]["language"] in (0, 1)  # fmt: skip
    here.clear()
    assert study(read_study(path))["arms"] == json.loads(json.dumps(scores["arms"])) and here == []
    assert {how for _, how in planned(read_study(path))} == {"finished"}
    # What other settings would train otherwise is refused, by name.
    with pytest.raises(RunError, match=r"base-0 is a finished run of other settings: training.steps was 6 and is 5 now; remove"):  # fmt: skip
        common = [str(toys / "last_word.yaml"), {"training": {"steps": 5}}]
        write_study(tmp_path, toys, arms=ARMS, seeds=2, weights={"language": [1, 0, "searched"]}, common=common)  # fmt: skip
        study(read_study(path))
    # Seeds that are added are missing until they are trained; the others stay.
    write_study(tmp_path, toys, arms=ARMS, seeds=3, weights={"language": [1, 0, "searched"]})
    scores = study(read_study(path), only=["lora"])
    assert here == ["lora, seed 2"] and scores["missing"] == ["base, seed 2", "flix, seed 2"]
    assert [arm["complete"] for arm in scores["arms"].values()] == [False, False, True]


def test_a_rate_that_diverges_is_no_choice_and_one_that_fails_stops_no_other(
    tmp_path, toys, here, monkeypatch
):
    arms = {
        "flix": {}, "lora-compute": {"lora": {"equal_compute": "flix"}}, "cells": {"lora": {"each": "cell", "rank": 1}},
    }  # fmt: skip
    path = write_study(tmp_path, toys, arms=arms)

    def worse(job, reporter):
        if "flix, learning_rate=0.02" in job.name:
            raise TrainingError("the loss became nan at step 1")
        if "lora-compute, seed" in job.name:
            raise OSError("the disk is full")
        plain(job, reporter)

    plain = do
    monkeypatch.setattr(f"{__name__}.do", worse)
    with pytest.raises(StudyError, match="lora-compute, seed 0: the disk is full") as told:
        study(read_study(path))
    assert "others are done" in str(told.value)
    scores = json.loads((tmp_path / "study" / "scores.json").read_text())
    assert scores["missing"] == ["lora-compute, seed 0"]
    one, other = (scores["arms"][name]["seeds"]["0"]["cells"] for name in ("flix", "cells"))
    assert one.keys() == other.keys()  # named alike, though one arm has a feature for each
    assert other["task=pos,language=hau"]["group"] == "last_word"
    assert {k: c["train"] for k, c in other.items()} == {k: c["train"] for k, c in one.items()}
    chosen = json.loads((tmp_path / "study" / "chosen.json").read_text())
    assert chosen["flix"]["values"] == {"training.learning_rate": 0.01}
    assert chosen["flix"]["table"][1]["diverged"] and chosen["flix"]["table"][1]["seen"] is None


def test_kill_9_loses_no_finished_run_and_the_next_call_goes_on(tmp_path, toys):
    common = [
        str(toys / "last_word.yaml"), {"training": {"steps": 120, "save_every": 6}},
    ]  # fmt: skip
    path = write_study(tmp_path, toys, common=common, arms={"flix": {}}, choosing=None, seeds=2)
    command = [sys.executable, "-m", "flix.cli", "study", str(path), "--parallel", "1"]
    with open(tmp_path / "said", "w", encoding="utf-8") as said:
        began = subprocess.Popen(command, stdout=said, stderr=said)
        first, second = (tmp_path / "study" / "runs" / f"flix-{seed}" for seed in (0, 1))
        until(lambda: any((second / "checkpoints").glob("checkpoint-[3-9]?")), began, tmp_path)
        began.send_signal(signal.SIGKILL)
        began.wait()
    assert (first / "config.yaml").is_file() and not (second / "metrics.json").exists()
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    log = second.with_name("flix-1.log")
    until(lambda: not open_by_any(log), None, tmp_path)  # its process ends with the one that died
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == before
    assert "flix, seed 0" not in done.stdout and "flix, seed 1: done" in done.stdout
    log = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == [*range(6, 121, 6)]
    assert json.loads((tmp_path / "study" / "scores.json").read_text())["missing"] == []
    again = tmp_path / "again"
    settings = read_settings(second.with_name("flix-1.yaml"))
    train(settings.model_copy(update={"output": str(again)}))
    name = "adapter/flix.safetensors"
    assert (again / name).read_bytes() == (second / name).read_bytes()


def until(holds, process, folder):
    for _ in range(1200):
        if holds():
            return
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError((folder / "said").read_text()[-3000:])


def open_by_any(path):
    """Whether a process of this machine has a file open."""
    for place in os.listdir("/proc"):
        if place.isdigit():
            try:
                for handle in os.scandir(f"/proc/{place}/fd"):
                    if os.readlink(handle.path) == str(path):
                        return True
            except OSError:
                continue
    return False


def test_a_job_that_fails_ends_with_its_reason(tmp_path):
    job = Job("flix, seed 0", tmp_path / "flix-0")
    job.beside(".yaml").write_text("model: 3\n")
    failed = run_jobs([job], lambda job, event: None, parallel=1)["flix, seed 0"]
    assert failed.reason.startswith("SettingsError: ") and "Traceback" in failed.log
    assert not failed.diverged


def test_rows_are_right_or_wrong_where_the_score_is_their_share():
    assert rights("seq2seq", [True, False, None]) == [1, 0, None]
    assert rights("classification", [True]) == [1]
    assert rights("tagging", [True, False]) == [None, None]  # scored by entities, not by sentences


def test_two_studies_never_work_in_one_folder(tmp_path, toys, here):
    path = write_study(tmp_path, toys, arms={"flix": {}}, choosing=None)
    read = read_study(path)
    read.output.mkdir()
    with alone_in(read.output, "flix study"), pytest.raises(RunError, match="another flix study is working"):  # fmt: skip
        study(read)
    assert here == []


def test_a_study_never_overwrites_its_own_configuration(tmp_path, toys, here):
    """``output: .`` beside a config.yaml, or settings that it names: the resolved configuration has the same name."""
    path = write_study(tmp_path, toys, arms={"flix": {}}, choosing=None)
    mine = tmp_path / "st" / "config.yaml"
    mine.parent.mkdir()
    data = yaml.safe_load(path.read_text())
    mine.write_text("# mine\n" + yaml.safe_dump({**data, "output": "."}))
    common = tmp_path / "common" / "config.yaml"
    common.parent.mkdir()
    common.write_text("# mine\n" + Path(data["common"]).read_text())
    path.write_text(yaml.safe_dump({**data, "common": str(common), "output": "common"}))
    (tmp_path / "link.yaml").symlink_to(mine)
    for config, kept in ((mine, mine), (tmp_path / "link.yaml", mine), (path, common)):
        for _ in range(2):
            with pytest.raises(
                RunError, match=r"would overwrite its configuration, .*give another"
            ):
                study(read_study(config, out=kept.parent))
        assert kept.read_text().startswith("# mine\n") and [*kept.parent.iterdir()] == [kept]
    (mine.parent / ".lock").touch()  # an earlier flix began here
    with pytest.raises(RunError, match="would overwrite its configuration"):
        study(read_study(mine))
    assert here == []


@pytest.mark.parametrize("name", ["config.yaml", "scores.json", "chosen.json"])
def test_a_study_never_overwrites_what_is_no_study(tmp_path, toys, here, name):
    read = read_study(write_study(tmp_path, toys, arms={"flix": {}}, choosing=None))
    read.output.mkdir()
    (read.output / name).write_text("mine")
    with pytest.raises(RunError, match=f"{name}' belongs to no study, and the study would overwri"):
        study(read)
    assert (read.output / name).read_text() == "mine" and here == []


def test_a_study_goes_on_where_it_began(tmp_path, toys):
    read = read_study(write_study(tmp_path, toys, arms={"flix": {}}, choosing=None))
    running.check_place(read)
    read.output.mkdir()
    (read.output / "config.yaml").write_bytes(running.resolved(read))
    running.check_place(read)  # a system without locks, stopped before the first run
    for name in (".lock", "scores.json"):
        (read.output / name).touch()
        (read.output / "config.yaml").write_text("of other settings")
        running.check_place(read)
        (read.output / name).unlink()

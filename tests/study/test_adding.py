"""Seeds of one study that ran in several places are added up, or refused by what differs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flix.study.adding import added, settings_of
from flix.study.claims import differences
from flix.study.evidence import EvidenceError, read_scores
from flix.study.results import compact, main, numbers, source_line
from tests.study import made
from tests.study.test_results import block, page


def short(seeds: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return compact(made.scores(seeds=seeds, **more))


def test_seeds_of_two_folders_are_one_study(tmp_path: Path) -> None:
    first = made.write(tmp_path / "a", made.scores(study="words", seeds=(0,), commit="aaaaaaa"))
    second = made.write(tmp_path / "b", made.scores(study="words", seeds=(1, 2), commit="bbbbbbb"))
    at_once = made.write(tmp_path / "c", made.scores(study="words", seeds=(0, 1, 2)))
    file = page(tmp_path, "words main")
    for folder in (first, second):
        assert main([str(folder), "--docs", str(file), "--draws", "50", "--add"]) == 0
    kept = read_scores(file.parent / "results" / "words.json")
    assert kept.seeds == (0, 1, 2) and not kept.lacking(list(kept.planned))
    for against in ("lora-compute", "lora-parameters"):
        assert differences(kept, "flix", against, "seen", draws=50) == differences(
            read_scores(at_once), "flix", against, "seen", draws=50
        )
    told = block(file, "words main")
    assert "seed 0 · `flix study made.yaml` · commit aaaaaaa" in told
    assert "seeds 1, 2 · `flix study made.yaml` · commit bbbbbbb" in told and "and 3 seeds" in told


def test_a_seed_that_is_not_done_is_missing_in_both_together() -> None:
    whole = added(short((0,)), short((1, 2), leave_out=[("flix", 2)]))
    assert whole["missing"] == ["flix, seed 2"]
    assert {arm: said["complete"] for arm, said in whole["arms"].items()} == {
        "flix": False,
        "lora-compute": True,
        "lora-parameters": True,
    }
    third = added(whole, short((2,), rates={"flix": made.RATES["flix"]}))
    assert third["missing"] == [] and len(third["parts"]) == 3
    assert third["arms"]["flix"]["complete"] and [*third["arms"]["flix"]["seeds"]] == ["0", "1", "2"]  # fmt: skip


def test_an_arm_of_the_second_part_alone_is_missing_in_the_first() -> None:
    whole = added(short((0,)), short((0,), rates={"new": (0.5, 0.5)}))
    assert whole["missing"] == [] and [*whole["planned"]][-1] == "new"
    whole = added(short((0,)), short((1,), rates={"new": (0.5, 0.5)}))
    assert "new, seed 0" in whole["missing"] and "flix, seed 1" in whole["missing"]


def test_an_arm_that_the_second_part_did_not_run_is_left_to_the_first_and_claims_are_put_together() -> (
    None
):
    claim = {"arm": "new", "against": ["lora-compute"], "cells": "seen", "at_least": 10}
    second = short((0,), rates={"new": (0.5, 0.5)}, claims=[claim])
    second["arms"]["flix"] = {**short((0,))["arms"]["flix"], "seeds": {}, "trainable": None}
    second["planned"]["flix"] = "flix"
    whole = added(short((0,)), second)
    assert whole["missing"] == [] and whole["arms"]["flix"]["trainable"] == 100_000
    assert [*whole["planned"]] == ["flix", "lora-compute", "lora-parameters", "new"]
    assert whole["claims"] == [*short((0,))["claims"], claim]
    assert added(whole, short((1,)))["claims"] == whole["claims"]
    second["planned"] = dict.fromkeys(("flix", "new", "lora-compute", "lora-parameters"), "title")
    assert [*added(short((0,)), second)["planned"]] == [*second["planned"]]


def steps(said: dict[str, Any]) -> None:
    said["arms"]["flix"]["seeds"]["1"]["steps"] = 7


def rank(said: dict[str, Any]) -> None:
    said["arms"]["lora-compute"]["total_rank"] = 7


def choice(said: dict[str, Any]) -> None:
    said["arms"]["flix"]["choice"] = {"training.learning_rate": 7}


def settings(said: dict[str, Any]) -> None:
    said["arms"]["flix"]["settings"] = {"prompts": ["{language} {source}"]}


def rows(said: dict[str, Any]) -> None:
    said["cells"]["language=deu,task=pron"]["rows"] = 7


def data(said: dict[str, Any]) -> None:
    said["data"] = {"pron/deu.train.jsonl": "7"}


@pytest.mark.parametrize(
    "spoil, told",
    [
        (steps, "flix: runs of 100, 7 steps"),
        (rank, "lora-compute: total_rank is"),
        (choice, "flix: choice is"),
        (settings, "flix: settings is"),
        (rows, "cells: language=deu,task=pron is"),
        (data, "data: pron/deu.train.jsonl is 'a' in the scores that are kept and '7'"),
    ],
)
def test_what_differs_is_named(spoil: Callable[[dict[str, Any]], None], told: str) -> None:
    kept, more = (short((seed,), data={"pron/deu.train.jsonl": "a"}) for seed in (0, 1))
    for said in (kept, more):
        said["arms"]["flix"]["settings"] = {"prompts": ["{source}"]}
    added(kept, more)
    before = copy.deepcopy(kept)
    spoil(more)
    with pytest.raises(EvidenceError) as error:
        added(kept, more)
    assert told in str(error.value)
    assert kept == before


def test_a_seed_in_both_is_refused_and_nothing_is_written(tmp_path: Path, capsys: Any) -> None:
    folder = made.write(tmp_path / "a", made.scores(study="words"))
    file = page(tmp_path, "words main")
    assert main([str(folder), "--docs", str(file), "--draws", "50"]) == 0
    before = (file.parent / "results" / "words.json").read_bytes()
    assert main([str(folder), "--docs", str(file), "--draws", "50", "--add"]) == 2
    assert "words: flix: both parts have seed 0, 1" in capsys.readouterr().err
    assert (file.parent / "results" / "words.json").read_bytes() == before
    assert main([str(folder), "--docs", str(file), "--draws", "50"]) == 0  # replaced


def test_settings_are_those_that_answers_depend_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "output: here\nkind: seq2seq\ndatasets: [{prompt: '{source}'}, {prompt: '{source}'}]\n"
        "training: {steps: 7, threads: 1}\nevaluation: {limit: 3, batch_size: 4}\n"
    )
    assert settings_of(tmp_path) == {
        "kind": "seq2seq",
        "prompts": ["{source}"],
        "training": {"steps": 7},
        "evaluation": {"limit": 3},
    }
    assert settings_of(tmp_path / "gone") == {}


def test_seeds_as_people_read_them() -> None:
    assert [numbers(s) for s in ((0,), (0, 2), (1, 2, 3))] == ["seed 0", "seeds 0, 2", "seeds 1 to 3"]  # fmt: skip
    assert "seed" not in source_line(json.loads(json.dumps(made.scores(seeds=(0,)))), "words")

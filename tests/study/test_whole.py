"""From a real, tiny study to the results page: what ``flix study`` writes is what the results read."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")

from flix.core.progress import Silent
from flix.study import run as running
from flix.study.curves import curves_of
from flix.study.evidence import read_scores
from flix.study.reading import CONFIGS, read_study
from flix.study.results import write_results
from flix.study.working import do
from tests.helpers.training import models, one_thread
from tests.study.test_results import block, page
from tests.study.toys import make_data, write_study
from tests.study.words_configs import ALONE, placed

__all__ = ["models", "one_thread"]
BLOCKS = ("main", "claims", "tasks", "sizes", "zero-shot", "ablations", "cost", "weights")


@pytest.mark.slow
def test_a_study_of_tiny_runs_fills_its_page(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(jobs, follow, parallel):
        for job in jobs:
            do(job, Silent())
            follow(job, {"event": "done"})
        return {}

    monkeypatch.setattr(running, "run_jobs", here)
    make_data(tmp_path / "data", models["t5"])
    training = {
        "training": {"eval_every": 3, "save_every": 3, "log_every": 3, "best": "seen.score"}
    }
    claims = [
        {"arm": "flix", "against": ["lora"], "cells": "seen", "at_least": 1},
        {"arm": "flix", "against": ["lora"], "cells": "zero_shot", "at_least": -100},
    ]  # fmt: skip
    data = tmp_path / "data"
    file = write_study(
        tmp_path, data, common=[str(data / "last_word.yaml"), training], seeds=1, claims=claims,
        weights={"language": [1, "searched"]}, choosing={"common": str(data / "choosing.yaml"), "steps": 2},
        arms={"flix": {"title": "FLix"}, "lora": {"lora": {"equal_compute": "flix"}}},
    )  # fmt: skip
    running.study(read_study(file))
    folder = tmp_path / "study"
    docs = page(tmp_path, *(f"toy {what}" for what in BLOCKS))
    assert write_results([folder], docs=docs, draws=100) == {}
    kept = read_scores(docs.parent / "results" / "toy.json")
    assert [arm.name for arm in kept.whole()] == ["flix", "lora"]
    assert kept.planned["flix"] == ("FLix", (0,))
    cells = kept.arm("flix").runs[0].cells
    assert {name: cell.trained for name, cell in cells.items() if cell.group != "seen"} == {"task=pos,language=hau": 0}  # fmt: skip
    assert {cell.trained for cell in cells.values() if cell.group == "seen"} == {12}
    assert all(cell.right is not None and len(cell.right) == 3 for cell in cells.values())
    told = block(docs, "toy weights")
    for how in ("1", "searched"):
        assert f"| FLix | language {how} |" in told
    assert block(docs, "toy claims").count("| FLix |") == 2
    curve = curves_of([read_scores(folder)])[0]
    assert curve.title == "FLix" and [point.steps for point in curve.points] == [6]


@pytest.mark.parametrize("name", ALONE)
def test_shipped_configurations_are_of_the_form(tmp_path: Path, name: str) -> None:
    placed(tmp_path)
    read = read_study(name, data=tmp_path)
    arms = read.settings.arms
    # The first is the one that others are told against.
    assert next(iter(arms)) == "flix" and {"lora-parameters", "lora-compute"} <= {*arms}
    assert len(arms) == {"settle": 4, "ablations": 18}.get(name, 3)
    assert (
        read.common["training"]["steps"] >= (1500 if name == "ablations" else 3000)
        and read.settings.output == f"study-{name}"
    )
    assert (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")


def test_languages_that_are_never_trained_are_the_study_s_own(tmp_path: Path) -> None:
    from flix.study.words import LANGUAGES

    placed(tmp_path)
    read = read_study("unseen", data=tmp_path)
    held = [cell["language"] for cell in read.common["held_out"]]
    others = [code for code in LANGUAGES if code not in held]
    near = {code: any(LANGUAGES[o].branch == LANGUAGES[code].branch for o in others) for code in held}  # fmt: skip
    assert sum(near.values()) == 6 and not near["hye"] and not near["tha"]
    assert {LANGUAGES[code].script for code in others} >= {"Latn", "Cyrl", "Deva"}

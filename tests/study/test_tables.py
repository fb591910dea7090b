"""A study's tables: what stands in them, what is left out, and that metrics are not mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flix.study import tables
from flix.study.evidence import EvidenceError, Study, read_scores
from tests.study import made


def study_of(folder: Path, change: Any = None, **more: Any) -> Study:
    said = made.scores(**more)
    if change is not None:
        change(said)
    return read_scores(made.write(folder, said))


def column(table: tables.Table, heading: str) -> list[str]:
    return [row[table.headings.index(heading)] for row in table.rows]


def test_the_main_table_has_every_finished_arm(tmp_path: Path) -> None:
    table = tables.main_table(study_of(tmp_path, leave_out=[("lora-compute", 1)]))
    assert column(table, "method") == ["flix", "lora, parameters"]
    assert column(table, "active rank") == ["12", "14"] and column(table, "parameters") == ["100,000", "300,000"]  # fmt: skip
    assert (
        "These runs are not finished, so their methods are left out: lora-compute, seed 1."
        in table.note
    )
    assert "9 seen, 2 zero-shot" in table.note and "2 seeds" in table.note


def with_denoise(said: Any) -> None:
    """``flix-denoise`` learns a task more, and answers all of it rightly; the base is not trained."""
    for run in said["arms"]["flix-denoise"]["seeds"].values():
        for language in made.LANGUAGES:
            cell = run["cells"][f"language={language},task=inflect"]
            more = {**cell, "features": {"language": language, "task": "denoise"}, "score": 100.0, "right": [1] * cell["rows"]}  # fmt: skip
            run["cells"][f"language={language},task=denoise"] = more
    said["arms"]["base"]["trainable"] = 0


RATES = {**made.RATES, "base": (0.0, 0.0), "flix-denoise": (0.6, 0.4)}


def test_the_main_table_has_the_claims_arms_and_the_base_and_the_other_every_arm(tmp_path: Path) -> None:  # fmt: skip
    study = study_of(tmp_path, with_denoise, rates=RATES)
    names = ["flix", "lora, compute", "lora, parameters", "base"]
    assert column(tables.main_table(study), "method") == names
    assert column(tables.main_table(study, every=True), "method") == [*names, "flix, denoise"]


def test_arms_that_learn_more_tasks_are_compared_on_the_cells_that_all_have(tmp_path: Path) -> None:
    study = study_of(tmp_path / "a", with_denoise, rates=RATES)
    plain = study_of(tmp_path / "b", lambda said: said["arms"]["base"].update(trainable=0), rates=RATES)  # fmt: skip
    for make in (lambda s: tables.main_table(s, every=True), tables.cost, tables.ablations, tables.by_task, tables.by_size):  # fmt: skip
        assert make(study) == make(plain)
    assert "9 seen" in tables.main_table(study, every=True).note


def test_means_count_each_cell_once_and_spreads_are_over_seeds(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    arm = study.arm("flix")
    cells = tables.cells_of(arm, "seen", "exact_match")
    by_seed = [np.mean([run.cells[name].score for name in cells]) for run in arm.runs.values()]
    expected = f"{np.mean(by_seed):.1f} ± {np.std(by_seed, ddof=1):.1f}"
    assert column(tables.main_table(study), "seen")[0] == expected
    assert "±" not in column(tables.main_table(study_of(tmp_path / "one", seeds=[0])), "seen")[0]


def test_the_claims_table_says_yes_and_no(tmp_path: Path) -> None:
    table = tables.claims_table(study_of(tmp_path, rows=60), draws=400)
    assert column(table, "holds") == ["yes", "yes", "**no**"]
    assert column(table, "claimed")[2] == "50 or more"
    assert column(table, "ahead by")[0].startswith("+")
    assert float(column(table, "p")[0].removeprefix("< ")) < 0.01


def test_tasks_and_sizes_share_out_the_seen_cells(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    by_task, by_size = tables.by_task(study), tables.by_size(study)
    assert column(by_task, "task") == ["inflect", "pron", "accent"]
    assert column(by_task, "cells") == ["4", "3", "2"]
    assert column(by_size, "cells") == ["3", "2", "2", "2"]
    assert column(by_size, "training rows") == ["50 to 150", "200 to 250", "300 to 350", "500 to 600"]  # fmt: skip
    assert column(tables.by_cell(study), "cell") == ["swa pron", "deu accent"]


def test_cells_of_one_size_are_one_part(tmp_path: Path) -> None:
    def alike(said: Any) -> None:
        for arm in said["arms"].values():
            for run in arm["seeds"].values():
                for cell in run["cells"].values():
                    cell["train"] = 12 * (cell["group"] == "seen")

    table = tables.by_size(study_of(tmp_path, alike))
    assert column(table, "training rows") == ["12 to 12"] and column(table, "cells") == ["9"]


def test_ablations_are_told_against_the_first_arm(tmp_path: Path) -> None:
    table = tables.ablations(study_of(tmp_path, rows=60), draws=200)
    assert column(table, "method") == ["lora, compute", "lora, parameters"]
    assert column(table, "seen")[0].startswith("−") and " to " in column(table, "seen")[0]
    assert "Points against flix" in table.note


def test_costs_are_means_of_the_runs(tmp_path: Path) -> None:
    table = tables.cost(study_of(tmp_path))
    assert (
        column(table, "seconds a run")[0] == "60" and column(table, "seconds a step")[0] == "0.60"
    )


def test_metrics_have_columns_of_their_own(tmp_path: Path) -> None:
    def change(said: Any) -> None:
        for arm in said["arms"].values():
            for run in arm["seeds"].values():
                for name, cell in run["cells"].items():
                    if "task=pron" in name:
                        cell["metric"] = "entity_f1"

    study = study_of(tmp_path, change)
    table = tables.main_table(study)
    assert table.headings[3:] == (
        "seen, exact match", "seen, entity f1", "zero-shot, entity f1", "zero-shot, exact match",
    )  # fmt: skip
    with pytest.raises(EvidenceError, match="several metrics: entity_f1, exact_match"):
        tables.by_languages([study])


def test_unseen_languages_are_told_apart_by_their_relatives(tmp_path: Path) -> None:
    relatives = {"swa": ["zul"], "deu": []}
    table = tables.unseen(study_of(tmp_path, relatives=relatives, rows=10))
    whole, near, far = (float(column(table, h)[0].split(" ")[0]) for h in ("all", "with relatives", "without"))  # fmt: skip
    assert whole == pytest.approx((near + far) / 2, abs=0.11)
    assert "swa (zul), deu (none)" in table.note


def test_more_languages_stand_in_order_with_their_common_cells(tmp_path: Path) -> None:
    def without_kat(said: Any) -> None:
        for arm in said["arms"].values():
            for run in arm["seeds"].values():
                run["cells"] = {k: v for k, v in run["cells"].items() if "kat" not in k}

    large, small = study_of(tmp_path / "a"), study_of(tmp_path / "b", without_kat)
    table = tables.by_languages([large, small])
    assert column(table, "languages") == ["3", "4"]
    assert "the 7 cells of the languages that all mixtures have" in table.note
    assert column(table, "flix: common")[0] == column(table, "flix: seen")[0]


def test_nothing_finished_makes_no_table(tmp_path: Path) -> None:
    every = [(arm, 1) for arm in made.RATES]
    study = study_of(tmp_path, leave_out=every)
    makes: list[Any] = [
        tables.main_table, tables.by_task, tables.by_size, tables.by_cell, tables.ablations, tables.cost, tables.unseen,
    ]  # fmt: skip
    for make in makes:
        with pytest.raises(
            EvidenceError, match="has nothing for this table; it lacks flix, seed 1"
        ):
            make(study)


def test_a_missing_run_makes_an_arm_partial_whatever_else_is_said(tmp_path: Path) -> None:
    def older(said: Any) -> None:
        del said["planned"], said["seeds"], said["claims"]

    table = tables.main_table(study_of(tmp_path, older, leave_out=[("flix", 1)]))
    assert column(table, "method") == ["lora, compute", "lora, parameters"]


def test_markdown_keeps_bars_inside_cells() -> None:
    table = tables.Table(("a", "b"), [("x|y", "1")], "Note.")
    assert table.markdown() == "| a | b |\n|---|---:|\n| x\\|y | 1 |\n\nNote."


def test_numbers_are_written_alike() -> None:
    assert (tables.signed(2.04), tables.signed(-2.0)) == ("+2.0", "−2.0")
    assert (tables.p_text(1 / 1001, 1000), tables.p_text(0.25, 1000)) == ("< 0.0020", "0.2500")

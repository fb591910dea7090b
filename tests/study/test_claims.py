"""The bootstrap against cases with a known answer, how often its intervals cover the truth, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from flix.report.reading import ReportError
from flix.study.claims import (
    Table,
    by_metric,
    differences,
    estimate,
    findings,
    level,
    paired,
    resampled,
)
from flix.study.evidence import EvidenceError, Study, read_scores
from tests.study import made


def study_of(tmp_path: Path, **more: object) -> Study:
    return read_scores(made.write(tmp_path / "study", made.scores(**more)))  # type: ignore[arg-type]


def test_the_figure_is_the_mean_over_cells_however_many_items_each_has() -> None:
    found = estimate([np.full((2, 10), 6.0), np.full((2, 1000), 0.0)], draws=200)
    assert found.value == 3.0
    assert (found.cells, found.items, found.seeds) == (2, 1010, 2)


def test_what_never_varies_has_no_width_and_the_least_p() -> None:
    found = estimate([np.full((3, 5), 7.0)] * 4, draws=999)
    assert (found.value, found.low, found.high) == pytest.approx((7.0, 7.0, 7.0))
    assert found.p == 1 / 1000


def test_no_difference_at_all_has_p_1() -> None:
    found = estimate([np.zeros((3, 5))] * 4, draws=200)
    assert (found.value, found.p) == (0.0, 1.0)


def test_a_draw_is_the_mean_over_the_cells_items_and_seeds_that_it_took() -> None:
    # Two cells and two seeds: one of each is taken, so a draw is one of four means where items do not vary.
    tables: list[Table] = [np.array([[1.0], [2.0]]), np.array([[4.0], [8.0]])]
    drawn = resampled(tables, 4000, np.random.default_rng(0))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [1.0, 2.0, 4.0, 8.0]
    assert (np.abs(counts / 4000 - 0.25) < 0.03).all()


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_variance_over_few_seeds_or_cells_is_met_without_bias(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    expected = values.var(ddof=1) / count
    by_seed = resampled([values[:, None]], 20_000, np.random.default_rng(1))
    by_cell = resampled([np.array([[v]]) for v in values], 20_000, np.random.default_rng(2))
    assert by_seed.var() == pytest.approx(expected, rel=0.06)
    assert by_cell.var() == pytest.approx(expected, rel=0.06)


def test_the_variance_over_items_is_the_sample_s() -> None:
    items = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    drawn = resampled([items[None]], 20_000, np.random.default_rng(1))
    assert drawn.var() == pytest.approx(items.var() / 50, rel=0.06)
    assert drawn.mean() == pytest.approx(items.mean(), abs=0.005)


def test_items_are_drawn_alike_for_all_seeds() -> None:
    # Seeds that answer in opposite ways cancel item by item; drawn apart they would not.
    items = np.random.default_rng(0).integers(0, 2, 40) * 100.0
    seeds = np.stack([items, 100.0 - items])
    both = resampled([np.concatenate([seeds, seeds])], 2000, np.random.default_rng(1))
    alone = seeds.mean(0)
    assert np.allclose(alone, 50.0)
    assert both.var() < resampled([items[None]], 2000, np.random.default_rng(1)).var()


def simulated(rng: np.random.Generator, effect: float) -> list[Table]:
    """Differences in points, of 16 cells, 50 items and 5 seeds, around a true mean of ``0.8 * effect``.

    The gain is another in every cell and with every seed; items are easy or hard for both arms, and a tenth of the
    answers is turned round by chance.
    """
    cells, seeds = rng.normal(0, 12.0, 16), rng.normal(0, 2.0, 5)
    tables = []
    for cell in cells:
        gain = np.clip((effect + cell + seeds) / 100, -0.48, 0.48)[:, None]
        hard = rng.random(50)[None]
        a, b = (hard < 0.5 + gain / 2), (hard < 0.5 - gain / 2)
        turned = rng.random((2, 5, 50)) < 0.1
        tables.append(100.0 * ((a ^ turned[0]).astype(float) - (b ^ turned[1]).astype(float)))
    return tables


def covered(only: str = "", runs: int = 300) -> float:
    """How often the interval holds the truth."""
    rng, hits = np.random.default_rng(7), 0
    for _ in range(runs):
        tables = simulated(rng, 10.0)
        if only == "items":
            tables = [np.concatenate([table.mean(0) for table in tables])[None]]
        found = estimate(tables, draws=300, seed=int(rng.integers(1 << 30)))
        hits += found.low <= 8.0 <= found.high
    return hits / runs


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    assert 0.94 <= covered() <= 0.99


def test_intervals_over_items_alone_would_not() -> None:
    assert covered(only="items") < 0.85


def test_a_difference_is_found_where_there_is_none_about_as_rarely_as_p_says() -> None:
    rng = np.random.default_rng(3)
    ps = np.array([estimate(simulated(rng, 0.0), draws=300, seed=i).p for i in range(300)])
    assert 0.005 <= np.mean(ps < 0.05) <= 0.06
    assert 0.4 <= np.median(ps) <= 0.7


def test_the_same_scores_give_the_same_figures() -> None:
    tables = simulated(np.random.default_rng(0), 5.0)
    assert estimate(tables, draws=300) == estimate(tables, draws=300)
    assert estimate(tables, draws=300) != estimate(tables, draws=300, seed=1)


def test_claims_hold_or_fall_short(tmp_path: Path) -> None:
    study = study_of(tmp_path, rows=60, seeds=(0, 1, 2))
    found = findings(study, draws=2000)
    assert [(f.against, f.group, f.holds) for f in found] == [
        ("lora-compute", "seen", True),
        ("lora-parameters", "seen", True),
        ("lora-compute", "zero_shot", False),
    ]
    assert found[0].difference.value == pytest.approx(20, abs=3)
    assert found[0].difference.cells == 9 and found[0].difference.items == 540
    assert found[2].at_least == 50


def test_a_large_difference_of_two_cells_with_a_large_p_does_not_hold(tmp_path: Path) -> None:
    said = made.scores(rows=4)
    claim = {"arm": "flix", "against": "lora-compute", "cells": "zero_shot", "at_least": -100}
    study = read_scores(made.write(tmp_path, {**said, "claims": [claim]}))
    (found,) = findings(study, draws=500)
    assert found.difference.p > 0.01 and found.holds is False


def test_turned_round_the_difference_is_its_negative(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    (one,) = differences(study, "flix", "lora-compute", "seen", draws=400)
    (other,) = differences(study, "lora-compute", "flix", "seen", draws=400)
    assert one.value == -other.value and one.metric == "exact_match"


def test_a_level_is_the_arm_s_own_mean(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    names = by_metric(study.arm("flix"), "seen")["exact_match"]
    found = level(study, "flix", names)
    runs = study.arm("flix").runs.values()
    assert found.value == pytest.approx(np.mean([run.cells[n].score for run in runs for n in names]))  # fmt: skip
    assert found.low < found.value < found.high


def test_an_arm_with_one_seed_stands_beside_all_of_the_other(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=(0, 1, 2))
    base = study.arms["lora-compute"].runs
    one = {0: base[0]}
    arm = study.arm("flix")
    other = type(arm)("base", "base", runs=one)
    name = "language=deu,task=inflect"
    (table,) = paired(arm, other, [name])
    expected = [100.0 * (arm.runs[s].cells[name].right - one[0].cells[name].right) for s in (0, 1, 2)]  # type: ignore[operator]  # fmt: skip
    assert np.array_equal(table, expected)


def test_runs_are_paired_seed_by_seed_and_item_by_item(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=(0, 1, 2))
    mine, theirs = study.arm("flix"), study.arm("lora-compute")
    names = by_metric(mine, "last_word")["exact_match"]
    for name, table in zip(names, paired(mine, theirs, names), strict=True):
        for seed, row in enumerate(table):
            a, b = (arm.runs[seed].cells[name].right for arm in (mine, theirs))
            assert a is not None and b is not None
            assert row.tolist() == [100.0 * (int(x) - int(y)) for x, y in zip(a, b, strict=True)]


def test_arms_of_other_seeds_are_not_paired(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=(0, 1, 2))
    arm = study.arm("flix")
    other = type(arm)("other", "other", runs={seed: arm.runs[seed] for seed in (0, 1)})
    with pytest.raises(EvidenceError, match=r"different seeds, \[0, 1, 2\] and \[0, 1\]"):
        paired(arm, other, ["language=deu,task=inflect"])


def test_cells_without_right_and_wrong_count_as_one_item(tmp_path: Path) -> None:
    said = made.scores()
    for arm in said["arms"].values():
        for run in arm["seeds"].values():
            for cell in run["cells"].values():
                cell["right"] = None
    study = read_scores(made.write(tmp_path, said))
    (found,) = differences(study, "flix", "lora-compute", "seen", draws=300)
    whole = study_of(tmp_path / "other")
    (by_item,) = differences(whole, "flix", "lora-compute", "seen", draws=300)
    assert found.value == pytest.approx(by_item.value)
    assert (found.items, by_item.items) == (9, 180)


def test_rows_count_one_by_one_only_if_every_run_tells_them(tmp_path: Path) -> None:
    said = made.scores(seeds=(0, 1))
    for cell in said["arms"]["flix"]["seeds"]["1"]["cells"].values():
        cell["right"] = None
    study = read_scores(made.write(tmp_path / "study", said))
    whole = study_of(tmp_path / "whole", seeds=(0, 1))
    cells = by_metric(whole.arm("flix"), "seen")["exact_match"]
    found, wanted = level(study, "flix", cells), level(whole, "flix", cells)
    assert found.value == pytest.approx(wanted.value) and found.items == len(cells)
    one, other = (differences(s, "flix", "lora-compute", "seen", draws=200)[0] for s in (study, whole))  # fmt: skip
    assert one.value == pytest.approx(other.value) and one.items == len(cells)


def test_metrics_are_kept_apart(tmp_path: Path) -> None:
    said = made.scores()
    for arm in said["arms"].values():
        for run in arm["seeds"].values():
            for name, cell in run["cells"].items():
                if "task=pron" in name:
                    cell["metric"] = "entity_f1"
    study = read_scores(made.write(tmp_path, said))
    found = differences(study, "flix", "lora-compute", "seen", draws=200)
    assert [(f.metric, f.cells) for f in found] == [("exact_match", 6), ("entity_f1", 3)]


def test_an_arm_that_is_not_finished_makes_no_claim(tmp_path: Path) -> None:
    study = study_of(tmp_path, leave_out=[("lora-compute", 1)])
    with pytest.raises(EvidenceError, match=r"not finished: it lacks lora-compute, seed 1"):
        findings(study)
    assert [arm.name for arm in study.whole()] == ["flix", "lora-parameters"]
    absent = study_of(tmp_path / "b", leave_out=[("flix", 0), ("flix", 1)])
    assert absent.lacking(["flix"]) == ["flix, seed 0", "flix, seed 1"]
    with pytest.raises(EvidenceError, match="lacks flix, seed 0"):
        absent.arm("flix")


@pytest.mark.parametrize(
    ("claim", "error", "text"),
    [
        ({"arm": "flxi", "against": "lora-compute", "cells": "seen"}, EvidenceError, "no arm 'flxi'"),
        ({"arm": "flix", "against": "lora", "cells": "seen"}, EvidenceError, "no arm 'lora'"),
        ({"arm": "flix", "against": "lora-compute", "cells": "all"}, EvidenceError, "cells must be one of"),
        ({"arm": "flix", "cells": "seen"}, ReportError, "against is missing"),
        ({"arm": "flix", "against": [3], "cells": "seen"}, ReportError, "must be a text"),
    ],
)  # fmt: skip
def test_claims_that_name_what_is_not_there_are_refused(
    tmp_path: Path, claim: dict[str, object], error: type[Exception], text: str
) -> None:
    study = read_scores(made.write(tmp_path, {**made.scores(), "claims": [claim]}))
    with pytest.raises(error, match=text):
        findings(study, draws=10)


def test_arms_are_compared_on_the_cells_that_both_have(tmp_path: Path) -> None:
    said = made.scores()
    for run in said["arms"]["flix"]["seeds"].values():
        more = {**run["cells"]["language=deu,task=inflect"], "features": {"language": "deu", "task": "denoise"}}  # fmt: skip
        run["cells"]["language=deu,task=denoise"] = more
    study, plain = read_scores(made.write(tmp_path / "a", said)), study_of(tmp_path / "b")
    for one, other in (("flix", "lora-compute"), ("lora-compute", "flix")):
        assert differences(study, one, other, "seen", draws=50) == differences(plain, one, other, "seen", draws=50)  # fmt: skip
    for run in said["arms"]["flix"]["seeds"].values():
        run["cells"] = {"language=deu,task=denoise": run["cells"]["language=deu,task=denoise"]}
    study = read_scores(made.write(tmp_path / "c", said))
    with pytest.raises(
        EvidenceError, match="'flix' and 'lora-compute' have no seen cell in common"
    ):
        differences(study, "flix", "lora-compute", "seen")


def test_other_rows_cannot_be_paired(tmp_path: Path) -> None:
    said = made.scores()
    name = "language=deu,task=inflect"
    cell = said["arms"]["lora-compute"]["seeds"]["1"]["cells"][name]
    cell["rows"], cell["right"] = 19, cell["right"][:19]
    study = read_scores(made.write(tmp_path, said))
    with pytest.raises(EvidenceError, match=f"{name}.*20 rows by exact_match.*19 by"):
        differences(study, "flix", "lora-compute", "seen")
    del said["arms"]["lora-compute"]["seeds"]["1"]["cells"][name]
    study = read_scores(made.write(tmp_path, said))
    with pytest.raises(EvidenceError, match=f"'lora-compute', seed 1, lacks the cell '{name}'"):
        differences(study, "flix", "lora-compute", "seen")


def test_nothing_has_no_mean() -> None:
    for tables in ([], [np.zeros((2, 0))], [np.zeros(3)]):
        with pytest.raises(EvidenceError, match="at least one cell"):
            estimate(tables)
    with pytest.raises(EvidenceError, match="the same number of seeds"):
        estimate([np.zeros((2, 3)), np.zeros((3, 3))])


def test_a_score_that_is_no_number_is_no_zero(tmp_path: Path) -> None:
    said = made.scores()
    cell = said["arms"]["flix"]["seeds"]["0"]["cells"]["language=deu,task=inflect"]
    cell["score"], cell["right"] = None, None
    study = read_scores(made.write(tmp_path, said))
    assert math.isnan(study.arm("flix").runs[0].cells["language=deu,task=inflect"].score)
    with pytest.raises(EvidenceError, match="'flix', seed 0, has no score"):
        differences(study, "flix", "lora-compute", "seen", draws=10)

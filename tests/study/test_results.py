"""The results page: its blocks, what is kept of the scores, the pictures, and what is left out."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flix.study import results
from flix.study.evidence import EvidenceError, read_scores
from flix.study.plots import SERIES, Dot, Line, Plots, apart, large
from flix.study.results import compact, keep, main, write_results
from tests.study import made


def page(folder: Path, *blocks: str) -> Path:
    """A page with blocks, and prose around them."""
    file = folder / "docs" / "results.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"Before {b}.\n\n<!-- results: {b} -->\nold\n<!-- end -->\n\n" for b in blocks)
    file.write_text(f"# Results\n\n{text}After.\n", encoding="utf-8")
    return file


def study(folder: Path, name: str, **more: Any) -> Path:
    return made.write(folder / f"study-{name}", made.scores(study=name, **more))


def block(file: Path, name: str) -> str:
    found = re.search(rf"<!-- results: {re.escape(name)} -->\n(.*?)<!-- end -->", file.read_text(), re.DOTALL)  # fmt: skip
    assert found
    return found[1]


WORDS = (
    "main",
    "all",
    "claims",
    "tasks",
    "zero-shot-tasks",
    "sizes",
    "zero-shot",
    "ablations",
    "cost",
)


def test_every_block_of_a_study_is_filled(tmp_path: Path) -> None:
    file = page(tmp_path, *(f"words {what}" for what in WORDS))
    assert write_results([study(tmp_path, "words")], docs=file, draws=100) == {}
    text = file.read_text()
    assert "-->\nold" not in text and text.startswith("# Results\n\nBefore words main.") and text.endswith("After.\n")  # fmt: skip
    for what in WORDS:
        told = block(file, f"words {what}")
        assert "| flix" in told or "| lora" in told or "| task" in told or "| training rows" in told or "| cell" in told  # fmt: skip
        for wanted in ("`flix study made.yaml`", "commit 0123abc", "2 processors", "2026-11-27", "results/words.json"):  # fmt: skip
            assert wanted in told, (what, wanted)
    pictures = sorted(p.name for p in (file.parent / "results").glob("*.svg"))
    assert pictures == [f"words-{what}.svg" for what in ("ablations", "cost", "main", "sizes", "tasks", "zero-shot")]  # fmt: skip
    for name in pictures:
        assert f"](results/{name})" in text


def test_the_same_scores_give_the_same_page_and_pictures_and_need_no_folder(tmp_path: Path) -> None:
    file = page(tmp_path, "words main", "words claims")
    write_results([study(tmp_path, "words")], docs=file, draws=100)
    before = {p.name: p.read_bytes() for p in (*file.parent.glob("*.md"), *(file.parent / "results").iterdir())}  # fmt: skip
    write_results([], docs=file, draws=100)
    after = {p.name: p.read_bytes() for p in (*file.parent.glob("*.md"), *(file.parent / "results").iterdir())}  # fmt: skip
    assert before == after


def test_what_is_missing_is_said_and_nothing_else_is_lost(tmp_path: Path, capsys: Any) -> None:
    file = page(tmp_path, "words main", "african main", "languages many", "unseen served", "settle speed", "official segmentation")  # fmt: skip
    assert main([str(study(tmp_path, "words")), "--docs", str(file), "--draws", "50"]) == 0
    said = capsys.readouterr().out
    for name in ("african", "languages", "settle"):
        assert f"no run yet: `flix study {name}`" in said
    assert block(file, "african main") == "*Left out: no run yet: `flix study african`.*\n"
    assert "`python -m flix.study.unseen study-unseen`" in block(file, "unseen served")
    assert "| flix" in block(file, "words main")


def test_a_study_without_a_finished_arm_is_left_out_with_the_reason(tmp_path: Path) -> None:
    file = page(tmp_path, *(f"words {what}" for what in WORDS))
    folder = study(tmp_path, "words", leave_out=[(arm, 1) for arm in made.RATES])
    missing = write_results([folder], docs=file, draws=50)
    assert sorted(missing) == sorted(f"words {what}" for what in WORDS)
    assert "lacks flix, seed 1" in block(file, "words main")
    claims = page(tmp_path, "words claims")
    write_results([study(tmp_path, "words", leave_out=[("lora-compute", 0)])], docs=claims, draws=50)  # fmt: skip
    assert "not finished: it lacks lora-compute, seed 0" in block(claims, "words claims")


def test_what_is_kept_reads_as_what_was_written(tmp_path: Path) -> None:
    said = made.scores(rows=30)
    said["arms"]["flix"]["seeds"]["0"]["cells"]["language=deu,task=inflect"]["train"] = (
        7  # another than the rest's
    )
    folder = made.write(tmp_path / "study", said)
    (tmp_path / "kept.json").write_text(json.dumps(compact(said)))
    first, second = read_scores(folder), read_scores(tmp_path / "kept.json")
    assert first.arms.keys() == second.arms.keys() and first.made == second.made
    for name, arm in first.arms.items():
        for seed, run in arm.runs.items():
            for cell, mine in run.cells.items():
                theirs = second.arms[name].runs[seed].cells[cell]
                assert np.array_equal(mine.right, theirs.right)  # type: ignore[arg-type]
                assert {**mine.__dict__, "right": 0} == {**theirs.__dict__, "right": 0}
    assert len(json.dumps(compact(said))) < 0.6 * len(json.dumps(said))


def test_kept_json_is_whole_and_has_a_line_for_each_cell(tmp_path: Path) -> None:
    keep(study(tmp_path, "words"), tmp_path / "kept")
    text = (tmp_path / "kept" / "words.json").read_text()
    assert json.loads(text) == json.loads(json.dumps({**compact(made.scores(study="words"))}))
    assert len(text.splitlines()) > 3 * 2 * 12


def test_studies_of_some_languages_are_kept_by_their_number(tmp_path: Path) -> None:
    def only(*languages: str) -> dict[str, Any]:
        said = made.scores(study="languages")
        for arm in said["arms"].values():
            for run in arm["seeds"].values():
                run["cells"] = {k: v for k, v in run["cells"].items() if v["features"]["language"][0] in languages}  # fmt: skip
        return said

    folders = [
        made.write(tmp_path / "a", only("deu", "fin", "kat", "swa")),
        made.write(tmp_path / "b", only("deu", "fin")),
    ]
    file = page(tmp_path, "languages many")
    assert write_results(folders, docs=file, draws=50) == {}
    kept = sorted(p.name for p in (file.parent / "results").iterdir())
    assert kept == ["languages-02.json", "languages-04.json", "languages.svg"]
    assert "| 2 |" in block(file, "languages many") and "| 4 |" in block(file, "languages many")


def test_studies_of_different_lengths_make_one_picture(tmp_path: Path) -> None:
    file = page(tmp_path, "settle speed")
    for steps in (3000, 12000):
        said = made.scores(study="settle", seeds=[0])
        for arm in said["arms"].values():
            arm["seeds"]["0"]["steps"] = steps
        folder = made.write(tmp_path / f"study-settle-{steps}", said)
        assert write_results([folder], docs=file) == {}
    kept = sorted(p.name for p in (file.parent / "results").iterdir())
    assert kept == ["settle-03000.json", "settle-12000.json", "settle-speed.svg"]
    told = block(file, "settle speed")
    assert "| flix | 3,000 |" in told and "| flix | 12,000 |" in told
    assert "results/settle-03000.json" in told and "results/settle-12000.json" in told


def test_official_test_sets_stand_beside_what_was_published(tmp_path: Path) -> None:
    said = {
        "title": "FLix", "runs": ["flix-0"], "limit": None, "command": ["python"], "commit": None,
        "tasks": {
            "segment": {"ces": {"rows": 4000, "rows_new": 3000, "trained": 500, "runs": [{"f1": 91.234, "exact": 80.0}]}},
            "inflect": {"spa": {"rows": 1000, "rows_new": 0, "trained": 0, "runs": [{"exact": 30.0, "exact_new": None}]}},
            "pron": {"ell": {"rows": 100, "rows_new": 90, "trained": 9000, "runs": [{"exact": 81.0, "exact_new": 80.0}]}},
        },
    }  # fmt: skip
    folder = tmp_path / "study-official"
    folder.mkdir()
    (folder / "official.json").write_text(json.dumps(said))
    file = page(tmp_path, "official segmentation", "official inflection", "official pronunciation")
    assert write_results([folder], docs=file) == {}
    assert "| ces | 4,000 | 500 | trained | 91.2 | 20.4 | 23.7 | 29.4 | 93.4 | 93.8 | 93.8 |" in block(file, "official segmentation")  # fmt: skip
    assert "| spa | 1,000 | 0 | zero-shot | 30.0 | – | 0 |" in block(file, "official inflection")
    assert "| ell | 100 | 9,000 | trained | 81.0 | 80.0 | 90 | 79.0 | 800 |" in block(file, "official pronunciation")  # fmt: skip


def test_blocks_that_nothing_fills_and_folders_that_are_none_are_refused(tmp_path: Path, capsys: Any) -> None:  # fmt: skip
    file = page(tmp_path, "words mean")
    with pytest.raises(EvidenceError, match="nothing fills the block 'words mean'"):
        write_results([], docs=file)
    with pytest.raises(EvidenceError, match=r"holds none of scores.json, unseen.json, official.json"):  # fmt: skip
        write_results([tmp_path], docs=file)
    assert main(["--docs", str(tmp_path / "none.md")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_pictures_are_svg_with_a_title_and_both_schemes(tmp_path: Path) -> None:
    plots = Plots()
    dots = plots.dots("A <title>", ["a", "b"], {"x": [{"": Dot(1, 0, 2)}, {"": Dot(2)}]}, "points", numbers=True)  # fmt: skip
    lines = plots.lines("L", {"": [Line("one", [0, 1], [2, 3], [(1, 3), (2, 4)])]}, {"": "x"}, "y")
    scatter = plots.scatter("S", {"a": (10.0, Dot(1, 0, 2)), "base": (0.0, Dot(0.5))}, "x", "y")
    for svg in (dots, lines, scatter):
        root = Xml.fromstring(svg)
        assert root.tag.endswith("svg") and root.get("role") == "img"
        assert "prefers-color-scheme: dark" in svg and "currentColor" in svg
    assert Xml.fromstring(dots).get("aria-label") == "A <title>"
    texts = {"".join(t.itertext()).strip() for t in Xml.fromstring(dots).iter() if t.tag.endswith("text")}  # fmt: skip
    assert {"a", "b", "1.0", "2.0", "points"} <= texts


def test_panels_of_several_metrics_say_theirs_and_leading_rows_have_one_colour(tmp_path: Path) -> None:  # fmt: skip
    said = made.scores(study="african", seeds=[0])
    for arm in said["arms"].values():
        for cell in (
            c for run in arm["seeds"].values() for n, c in run["cells"].items() if "pron" in n
        ):
            cell["metric"] = "entity_f1"
    file = page(tmp_path, "african main", "african tasks", "african claims", "unseen served")
    served = made.scores({"flix, skip": (0, 0.2), "flix, mean": (0, 0.4), "lora, as it is": (0, 0.3)}, study="unseen", claims=[])  # fmt: skip
    unseen = made.write(tmp_path / "unseen", {})
    (unseen / "unseen.json").write_text(json.dumps(served))
    assert write_results([made.write(tmp_path / "a", said), unseen], docs=file, draws=50) == {}
    main_svg, served_svg = ((file.parent / "results" / f"{n}.svg").read_text() for n in ("african-main", "unseen-served"))  # fmt: skip
    for heading in (
        "seen cells, exact match",
        "seen cells, entity f1",
        "zero-shot cells, entity f1",
    ):
        assert heading in main_svg
    marks = [served_svg.count(f"fill: {colour}") for colour in SERIES[:2]]
    assert marks[0] == 2 * marks[1] > 0


def test_names_at_lines_do_not_touch_and_keep_their_order() -> None:
    found = apart([10.0, 10.1, 30.0, 9.9], 2.0)
    assert sorted(range(4), key=found.__getitem__) == [3, 0, 1, 2]
    assert min(np.diff(sorted(found))) >= 2.0 - 1e-9
    assert found[2] == 30.0 and found[0] == pytest.approx(10.0)


def test_large_numbers_are_short() -> None:
    assert [large(v) for v in (200, 2e5, 1e6, 0)] == ["200", "200 k", "1 M", "0"]


def test_the_page_that_is_shipped_has_blocks_that_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- results: ([\w.-]+) ([\w-]+) -->", text)
    assert len(found) == text.count("<!-- end -->") > 10
    assert {what for _, what in found} == set(results.BLOCKS)


def as_flix_study_writes(folder: Path) -> Path:
    """A study's folder without what results add: seeds, titles, claims and rows stand in other files of it."""
    said = made.scores(study="words", rows=10, leave_out=[("lora-compute", 1)])
    claims = said.pop("claims")
    for key in ("seeds", "planned", "date"):
        del said[key]
    for arm, of in said["arms"].items():
        for seed, run in of["seeds"].items():
            at = folder / "runs" / f"{arm}-{seed}"
            at.mkdir(parents=True)
            cells = [{"cell": n, "rows": c["train"] + 5, "held_out": c["group"] != "seen"} for n, c in run["cells"].items()]  # fmt: skip
            (at / "mixture.json").write_text(json.dumps({"cells": cells}))
            (at / "run.json").write_text(json.dumps({"started": f"2026-11-2{seed}T00:00:00+00:00"}))
            for cell in run["cells"].values():
                del cell["train"]
    config = {
        "seeds": 2,
        "claims": claims,
        "arms": {arm: {"title": arm.upper()} for arm in made.RATES},
    }
    made.write(folder, said)
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


def test_what_the_scores_do_not_say_is_read_from_the_folder(tmp_path: Path) -> None:
    folder = as_flix_study_writes(tmp_path / "study")
    assert keep(folder, tmp_path / "kept") == ["words"]
    found = read_scores(tmp_path / "kept" / "words.json")
    assert found.seeds == (0, 1) and found.made["date"] == "2026-11-21T00:00:00+00:00"
    assert found.planned["lora-compute"] == ("LORA-COMPUTE", (0, 1))
    assert found.lacking(["lora-compute"]) == ["lora-compute, seed 1"] and len(found.claims) == 2
    cells = found.arm("flix").runs[0].cells
    assert cells["language=deu,task=inflect"].trained == 55
    assert cells["language=swa,task=pron"].trained == 0


def test_a_small_form_never_stands_in_for_the_whole(tmp_path: Path) -> None:
    keep(made.write(tmp_path / "study-words", made.scores(study="words")), tmp_path / "kept")
    before = (tmp_path / "kept" / "words.json").read_bytes()
    small = made.write(tmp_path / "study-words-small", made.scores(study="words", seeds=[0]))
    assert keep(small, tmp_path / "kept") == ["words-small"]
    assert (tmp_path / "kept" / "words.json").read_bytes() == before


def test_weights_that_were_tried_stand_side_by_side(tmp_path: Path) -> None:
    said = made.scores({"flix": (0.5, 0.5), "lora": (0.4, 0.4)}, study="words", claims=[])
    flix = said["arms"]["flix"]
    flix["weights"] = {"language": 0.5}
    for number, run in enumerate(flix["seeds"].values()):
        held = {n: c for n, c in run["cells"].items() if c["group"] != "seen"}
        run["weights"] = [
            {"weights": {"language": how}, "cells": {n: {**c, "score": score + number} for n, c in held.items()}}
            for how, score in ((1, 10.0), (0.5, 20.0), ("searched", 30.0))
        ]  # fmt: skip
    file = page(tmp_path, "words weights")
    assert write_results([made.write(tmp_path / "study", said)], docs=file) == {}
    told = block(file, "words weights")
    assert "| flix | language 0.5 | yes | exact match | 20.5 ± 0.7 |" in told
    assert "| flix | language 1 |  | exact match | 10.5 ± 0.7 |" in told and "| lora" not in told
    del flix["seeds"]["1"]["weights"], flix["seeds"]["0"]["weights"]
    assert list(write_results([made.write(tmp_path / "study", said)], docs=file)) == ["words weights"]  # fmt: skip


@pytest.mark.parametrize("kind", ["dots", "lines"])
def test_panels_that_share_an_axis_show_every_dot(kind: str) -> None:
    rows = {"low": [{"": Dot(10.0, 8.0, 12.0)}], "high": [{"": Dot(90.0, 85.0, 95.0)}]}
    limits: list[tuple[float, float]] = []

    class Watched(Plots):
        def _file(self, width: float, height: float, title: str, draw: Any) -> str:
            def watched(figure: Any) -> None:
                draw(figure)
                limits.extend(p.get_xlim() if kind == "dots" else p.get_ylim() for p in figure.axes)

            return super()._file(width, height, title, watched)

    if kind == "dots":
        Watched().dots("panels", ["a"], rows, "score", numbers=True)
    else:
        two = {name: [Line("a", [1, 2], [0, of[0][""].high])] for name, of in rows.items()}
        Watched().lines("panels", two, dict.fromkeys(two, "steps"), "score")
    assert len(limits) == 2
    assert all(low == 0 and high >= 95 for low, high in limits), limits

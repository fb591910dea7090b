"""A study's page: everything it says is in the scores, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flix.cli.app import app
from flix.report import ReportError
from flix.study.evidence import EvidenceError, read_scores
from flix.study.page import sentences, write_study_report
from tests.helpers.html import Checked
from tests.helpers.training import run
from tests.study import made


def study(folder: Path, **more: Any) -> Path:
    return made.write(folder / "study-made", made.scores(**more))


def written(folder: Path) -> str:
    return write_study_report(folder, draws=100).out.read_text(encoding="utf-8")


def test_the_page_has_every_part_and_asks_nothing_of_a_network(tmp_path: Path) -> None:
    text = written(study(tmp_path))
    page = Checked(text)
    assert page.asks() == [] and page.names.count("svg") == 5
    ids = [a["id"] for _, a in page.attributes if a.get("id")]
    assert len(ids) == len({*ids}), "pictures on one page share no ids"
    for name in ("methods", "claims", "tasks", "sizes", "zero-shot", "cost", "choices", "origin"):
        assert f'<h2 id="{name}">' in text and f'href="#{name}"' in text
    assert 'id="missing"' not in text and 'id="all"' not in text
    assert "flix study made.yaml" in text and "0123abc" in text


def test_the_sentences_on_top_are_the_claims(tmp_path: Path) -> None:
    rates = {"flix": (0.95, 0.5), "lora-compute": (0.3, 0.3), "lora-parameters": (0.3, 0.3)}
    folder = made.write(tmp_path / "study-made", made.scores(rates, rows=60))
    short = write_study_report(folder, draws=1000).short
    assert len(short) == 3
    read = read_scores(folder)
    means = {
        name: sum(c.score for c in arm.runs[0].cells.values() if c.group == "seen")
        + sum(c.score for c in arm.runs[1].cells.values() if c.group == "seen")
        for name, arm in read.arms.items()
    }
    cells = sum(c.group == "seen" for c in read.arms["flix"].runs[0].cells.values())
    ahead = (means["flix"] - means["lora-compute"]) / (2 * cells)
    assert short[0].startswith(
        f"flix against lora, compute: +{ahead:.1f} points on seen cells, exact match"
    )
    assert short[0].endswith("; the study claims 10 or more, which holds.")
    assert short[2].endswith("; the study claims 50 or more, which does not hold.")


def test_a_study_without_claims_compares_the_first_method_with_the_others(tmp_path: Path) -> None:
    told = sentences(read_scores(study(tmp_path, claims=[])), 100)
    texts = ["".join(part for part, _ in sentence) for sentence in told]
    assert [text.partition(":")[0] for text in texts] == [
        "flix against lora, compute", "flix against lora, compute", "flix against lora, parameters",
        "flix against lora, parameters",
    ]  # fmt: skip
    assert len(texts) == 4 and sum("zero-shot" in text for text in texts) == 2
    assert all("claims" not in text for text in texts)


def test_a_method_without_all_its_runs_has_no_figure_and_is_named(tmp_path: Path) -> None:
    found = write_study_report(study(tmp_path, leave_out=[("lora-compute", 1)], claims=[]), draws=100)  # fmt: skip
    assert "lora-compute, seed 1" in found.missing[0]
    text = found.out.read_text(encoding="utf-8")
    assert "lora, compute" not in text and "lora, parameters" in text


def test_no_whole_method_makes_no_page(tmp_path: Path) -> None:
    folder = study(tmp_path, leave_out=[(name, 0) for name in made.RATES])
    with pytest.raises(EvidenceError, match=r"no method of the study 'made' has all its runs yet; .*flix, seed 0"):  # fmt: skip
        write_study_report(folder)
    assert not (folder / "report.html").exists()


def test_texts_are_escaped(tmp_path: Path) -> None:
    said = json.dumps(made.scores()).replace("lora, compute", "<b>lora</b> & co")
    folder = made.write(tmp_path / "study-made", json.loads(said))
    text = written(folder)
    assert "<b>lora</b>" not in text and "&lt;b&gt;lora&lt;/b&gt; &amp; co" in text


def test_what_is_no_report_is_not_overwritten(tmp_path: Path) -> None:
    folder = study(tmp_path)
    (folder / "report.html").write_text("mine")
    with pytest.raises(ReportError, match="is not a flix report"):
        write_study_report(folder, draws=100)
    write_study_report(folder, draws=100, force=True)
    written(folder)  # its own page is written again


def test_the_command_tells_studies_from_runs(tmp_path: Path) -> None:
    folder = study(tmp_path)
    found = run(app, ["report", str(folder), "--json"])
    assert found.exit_code == 0, found.stderr
    said = json.loads(found.stdout)
    assert said["out"] == str(folder / "report.html") and said["missing"] == []
    for more, why in (
        ([str(folder)], "a page is about one study, or about runs"),
        (["--rows", "task"], "--rows and --columns are for runs"),
    ):
        found = run(app, ["report", str(folder), *more])
        assert found.exit_code == 2 and why in found.stderr, found.stderr

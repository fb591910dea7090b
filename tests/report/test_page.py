"""The page as text: one file, everything escaped, the sentences on top true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flix.report import ReportError, write_report
from flix.report.figures import Figures, thinned
from flix.report.page import duration
from tests.helpers.html import Checked
from tests.helpers.runs import ARABIC, HEBREW, make_run, write_json


def written(*runs: Path, **options: Any) -> str:
    return write_report(runs, **options).out.read_text(encoding="utf-8")


def test_the_page_is_one_file_that_asks_nothing_of_a_network(made: Path) -> None:
    page = Checked(written(made))
    assert page.asks() == []
    policy = next(a["content"] for t, a in page.attributes if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    text = (made / "report.html").read_text()
    assert not re.search(r"url\((?!#)|@import", text)


def test_ids_are_given_once_and_links_lead_somewhere(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, lift=lift) for name, lift in (("a", 5.0), ("b", 0.0))]
    page = Checked(written(*runs))
    ids = [a["id"] for _, a in page.attributes if a.get("id")]
    assert len(ids) == len(set(ids)) > 20
    for _, attributes in page.attributes:
        for name in ("href", "xlink:href", "aria-labelledby"):
            if value := attributes.get(name, ""):
                assert value.removeprefix("#") in ids or value.startswith("data:"), value
        for name in re.findall(r"url\(#([^)]*)\)", " ".join(map(str, attributes.values()))):
            assert name in ids


BAD = '<script>alert("x")</script>'


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    odd = ["</style>&amp;", BAD, "$x^2$", "<!--", "' onload='x", "#010101", 'id="x']
    made = make_run(tmp_path / "run", odd, [BAD, "</script>"], held_out=())
    for name in ("run.json", "mixture.json", "metrics.json"):
        data = json.loads((made / name).read_text())
        if name == "run.json":
            data["command"] = ["flix", BAD]
            data["versions"] = {BAD: BAD}
            data["data"][0]["name"] = data["data"][0]["files"][0]["name"] = BAD
        if name == "mixture.json":
            data["cap"] = BAD
        if name == "metrics.json":
            for cell in data["cells"]:
                cell.update(metric=BAD, kind=BAD, scores={BAD: 1.0})
        write_json(made, name, data)
    (made / "config.yaml").write_text(f"model: {BAD}\n<!-- ")
    (made / "predictions.jsonl").write_text(
        json.dumps({"cell": "language=x", "source": BAD, "target": "</script><img src=x>", "output": "<!-- <script>", "right": False}) + "\n"
    )  # fmt: skip
    text = written(made)
    page = Checked(text)
    plain = Checked(written(make_run(tmp_path / "plain", list("abcdefg"), ["x", "y"], held_out=())))
    for name in ("script", "style", "img", "noscript", "title"):
        assert page.names.count(name) == plain.names.count(name), name
    assert not [a for _, a in page.attributes if any(key.startswith("on") for key in a)]
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "$x^2$" in text
    assert text.count("#010101") >= 3  # the name, and not the figures' ink


def test_texts_of_examples_keep_their_direction(made: Path) -> None:
    text = written(made)
    held = re.search(r'id="run0-examples">(.*?)</script>', text, re.S)[1]
    texts = {text for example in json.loads(held)["examples"] for text in example[1:4]}
    assert f"{HEBREW} 0" in texts and f"{ARABIC} 1" in texts
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    assert 'dir: "auto"' in script and ".innerHTML" not in script


def test_the_sentences_on_top_are_true(made: Path) -> None:
    found = write_report([made])
    cells = json.loads((made / "metrics.json").read_text())["cells"]
    worst = min(cells, key=lambda c: c["score"])
    first, pair, *_, command = found.short
    names = ", ".join(names[0] for names in worst["features"].values())
    assert first.startswith(f"Worst cell: {names} with {worst['score']:.1f} ")
    seen = [c["score"] for c in cells if c["seen"]]
    assert f"Mean of the cells trained on: {sum(seen) / len(seen):.1f}" in first
    assert pair.startswith("Most similar pair of the group language: hau and swa: the cosine")
    assert command == "Command: flix train 'africa ner.yaml' --resume"
    text = found.out.read_text()
    assert f"<b><bdi>{names}</bdi></b>" in text and "<b><bdi>hau and swa</bdi></b>" in text
    assert found.size == len(text.encode()) and found.missing == []


def test_several_worst_cells_are_counted_and_named_as_the_grid_has_them(made: Path) -> None:
    metrics = json.loads((made / "metrics.json").read_text())
    for cell in metrics["cells"]:
        cell["score"] = 0.0 if "topic" in cell["cell"] else 10.0
    write_json(made, "metrics.json", metrics)
    assert write_report([made]).short[0].startswith("Worst cell: hau, topic and 2 more with 0.0 ")
    short = write_report([made], rows="task").short[0]
    assert short.startswith("Worst cell: topic, hau and 2 more with 0.0 ")


def test_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, lift=lift) for name, lift in (("flix", 12.0), ("lora", 0.0), ("wide", 2.0))]  # fmt: skip
    found = write_report(runs, tmp_path / "all.html")
    assert found.short[0].startswith("flix against lora: +12.0 points on cells trained on")
    assert found.short[1].startswith("flix against wide: +10.0 points")
    assert "better in 6 of 6 cells" in found.short[0]
    text = found.out.read_text()
    assert "flix less lora, in points" in text and "flix less wide, in points" in text
    assert text.count(">+12.0<") + text.count(">+12.0</td>") >= 6
    assert text.count('<details class="run" open>') == text.count('<summary>flix</summary>') == 5  # fmt: skip


def test_what_only_one_run_has_is_left_out_of_the_differences(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", ("hau", "swa"))
    assert "2 cells that only one of the two has are left out" in written(one, other)


@pytest.mark.parametrize("gone", ["metrics.json", "mixture.json", "log.jsonl", "predictions.jsonl", "run.json", "config.yaml", "adapter"])  # fmt: skip
def test_pages_of_what_is_left_of_a_run(made: Path, gone: str) -> None:
    import shutil

    path = made / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = write_report([made])
    assert len(found.missing) == 1
    text = found.out.read_text()
    Checked(text)
    assert "Not on this page" in text and gone in text


def test_a_run_that_only_began(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x\n")
    found = write_report([tmp_path / "run"])
    assert len(found.missing) == 6 and found.short == []
    text = found.out.read_text()
    Checked(text)
    assert 'aria-label="In short"' not in text


def test_a_run_of_one_group_and_one_feature(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", ["hau", "swa"], [], held_out=())
    Checked(written(one))
    single = make_run(tmp_path / "single", ["hau"], [], held_out=())
    assert "There are no two features to compare." in written(single)


def test_of_many_features_the_worst_have_panels(tmp_path: Path) -> None:
    names = [f"l{i:02d}" for i in range(64)]
    made = make_run(tmp_path / "run", names, ["ner"], held_out=(), steps=50)
    text = written(made)
    assert "The 4 lowest are left out, and not in the mean." in text
    lines = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    last = lines[-1]["evaluation"]["by_feature"]
    worst = max(names, key=lambda name: last[f"language={name}"])
    drawn = text[text.index("Loss of evaluation by language") :].partition("</figure>")[0]
    assert f">{worst}</text>" in drawn and drawn.count("</text>") == 120


def test_many_files_are_folded(made: Path) -> None:
    facts = json.loads((made / "run.json").read_text())
    file = facts["data"][0]["files"][0]
    facts["data"][0]["files"] = [{**file, "name": f"ner/{i}.jsonl"} for i in range(13)]
    assert "Fingerprints of the data: 13 files</summary>" not in written(made)
    write_json(made, "run.json", facts)
    text = written(made)
    Checked(text)
    assert "Fingerprints of the data: 13 files</summary>" in text and "ner/12.jsonl" in text


def test_names_of_runs_with_one_folder_name_tell_them_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run") for name in "ab"]
    assert "a/run is compared with b/run" in written(*runs)


def test_a_file_that_is_no_report_is_kept(made: Path) -> None:
    out = made / "notes.txt"
    out.write_text("mine")
    with pytest.raises(ReportError, match=r"'.*notes\.txt' is not a flix report; --force"):
        write_report([made], out)
    assert out.read_text() == "mine"
    write_report([made], out, force=True)
    write_report([made], out)  # a report may be written anew
    with pytest.raises(ReportError, match=r"--out must be a file, but '.*run' is a folder"):
        write_report([made], made)
    assert write_report([made], made / "new" / "page.html").out.is_file()


def test_figures_of_one_program_are_alike() -> None:
    points = [(float(i), 1.0 / (i + 1)) for i in range(10)]
    draw = lambda: Figures().panels({"a": points, "b": points[:1]})  # noqa: E731
    assert draw() == draw()


def test_names_in_figures_are_no_formulas() -> None:
    drawn = Figures().panels({"$x^2$": [(0.0, 1.0), (1.0, 2.0)], "a_b": [(0.0, 1.0)]})
    assert ">$x^2$</text>" in drawn and ">a_b</text>" in drawn


def test_curves_are_thinned_by_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    kept = thinned(points, 100)
    assert len(kept) == 100 and {v for _, v in kept} == {0.5} and kept[-1][0] == 999.0
    assert thinned(points[:7], 100) == points[:7]


def test_durations() -> None:
    assert [duration(s) for s in (3.21, 75, 7300)] == ["3.2 s", "1 min 15 s", "2 h 1 min"]

"""Results become a page, and only the measured parts of it change."""

import json

import pytest

from benchmarks import report
from benchmarks.common import Bar, Figure, Plot, Result, Table, environment

FIGURE = {"median": 1.234, "low": 1.2, "high": 1.3}


def result(part="scale-layer", value=1.5):
    return Result(
        part,
        "Growth",
        [Table("Features", ["n", "over frozen"], [["25", Figure(value, 1.4, 1.6)]], "A note.")],
        [Bar("10,000 over 25", value, 1.1)],
        [
            Plot("a.png", "Lines", "x", "y", [25, 100], {"s": [1.0, 2.0]}, log_x=True),
            Plot("b.png", "Bars", "x", "y", ["one", "two"], {"s": [1.0, None], "t": [1.0, 2.0]}),
        ],
        "How.",
        environment(["numpy", "no-such-package"]),
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (7, "7"),
        (1.005, "1.00"),
        (12.34, "12.3"),
        (12345.6, "12,346"),
        (FIGURE, "1.23 ± 0.05"),
        ({"median": 1.0, "low": 1.0, "high": 1.0}, "1.00"),
        ("a|b", "a\\|b"),
    ],
)
def test_cells(value, shown):
    assert report.cell(value) == shown


def test_a_table_round_trips():
    columns = ["", "d = 768", "a|b"]
    rows = [["**flix**", FIGURE, None], ["x|y", 3, 1234.0]]
    found = report.read_table(report.write_table(columns, rows))
    assert found == (columns, [["**flix**", "1.23 ± 0.05", "–"], ["x|y", "3", "1,234"]])
    with pytest.raises(ValueError, match="more or fewer"):
        report.write_table(["a"], [["1", "2"]])


def test_a_block_is_replaced_and_nothing_else():
    page = "# Title\n\nWords.\n"
    once = report.replace_block(page, "scale", "first")
    assert once.startswith(page)
    assert report.read_block(once, "scale") == "first"
    more = report.replace_block(once, "bars", "bars") + "The end.\n"
    again = report.replace_block(more, "scale", "second\n")
    assert report.read_block(again, "scale") == "second"
    assert report.read_block(again, "bars") == "bars"
    assert again == report.replace_block(again, "scale", "second")
    assert "first" not in again and again.endswith("The end.\n")
    assert report.read_block(page, "scale") is None
    with pytest.raises(ValueError, match="without the other"):
        report.replace_block("<!-- bench:scale -->", "scale", "text")


def test_the_page_and_its_plots(tmp_path):
    out, docs = tmp_path / "out", tmp_path / "docs"
    out.mkdir()
    docs.mkdir()
    (docs / "speed.md").write_text("# Speed\n\nWords.\n", encoding="utf-8")
    (out / "scale-layer.json").write_text(json.dumps(result().to_dict()), encoding="utf-8")
    assert report.write_docs(out, docs) == ["scale-layer"]
    page = (docs / "speed.md").read_text(encoding="utf-8")
    for words in ("Words.", "1.50 ± 0.10", "A note.", "**no**", "at most 1.10", "images/a.png"):
        assert words in page
    assert "no-such-package" not in page
    assert (docs / "images" / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (docs / "images" / "b.png").exists()
    report.write_docs(out, docs)
    assert (docs / "speed.md").read_text(encoding="utf-8") == page

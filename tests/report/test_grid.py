"""Cells laid out in two groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from flix.core.features.cells import cell_name
from flix.report import ReportError
from flix.report.grid import Axes, choose_axes, decimal, difference_grid, row_grid, score_grid
from flix.report.records import Drawn, Metrics, Scored
from flix.report.runs import Run


def scored(cell, score, seen=True, metric="chrf", interval=None) -> Scored:
    return Scored(cell_name(cell), cell, "seq2seq", "", seen, 10, metric, score, interval, {})


def cell(**names: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((group, tuple(name.split("+"))) for group, name in names.items())


def of(*cells) -> list[Run]:
    return [Run(Path("x"), "x", metrics=Metrics(tuple(scored(c, 1.0) for c in cells), ()))]


AXES = Axes("language", "task")


def test_the_two_groups_that_most_cells_name_are_taken_the_larger_one_for_rows() -> None:
    cells = [cell(task=t, language=a) for a in ("hau", "swa", "yor") for t in ("ner", "pos")]
    cells.append(cell(task="ner", language="zul", domain="news"))
    assert choose_axes(of(*cells), None, None) == AXES
    assert choose_axes(of(*cells), "task", None) == Axes("task", "language")
    assert choose_axes(of(*cells), None, "domain") == Axes("language", "domain")
    assert choose_axes(of(*cells), "domain", "task") == Axes("domain", "task")
    square = [cell(task=t, language=a) for a in ("hau", "swa") for t in ("ner", "pos")]
    assert choose_axes(of(*square), None, None) == AXES


def test_columns_of_one_metric_come_before_many_rows() -> None:
    cells = [
        scored(cell(task=t, language=a), 1.0, metric=m)
        for t, m in (("ner", "entity_f1"), ("mt", "chrf"), ("topic", "accuracy"))
        for a in ("hau", "swa")
    ]
    runs = [Run(Path("x"), "x", metrics=Metrics(tuple(cells), ()))]
    assert choose_axes(runs, None, None) == AXES
    alike = [scored(c.features, 1.0) for c in cells]
    runs = [Run(Path("x"), "x", metrics=Metrics(tuple(alike), ()))]
    assert choose_axes(runs, None, None) == Axes("task", "language")


def test_one_group_has_no_columns_and_no_cell_no_axes() -> None:
    cells = [cell(language="hau"), cell(language="swa")]
    assert choose_axes(of(*cells), None, None) == Axes("language", None)
    assert choose_axes(of(*cells), None, "language") == Axes("language", None)
    assert choose_axes(of(), None, None) is None
    grid = score_grid(Axes("language", None), [scored(c, 3.0) for c in cells])
    assert grid.columns == ("all",) and [row[0].text for row in grid.squares] == ["3.0", "3.0"]


def test_groups_that_no_cell_names_are_refused_by_name() -> None:
    runs = of(cell(language="hau", task="ner"))
    with pytest.raises(ReportError, match=r"--rows: no cell names the group 'langage' \(did you mean 'language'\?\); the groups are: language, task"):  # fmt: skip
        choose_axes(runs, "langage", None)
    with pytest.raises(ReportError, match=r"--columns: no cell names the group 'x'"):
        choose_axes(runs, None, "x")
    with pytest.raises(
        ReportError, match=r"--rows and --columns must be two groups, got 'task' twice"
    ):
        choose_axes(runs, "task", "task")


def test_scores_have_their_places_colours_and_means() -> None:
    grid = score_grid(
        AXES,
        [
            scored(cell(language="hau", task="ner"), 10.0),
            scored(cell(language="hau", task="pos"), 50.0, interval=(45.0, 55.0)),
            scored(cell(language="swa", task="pos"), 30.0, seen=False),
            scored(cell(language="hau+swa", task="pos"), None, metric="accuracy"),
        ],
    )
    assert (grid.rows, grid.columns) == (("hau", "hau+swa", "swa"), ("ner", "pos"))
    assert [[s and s.text for s in row] for row in grid.squares] == [["10.0", "50.0"], [None, "–"], [None, "30.0"]]  # fmt: skip
    assert [[s and s.heat for s in row] for row in grid.squares] == [[-100, 100], [None, None], [None, 0]]  # fmt: skip
    assert grid.squares[2][1].column_heat == -100 and grid.squares[2][1].held_out
    assert grid.squares[0][1].title == "language=hau,task=pos: 50.0 chrF (95 %: 45.0 to 55.0), 10 rows"  # fmt: skip
    assert grid.row_means == ("30.0", "–", "30.0") and grid.column_means == ("10.0", "40.0")
    assert grid.notes == ("chrF", "accuracy or chrF") and (grid.low, grid.high) == (10.0, 50.0)


def test_a_difference_of_nothing_has_no_sign() -> None:
    found = [decimal(v, signed=True) for v in (0.0, -0.04, 0.04, 0.06, -1.0, None)]
    assert found == ["0.0", "0.0", "0.0", "+0.1", "−1.0", "–"]
    assert decimal(-0.01) == "0.0" and decimal(-2.5) == "−2.5"


def test_cells_of_a_third_group_show_their_mean() -> None:
    both = [scored(cell(language="hau", task="ner", domain=d), s) for d, s in (("a", 1.0), ("b", 3.0))]  # fmt: skip
    grid = score_grid(AXES, both)
    assert grid.squares[0][0].text == "2.0" and grid.squares[0][0].title.count("chrF") == 2


def test_differences_are_the_first_less_the_other_by_name_and_bold_where_intervals_do_not_touch() -> None:  # fmt: skip
    a, b, c = (cell(language=name, task="ner") for name in ("hau", "swa", "yor"))
    first = [scored(a, 40.0, interval=(38, 42)), scored(b, 20.0, interval=(15, 25)), scored(c, 9.0)]
    other = [scored(b, 30.0, interval=(24, 36)), scored(a, 20.0, interval=(18, 22))]
    grid = difference_grid(AXES, first, other)
    assert grid.rows == ("hau", "swa")
    assert [row[0].text for row in grid.squares] == ["+20.0", "−10.0"]
    assert [row[0].heat for row in grid.squares] == [100, -50]
    assert [row[0].strong for row in grid.squares] == [True, False]
    assert grid.column_means == ("+5.0",)


def test_rows_of_the_mixture_mark_what_is_held_out() -> None:
    some = [
        Drawn("x", cell(language="hau", task="ner"), 1000, 0.5, 70, False, 10),
        Drawn("y", cell(language="swa", task="ner"), 0, 0.0, 0, True, 10),
    ]
    grid = row_grid(AXES, some)
    assert [(r[0].text, r[0].heat, r[0].held_out) for r in grid.squares] == [("1,000", 100, False), ("0", 0, True)]  # fmt: skip
    assert "drawn 70 times with p = 0.5000" in grid.squares[0][0].title

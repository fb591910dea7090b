"""Tables as plain text."""

from __future__ import annotations

import pytest

from flix.core.tables import blocks_of, cell_text, text_table


def test_columns_line_up_and_numbers_stand_to_the_right():
    table = text_table(["name", "n", "ok"], [["a", 1234, True], ["bcdef", None, False]])
    assert table.splitlines() == ["name       n  ok", "a      1,234  yes", "bcdef      -  no"]


def test_columns_of_text_to_the_right():
    lines = text_table(["a", "bb"], [["ccc", "1"], ["d", "22"]], left=1, rule=True).splitlines()
    assert lines == ["a    bb", "---  --", "ccc   1", "d    22"]


def test_cells():
    assert [cell_text(c) for c in (0.01234567, 1234.5, 0.0, 12, "x")] == [
        "0.01235", "1,234.50", "0.00", "12", "x",
    ]  # fmt: skip


def test_a_table_without_rows_is_its_headings():
    assert text_table(["a", "b"], []) == "a  b"


def test_a_table_that_fits_is_as_it_is():
    rows = [["a", 1], ["bcd", 22]]
    assert text_table(["name", "n"], rows, width=8) == text_table(["name", "n"], rows)


def test_texts_are_broken_where_a_line_is_too_short():
    table = text_table(["why", "n"], [["one two three four five six", 1], ["x", 2]], width=18)
    assert table.splitlines() == ["why              n", "one two three    1", "four five six", "x                2"]  # fmt: skip
    path = text_table(["a", "b"], [["x" * 60, "y" * 60]], width=50)
    assert max(map(len, path.splitlines())) <= 50 and path.count("x") == path.count("y") == 60


def test_columns_that_do_not_fit_stand_beneath_with_the_first_again():
    columns = ["layer", *(f"language={i}" for i in range(9))]
    rows = [[f"block.{n}", *range(9)] for n in range(2)]
    table = text_table(columns, rows, rule=True, width=40)
    first, *others = table.split("\n\n")
    assert first.splitlines()[0] == "layer    language=0  language=1"
    assert first.splitlines()[2] == "block.0           0           1"
    assert len(others) == 4 and all(part.startswith("layer ") for part in others)
    assert max(map(len, table.splitlines())) <= 40
    assert blocks_of(columns, rows, 40) == [[0, 1, 2], [0, 3, 4], [0, 5, 6], [0, 7, 8], [0, 9]]


@pytest.mark.parametrize("width", [10, 20, 33, 80, 200])
def test_no_cell_is_lost(width: int):
    columns = ["id", "feature", "rank", "what it implies"]
    rows = [[i, f"language={'x' * 7 * i}", i, " ".join(f"f{j}" for j in range(4 * i))] for i in range(6)]  # fmt: skip
    table = text_table(columns, rows, width=width)
    for row in rows:
        for word in (w for cell in row[1:] if isinstance(cell, str) for w in cell.split()):
            assert word in table or len(word) > 14
    if width > 40:
        assert max(map(len, table.splitlines())) <= width

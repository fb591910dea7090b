"""Tables as plain text."""

from __future__ import annotations

from flix.core.tables import cell_text, text_table


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

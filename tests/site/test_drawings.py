"""The site's pictures are what docs/drawings.py draws, and their figures are those of the pages."""

from __future__ import annotations

import importlib.util
from xml.etree import ElementTree

import pytest

from tests.site.public import ROOT

FOUND = importlib.util.spec_from_file_location("drawings", ROOT / "docs" / "drawings.py")
drawings = importlib.util.module_from_spec(FOUND)
FOUND.loader.exec_module(drawings)


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_committed_picture_is_what_is_drawn(name):
    drawn = drawings.DRAWINGS[name]().svg()
    assert (drawings.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawn
    tree = ElementTree.fromstring(drawn)
    assert tree.find("{http://www.w3.org/2000/svg}title").text
    assert f"fx-arrow-{name}" in drawn  # ids differ where several stand in one page


def test_there_is_no_other_picture():
    assert {path.stem for path in drawings.FOLDER.iterdir()} == set(drawings.DRAWINGS)


def test_figures_are_those_of_the_page():
    found = drawings.measured()
    assert found["frozen model"] == 1.0 and len(found) == 4
    assert all(1 < value < 10 for row, value in found.items() if row != "frozen model")
    scores = drawings.scored()
    assert [len(of) for of in scores.values()] == [3, 3, 3]
    assert all(
        0 < score < 56 for of in scores.values() for score in of
    )  # wider bars leave the picture

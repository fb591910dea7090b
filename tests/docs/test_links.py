"""What the pages link to, and the files that they name, exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.test_specification import slug

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([\w-]+))?\)")
# In backquotes or code: from a folder at the top, to a file or a folder.
NAMED = re.compile(
    r"(?<![\w/.-])(?:flix|tests|docs|examples|benchmarks|conformance|tools)/[\w/.-]*\w/?"
)
MADE = {"examples/tiny", "conformance/out", "docs/out", "docs/_build"}  # what runs make


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def faults(page: Path, text: str) -> list[str]:
    found = []
    for target, anchor in LINK.findall(text):
        there = (page.parent / target).resolve() if target else page
        if not there.exists():
            found.append(target)
        elif anchor and anchor not in anchors(there):
            found.append(f"{target}#{anchor}")
    for name in NAMED.findall(text):
        made = any(name.startswith(folder) for folder in MADE)
        if not made and not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists():
            found.append(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files_exist(page):
    assert faults(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    ["[x](nowhere.md)", "[x](cli.md#no-such-part)", "see `flix/core/nothing.py`", "[x](#gone)"],
)
def test_a_dead_link_is_found(text):
    assert len(faults(ROOT / "docs" / "method.md", text)) == 1

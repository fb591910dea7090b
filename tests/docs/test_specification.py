"""Citations of docs/specification.md name parts that it has, and its words are all there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "docs/specification.md"
PAGE = (ROOT / NAME).read_text(encoding="utf-8")
FOLDERS = ("benchmarks", "conformance", "docs", "examples", "flix", "tests", "tools")

NUMBER = r"§\d+(?:\.\d+)*"
LINK = re.compile(r"\[([^\]]*)\]\((?:docs/)?specification\.md(?:#([\w-]+))?\)")
# The page and the numbers after it, which may run over the end of a commented line.
CITATION = re.compile(rf"specification\.md`*((?:[,;]?[\s#]+(?:and\s+)?{NUMBER})*)")
WORDS = {
    *("feature", "group", "row", "routing", "id", "width", "composition", "union", "pair", "rank", "slot", "scale"),
    *("bank", "layout", "cell", "strategy", "adapter", "head", "base", "kernel", "position", "verb", "primitive"),
    "entry", "oracle",
}  # fmt: skip


def headings(page: str) -> dict[str, str]:
    """The anchor of each numbered heading, by its number."""
    found = re.findall(r"^#{2,4} ((\d+(?:\.\d+)*)\.? .*)$", page, re.MULTILINE)
    return {number: slug(title) for title, number in found}


def slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def cited(text: str) -> list[str]:
    return [n for numbers in CITATION.findall(text) for n in re.findall(NUMBER, numbers)]


def faults(text: str, page: str, *, code: bool = False) -> list[str]:
    """What is wrong with the citations in a text; code has to say which part of the page it means."""
    parts, titles = headings(page), re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    links = LINK.findall(text)
    text = LINK.sub("", text)
    numbers = [*cited(text), *(n for shown, _ in links for n in re.findall(NUMBER, shown))]
    found = [number for number in numbers if number[1:] not in parts]
    found += [f"#{anchor}" for _, anchor in links if anchor and anchor not in map(slug, titles)]
    found += [f"{c[0]} without a number" for c in CITATION.finditer(text) if code and not c[1]]
    # Sections of papers have numbers, too.
    rest = CITATION.sub("", text)
    for match in re.finditer(NUMBER, rest):
        if "arXiv" not in rest[max(0, match.start() - 120) : match.start()]:
            found.append(f"{match[0]} of no page")
    return found


def sources() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    yield from ROOT.glob("*.toml")
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md", ".toml"} and path != Path(__file__):
                yield path


def test_every_citation_names_a_part_of_the_page():
    bad = {}
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if name != NAME:
            text = path.read_text(encoding="utf-8")
            if found := faults(text, PAGE, code=path.suffix == ".py"):
                bad[name] = found
    assert bad == {}


def test_code_does_cite_the_page():
    texts = [path.read_text(encoding="utf-8") for path in sources() if path.suffix == ".py"]
    assert len({number for text in texts for number in cited(text)}) >= 8


def test_the_page_refers_to_its_own_parts():
    parts = headings(PAGE)
    assert [n for n in re.findall(NUMBER, PAGE) if n[1:] not in parts] == []
    linked = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    assert linked and set(linked) <= set(parts.values())


def test_numbers_follow_each_other():
    previous: tuple[int, ...] = ()
    for number in headings(PAGE):
        current = tuple(map(int, number.split(".")))
        after = {(*previous, 1)} | {(*previous[:i], previous[i] + 1) for i in range(len(previous))}
        assert current in after, f"{number} does not follow {previous}"
        previous = current
    assert previous[0] == 8


def test_no_other_contract_is_cited():
    old = re.compile(r"\b(SPEC|NOTES|HOUSE)\b(\.md)?\s*§?")
    named = [str(path) for path in sources() if old.search(path.read_text(encoding="utf-8"))]
    assert named == []


def test_the_glossary_has_its_words():
    glossary = PAGE.split("## Words", 1)[1].split("\n## ", 1)[0]
    words = re.findall(r"^\| \*\*(\w+)\*\* \| \S", glossary, re.MULTILINE)
    assert len(words) == len(set(words))
    assert set(words) == WORDS


@pytest.mark.parametrize(
    "text",
    [
        "see docs/specification.md §9.9",
        "(docs/specification.md §1.1, §5.99)",
        "docs/specification.md §1.1 and §77",
        "[the words](specification.md#wrods)",
        "as the docs/specification.md says",
        "SPEC §5",
        "as §1.1 says",
    ],
)
def test_a_wrong_citation_is_found(text):
    assert len(faults(text, PAGE, code=True)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "(docs/specification.md §1.1, §5.2)",
        "# docs/specification.md §1.1\n# and §5.1.2",
        "[§5.1.2](specification.md#512-routing)",
        "arXiv 1907.05019, §4.2",
    ],
)
def test_a_right_citation_is_none(text):
    assert faults(text, PAGE, code=True) == []

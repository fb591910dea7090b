"""The page in a headless Chromium: quick, quiet, accessible, readable at two widths and on paper."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from flix.report import write_report
from flix.study.page import write_study_report
from tests.helpers.browser import Browser, Page, needed_browser
from tests.helpers.runs import ARABIC, HEBREW, make_run
from tests.study import made


def axe() -> str:
    """The source of axe-core; a test that has none is skipped."""
    if path := os.environ.get("FLIX_AXE"):
        return Path(path).read_text(encoding="utf-8")
    try:
        files = metadata.files("axe-playwright-python") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "axe.min.js":
            return Path(str(file.locate())).read_text(encoding="utf-8")
    pytest.skip("no axe-core is installed (pip install --no-deps axe-playwright-python)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(needed_browser()) as opened:
        yield opened


@pytest.fixture(scope="module")
def page_of_many(large: Path, browser: Browser) -> Path:
    return write_report([large]).out


@pytest.fixture(scope="module")
def page_of_arms(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Path:
    base = tmp_path_factory.mktemp("arms")
    runs = [make_run(base / name, lift=lift) for name, lift in (("flix", 9.0), ("lora", 0.0), ("wide", 1.0))]  # fmt: skip
    return write_report(runs).out


@pytest.fixture(scope="module")
def page_of_study(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Path:
    folder = made.write(tmp_path_factory.mktemp("study"), made.scores())
    return write_study_report(folder, draws=100).out


WIDE = "document.documentElement.scrollWidth"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_of_360_cells_is_small_quick_and_quiet(page_of_many: Path, browser: Browser, width: int) -> None:  # fmt: skip
    assert page_of_many.stat().st_size < 3_000_000
    with Page(browser, width) as page:
        assert page.open(page_of_many) < 2.0
        assert page.console == [] and {url.partition(":")[0] for url in page.requests} <= {"file", "data"}  # fmt: skip
        assert page.run(WIDE) <= width  # nothing but tables and figures scrolls sideways
        assert page.run("document.querySelectorAll('#scores ~ .by-column tbody td.h').length") == 360  # fmt: skip


def test_a_study_fits_a_phone(page_of_study: Path, browser: Browser) -> None:
    with Page(browser, 390) as page:
        page.open(page_of_study)
        assert page.console == [] and page.run(WIDE) <= 390


# The page of arms has every kind of part that the large one has, and more; the large one takes axe 14 s.
@pytest.mark.parametrize(
    ("pages", "dark"),
    [
        ("page_of_arms", False),
        ("page_of_arms", True),
        ("page_of_study", False),
        pytest.param("page_of_many", False, marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing(request: pytest.FixtureRequest, browser: Browser, pages: str, dark: bool) -> None:  # fmt: skip
    source = axe()
    with Page(browser, 1280, dark=dark) as page:
        page.open(request.getfixturevalue(pages))
        page.run(source + ";0")
        found = page.run(
            "axe.run().then(r => JSON.stringify(r.violations.map(v => [v.id, v.impact, v.nodes[0].html])))"
        )
        assert json.loads(found) == []


def test_axe_sees_faults(page_of_arms: Path, browser: Browser) -> None:
    source = axe()
    with Page(browser, 1280) as page:
        page.open(page_of_arms)
        page.run(source + ";0")
        page.run("document.querySelector('.by-column tbody td').style.color = '#bbb'; 0")
        again = "axe.run('.by-column').then(r => JSON.stringify(r.violations.map(v => v.id)))"
        assert json.loads(page.run(again)) == ["color-contrast"]


def test_examples_are_filtered_and_keep_their_direction(tmp_path: Path, browser: Browser) -> None:
    out = write_report([make_run(tmp_path / "run", samples=8)]).out
    with Page(browser, 1280) as page:
        page.open(out)
        shown = "[...document.querySelectorAll('ol.examples li')].map(e => e.innerText)"
        assert len(page.run(shown)) == 20 and page.run("document.querySelector('.count').textContent") == "20 of 48 examples"  # fmt: skip
        page.run("document.querySelector('button.more').click()")
        assert len(page.run(shown)) == 48 and page.run("document.querySelector('button.more').hidden")  # fmt: skip
        choose = "(name, value) => { const f = document.querySelector('form[data-examples]'); f.elements[name].value = value; f.dispatchEvent(new Event('input', {bubbles: true})) }"  # fmt: skip
        page.run(f"({choose})('answer', '0')")
        wrong = page.run(shown)
        assert wrong and all("wrong" in text for text in wrong)
        page.run(f"({choose})('row', 'hau')")
        assert all("language=hau" in text for text in page.run(shown)) and len(page.run(shown)) < len(wrong)  # fmt: skip
        page.run(f"({choose})('answer', '')")
        page.run(f"({choose})('words', 'שלום')")
        assert page.run(shown) and all(HEBREW in text for text in page.run(shown))
        direction = "getComputedStyle([...document.querySelectorAll('ol.examples dd')].find(e => e.textContent.startsWith({})) ).direction"  # fmt: skip
        assert page.run(direction.format(json.dumps(HEBREW))) == "rtl"
        page.run(f"({choose})('words', '')")
        assert page.run(direction.format(json.dumps(ARABIC))) == "rtl"
        assert page.run(direction.format('"mto"')) == "ltr"
        assert page.console == []


def test_the_cosines_of_a_layer_can_be_chosen(tmp_path: Path, browser: Browser) -> None:
    out = write_report([make_run(tmp_path / "run", size=3)]).out
    with Page(browser, 1280) as page:
        page.open(out)
        squares = "[...document.querySelectorAll('table.cosines td.h')].map(e => [e.textContent, e.style.getPropertyValue('--v')])"  # fmt: skip
        choose = "(n) => { const s = document.querySelector('select[data-cosines]'); s.value = n; s.dispatchEvent(new Event('change')) }"  # fmt: skip
        before = page.run(squares)
        assert any("−" in text for text, _ in before) and any(int(heat) < -20 for _, heat in before)
        page.run(f"({choose})(2)")
        assert page.run(squares) != before
        page.run(f"({choose})(0)")
        assert page.run(squares) == before  # the script writes what the page was written with
        assert page.console == []


def test_a_run_named_as_a_script_runs_nothing(tmp_path: Path, browser: Browser) -> None:
    bad = "<script>document.title='x'</script>"
    out = write_report([make_run(tmp_path / "run", [bad, "<img src=x onerror=document.title='x'>"])]).out  # fmt: skip
    with Page(browser, 1280) as page:
        page.open(out)
        assert page.run("document.title") == "flix report: run" and page.console == []
        assert bad in page.run("document.querySelector('#scores ~ .by-column').innerText")


def test_paper_and_colours_by_column(page_of_many: Path, browser: Browser) -> None:
    with Page(browser, 1280) as page:
        page.open(page_of_many)
        colours = "[...document.querySelectorAll('.by-column td.h')].map(e => getComputedStyle(e).backgroundColor)"  # fmt: skip
        before = page.run(colours)
        assert len(set(before)) > 50
        page.run("document.querySelector('.by-column input').click()")
        assert page.run(colours) != before
        page.run("dispatchEvent(new Event('beforeprint')); 0")
        page.media(kind="print")
        assert page.run("getComputedStyle(document.querySelector('form')).display") == "none"
        assert page.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"  # fmt: skip
        assert page.run("document.querySelectorAll('details:not([open]):not(.long)').length") == 0
        page.run("dispatchEvent(new Event('afterprint')); 0")
        assert page.run("document.querySelectorAll('details:not([open]):not(.long)').length") == 1

"""Writes the pictures of docs/report.md: ``python -m tests.report.screenshots [NAME RUN ...]``.

Without arguments of a run that is made up, as images/report-WIDTH.png; else of a page about the runs, as
images/NAME-WIDTH.png. It needs a Chromium.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from flix.report import write_report
from tests.helpers.browser import Browser, Page, needed_browser
from tests.helpers.runs import make_large

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SIZES = ((1280, 1150), (390, 844))


def main(name: str = "report", *runs: str) -> None:
    """Write the pictures."""
    with tempfile.TemporaryDirectory() as folder, Browser(needed_browser()) as browser:
        found = [Path(run) for run in runs]
        if not found:
            os.chdir(folder)
            found = [make_large(Path("runs/made-up"))]
        page = write_report(found, Path(folder) / "report.html").out
        for width, height in SIZES:
            with Page(browser, width, height) as opened:
                opened.open(page)
                opened.picture(IMAGES / f"{name}-{width}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The code blocks of README and docs: which run, and why the others do not.

    python -m tests.site.blocks                       # every page: each block, and what becomes of it
    python -m tests.site.blocks --run docs/faq.md     # run one page's blocks as typed, in an empty folder

The python blocks of a page run one after the other, as a reader would type them. A block does not run if the paragraph
before it, which the page shows, begins with ``Not run:`` (in italics) and gives a reason; the same words above a page's
first block and ``on this page`` speak for all. Blocks without a language are output, and those of YAML are files: they
run nothing.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.site.public import ROOT

FENCE = re.compile(r"^```([\w{}-]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"\*Not run(?P<all>, on this page)?: (?P<why>[^*]+)\*\s*\Z")
WHOLE_PAGE = re.compile(r"^\*Not run, on this page: ([^*]+)\*$", re.MULTILINE)
PYTHON = {"python", "py"}
SHELL = {"bash", "sh", "console"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: where it begins in its page.
        language: as the page says.
        code: what it holds.
        reason: why it does not run; empty if it runs.
    """

    line: int
    language: str
    code: str
    reason: str = ""


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page that are code."""
    whole = WHOLE_PAGE.search(text)
    for found in FENCE.finditer(text):
        language, code = found.groups()
        if language in PYTHON | SHELL:
            said = NOT_RUN.search(text[: found.start()])
            reason = said["why"] if said else whole[1] if whole else ""
            yield Block(text[: found.start()].count("\n") + 1, language, code, reason)


def runs(text: str) -> list[Block]:
    """The blocks of a page that run."""
    return [block for block in blocks(text) if block.language in PYTHON and not block.reason]


def run(page: Path) -> None:
    """Run a page's blocks, in this process, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names = {"__name__": "__main__"}
        for block in runs(page.read_text(encoding="utf-8")):
            # Lines count as in the page, so that a traceback names the place.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        os.chdir(ROOT)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--run"]:
        return run((ROOT / arguments[1]).resolve())
    for page in pages():
        for block in blocks(page.read_text(encoding="utf-8")):
            state = f"not run: {block.reason}" if block.reason else "runs"
            print(f"{page.relative_to(ROOT)}:{block.line} {block.language}: {state}")
    return None


if __name__ == "__main__":
    main(sys.argv[1:])

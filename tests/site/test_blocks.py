"""Every code block of README and docs runs as typed, or the page says why it does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.site.blocks import ROOT, SHELL, blocks, pages, run, runs

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in pages()}
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if runs(text)])
def test_blocks_run_as_typed(name):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-m", "tests.site.blocks", "--run", name],
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", PAGES)
def test_what_does_not_run_has_a_reason(name):
    shell = [block for block in blocks(PAGES[name]) if block.language in SHELL]
    assert [block.line for block in shell if not block.reason] == []


def page(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


def test_blocks_share_their_names(tmp_path):
    run(page(tmp_path, "```python\na = 1\n```\n\ntext\n\n```python\nassert a == 1\n```\n"))


def test_a_block_that_fails_is_found(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(page(tmp_path, "```python\n1 / 0\n```\n"))


def test_a_reason_is_read_from_the_page():
    text = "*Not run: needs a GPU.*\n\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n"
    first, second = blocks(text)
    assert first.reason == "needs a GPU." and second.reason == ""
    assert [block.code for block in runs(text)] == ["x = 1\n"]


def test_a_reason_may_speak_for_a_page():
    text = "*Not run, on this page: excerpts.*\n\nHello.\n\n```python\nx\n```\n\n```bash\ny\n```\n"
    assert [block.reason for block in blocks(text)] == ["excerpts.", "excerpts."]


def test_output_is_no_code():
    assert [*blocks("```\nstep 1\n```\n\n```{toctree}\nx\n```\n")] == []

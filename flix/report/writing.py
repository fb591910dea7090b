"""Writes a page: one HTML file that holds its style, its script and everything it shows."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from flix._version import __version__
from flix.core.errors import MissingFrameworkError
from flix.core.files import make_folder, write_file
from flix.report.reading import ReportError

# What runs and studies are kept in.
_RECORDS = {
    "adapter", "checkpoints", "config.yaml", "log.jsonl", "metrics.json", "mixture.json", "predictions.jsonl", "run.json",
    "scores.json", "chosen.json", "weights.json", "runs", "choosing",
}  # fmt: skip
_MARK = '<meta name="generator" content="flix report'
Sentence = list[tuple[str, str]]
"""Pieces of text, each with how it is set: "" plain, "b" bold, "code" as code."""


@dataclass(frozen=True)
class Written:
    """A report that was written.

    Attributes:
        out: the page.
        size: its bytes.
        short: the sentences at its top.
        missing: what the page cannot show, and why.
    """

    out: Path
    size: int
    short: list[str]
    missing: list[str]


def check_out(out: Path, force: bool, folders: Sequence[Path]) -> None:
    """Refuse to overwrite what is not a report.

    Args:
        out: the page.
        force: whether it may take the place of a file that is not a report.
        folders: the runs, or the study, that the page is about; ``force`` does not reach what they are kept in.

    Raises:
        ReportError: ``out`` is a folder, or such a file.
    """
    if out.is_dir():
        raise ReportError(f"--out must be a file, but {str(out)!r} is a folder")
    if not out.exists() or is_report(out):
        return
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            name = out.resolve().relative_to(folder.resolve()).parts[0]
            if name in _RECORDS:
                raise ReportError(f"--out: {str(out)!r} belongs to what the page is about; name another file")  # fmt: skip
    if not force:
        raise ReportError(f"--out: {str(out)!r} is not a flix report; --force overwrites it anyway")


def is_report(path: Path) -> bool:
    """Whether a file is a page that flix wrote."""
    with open(path, "rb") as file:
        return _MARK.encode() in file.read(2000)


def put(out: Path, text: str) -> int:
    """Write a page; returns its bytes."""
    data = text.encode("utf-8", "replace")
    make_folder(out.parent)
    write_file(out, data)
    return len(data)


def rendered(template: str, **values: Any) -> str:
    """A page from a template, with the style and the script that all pages have.

    Raises:
        MissingFrameworkError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingFrameworkError(
            'a report needs jinja2; install it with: pip install "flix-peft[report]"'
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flix.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text: str = environment.get_template(template).render(
        generator=f"flix report {__version__}",
        style=safe(_part("style.css")),
        script=safe(script),
        script_hash=f"sha256-{digest}",
        **values,
    )
    return text


def _part(name: str) -> str:
    return files("flix.report").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def safe(text: str) -> Any:
    """A text of our own, which the template takes as it is."""
    from markupsafe import Markup

    return Markup(text)


def marked(sentence: Sentence) -> Any:
    """A sentence as HTML, its texts escaped."""
    return safe(
        "".join(
            f"<{tag}><bdi>{html.escape(text)}</bdi></{tag}>" if tag else html.escape(text)
            for text, tag in sentence
        )
    )

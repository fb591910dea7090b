"""What a package index shows has no link that works in a clone alone."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[2]
FOUND = importlib.util.spec_from_file_location("flix_setup", ROOT / "setup.py")
assert FOUND and FOUND.loader
shown = importlib.util.module_from_spec(FOUND)
FOUND.loader.exec_module(shown)
ADDRESS = "https://example.org/flix"


def targets(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_without_an_address_links_are_text() -> None:
    text = shown.for_index("![a b](x.svg) [x.md](x.md) [y](docs/x.md#z) [p](https://example.org)")
    assert text == "*a b* x.md y (docs/x.md#z) [p](https://example.org)"


def test_with_an_address_links_lead_there() -> None:
    text = shown.for_index("![a](x.svg) [y](docs/x.md#z) [p](https://e.org) [q](#part)", ADDRESS)
    assert targets(text) == [
        f"{ADDRESS}/raw/HEAD/x.svg",
        f"{ADDRESS}/blob/HEAD/docs/x.md#z",
        "https://e.org",
        "#part",
    ]


def test_no_link_of_readme_stays_relative() -> None:
    assert all(target.startswith("https://") for target in targets(shown.description()))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    absolute = targets(shown.for_index(readme, ADDRESS))
    assert len(absolute) == len(targets(readme)) > 20
    assert all(target.startswith("https://") for target in absolute)

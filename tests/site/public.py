"""Which modules are public: those that docs/api has a page of."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api"


def modules() -> list[str]:
    """The modules that the API's pages are about, sorted."""
    found = []
    for page in API.glob("*.md"):
        found += re.findall(r"^\.\. automodule:: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)
    return sorted(found)

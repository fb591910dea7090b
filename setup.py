"""What a package index shows: README, with links that work there. Everything else is in pyproject.toml.

Links into the repository need its address. There is none yet, so they become text, and a picture its caption. Once
``[project.urls]`` in pyproject.toml names a ``Repository``, they lead to it.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def for_index(text: str, repository: str = "") -> str:
    """The text with its links into the repository made absolute, or made text where there is no address."""

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if "://" in target or target.startswith("#"):
            return found[0]
        if repository:
            kind = "raw" if picture else "blob"
            return f"{picture}[{words}]({repository.rstrip('/')}/{kind}/HEAD/{target})"
        return f"*{words}*" if picture else words if words == target else f"{words} ({target})"

    return LINK.sub(link, text)


def description() -> str:
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return for_index(readme, project["urls"].get("Repository", ""))


if __name__ == "__main__":
    setup(long_description=description(), long_description_content_type="text/markdown")

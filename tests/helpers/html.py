"""A page's elements, each closed in its order."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "input", "link", "hr"}


class Checked(HTMLParser):
    """Holds what elements a page has, and sees that each is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, dict[str, Any]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def asks(self) -> list[tuple[str, str]]:
        """Elements that would fetch something from elsewhere, with what they ask for."""
        return [
            (tag, value)
            for tag, attributes in self.attributes
            for name in ("src", "href", "xlink:href", "action", "srcset")
            if (value := str(attributes.get(name) or ""))
            and not value.startswith(("#", "data:image/png;base64,"))
        ]

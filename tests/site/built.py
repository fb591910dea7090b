"""Check a site that Sphinx has built: links, anchors, pictures, and that every public name has its place.

    python -m tests.site.built docs/_build/html      # exit with 1 and a line for each fault

Links to other hosts are not followed: this runs without a network.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.site.public import modules


class Page(HTMLParser):
    """What a page has and what it points to.

    Attributes:
        anchors: the ids on the page.
        links: what ``href`` and ``src`` name, as they are written.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value and tag != "meta":
                self.anchors.add(value)
            elif name in ("href", "src") and value is not None:
                self.links.append(value)


def dead_links(site: Path) -> Iterator[str]:
    """Links of the site that lead nowhere, each with its page."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no page"
    for path, page in pages.items():
        here = path.relative_to(site)
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("https", "mailto", "data"):
                continue
            if parts.scheme or parts.netloc:
                yield f"{here}: {link} is neither of this site nor https"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{here}: {link} does not exist"
            elif target in pages and unquote(parts.fragment) not in {"", *pages[target].anchors}:
                yield f"{here}: {link} has no such anchor"


def names(module: ModuleType) -> Iterator[str]:
    """A module's public names, and those of its classes that are flix's own."""
    for name in getattr(module, "__all__", None) or own(module):
        value = getattr(module, name)
        if inspect.ismodule(value) and value.__name__ == f"{module.__name__}.{name}":
            continue  # it has a page of its own, or is internal
        yield f"{module.__name__}.{name}"
        if inspect.isclass(value) and value.__module__.startswith("flix"):
            for member, how in vars(value).items():
                if not member.startswith("_") and is_method(how):
                    yield f"{module.__name__}.{name}.{member}"


def own(module: ModuleType) -> list[str]:
    """The public classes and functions that a module without ``__all__`` defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def is_method(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))


def undocumented(inventory: Iterable[str], wanted: Iterable[ModuleType]) -> list[str]:
    """Public names that no page documents."""
    documented = set(inventory)
    return [name for module in wanted for name in names(module) if name not in documented]


def inventory(site: Path) -> set[str]:
    """The Python names that the site documents."""
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        found = InventoryFile.load(file, "", lambda base, uri: uri)
    found = getattr(
        found, "data", found
    )  # a dictionary, in some versions of Sphinx inside another object
    return {name for kind, items in found.items() if kind.startswith("py:") for name in items}


def imported() -> list[ModuleType]:
    """The public modules.

    What transformers imports comes before TensorFlow, as in docs/_ext/tidy.py: the other way round, two copies of LLVM
    can meet, which ends the process.
    """
    for name in ("flix.tasks", "flix.training", "flix.transformers"):
        module = importlib.import_module(name)
        for public in module.__all__:
            getattr(module, public)
    return [importlib.import_module(name) for name in modules()]


def main(arguments: list[str]) -> int:
    os.environ["KERAS_BACKEND"] = "tensorflow"  # as the site is built
    site = Path(arguments[0]).resolve()
    faults = [*dead_links(site)]
    faults += [f"{name} is on no page" for name in undocumented(inventory(site), imported())]
    for fault in faults:
        print(fault)
    print(f"{len([*site.rglob('*.html')])} pages, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

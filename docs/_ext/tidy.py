"""What Sphinx does not know by itself about flix's pages and docstrings."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain

CITED = re.compile(r"docs/specification\.md ((?:§[\d.]*\d(?:, | and )?)+)")
PAGE = re.compile(r"(?<![`/\w])(?:``)?docs/([\w-]+)\.md(?:``)?")
NUMBER = re.compile(r"§(\d+(?:\.\d+)*)")
# Files outside docs/ that are pages of the site, under these names.
PAGES = {
    "../CONTRIBUTING.md": "CONTRIBUTING.md",
    "../CHANGELOG.md": "changelog.md",
    "../flix/quickstart/base/README.md": "quickstart-base.md",
}


class Names(PythonDomain):
    """A class of two modules has one home, whichever page shows it first; that is no mistake here."""

    def note_object(
        self, name: str, objtype: str, node_id: str, aliased: bool = False, location: Any = None
    ) -> None:
        if not (aliased and name in self.objects):
            super().note_object(name, objtype, node_id, aliased, location)


def cited(text: str) -> str:
    """Citations of the specification, and of other pages, as links in a docstring."""
    text = CITED.sub(lambda found: NUMBER.sub(r":ref:`§\1 <spec-\1>`", found[1]), text)
    return PAGE.sub(r":doc:`docs/\1.md </\1>`", text)


def docstring(app: Sphinx, what: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    lines[:] = cited("\n".join(lines)).split("\n")


def lazy(app: Sphinx) -> None:
    """Names that a module imports when they are asked for are asked for."""
    for name in ("flix.tasks", "flix.training", "flix.transformers"):
        module = importlib.import_module(name)
        for public in module.__all__:
            setattr(module, public, getattr(module, public))


def source(app: Sphinx, name: str, content: list[str]) -> None:
    """Links to files outside docs/ lead to their pages, on GitHub and here."""
    for file, page in PAGES.items():
        up = "../" * name.count("/")
        content[0] = content[0].replace(f"]({up}{file}", f"]({up}{page}")


def numbers(app: Sphinx, tree: nodes.document) -> None:
    """Parts of the specification have labels, ``spec-5.1.2``."""
    if app.env.docname != "specification":
        return
    labels = app.env.domains.standard_domain
    for section in tree.findall(nodes.section):
        title = section.next_node(nodes.title)
        if title and (found := re.match(r"(\d+(?:\.\d+)*)\.? ", title.astext())):
            label = f"spec-{found[1]}"
            labels.labels[label] = ("specification", section["ids"][0], title.astext())
            labels.anonlabels[label] = ("specification", section["ids"][0])


def inline(app: Sphinx, tree: nodes.document, name: str) -> None:
    """Our drawings stand in the page itself, so that they follow its theme."""
    if app.builder.format != "html":
        return
    for image in list(tree.findall(nodes.image)):
        if image["uri"].startswith("images/drawings/"):
            drawn = Path(app.srcdir, image["uri"]).read_text(encoding="utf-8")
            html = f'<div class="drawing" tabindex="0">{drawn}</div>'
            image.replace_self(nodes.raw("", html, format="html"))


def breakable(app: Sphinx, tree: nodes.document, name: str) -> None:
    """Names of modules in headings may break after their dots, as on a phone they must."""
    for title in tree.findall(nodes.title):
        for text in list(title.findall(nodes.Text)):
            if app.builder.format == "html" and re.fullmatch(r"\w+(\.\w+)+", text):
                parts: list[nodes.Node] = []
                for part in re.findall(r"\w+\.?", text):
                    parts += [nodes.Text(part), nodes.raw("", "<wbr>", format="html")]
                text.parent.replace(text, parts[:-1])


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_domain(Names, override=True)
    app.connect("builder-inited", lazy)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("source-read", source)
    app.connect("doctree-read", numbers)
    app.connect("doctree-resolved", inline)
    app.connect("doctree-resolved", breakable)
    return {"parallel_read_safe": False, "parallel_write_safe": True}

"""What docs/_ext/tidy.py changes in pages."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from tests.site.public import ROOT

pytest.importorskip("sphinx")
from docutils import nodes
from docutils.utils import new_document

FOUND = importlib.util.spec_from_file_location("tidy", ROOT / "docs" / "_ext" / "tidy.py")
tidy = importlib.util.module_from_spec(FOUND)
FOUND.loader.exec_module(tidy)


@pytest.mark.parametrize(
    "words,shown",
    [
        ("flix.backends.torch", ["flix.", "<wbr>", "backends.", "<wbr>", "torch"]),
        ("More features. And more", ["More features. And more"]),
        ("flix", ["flix"]),
    ],
)
def test_names_of_modules_may_break_after_their_dots(words, shown):
    tree = new_document("page")
    tree += nodes.section("", nodes.title("", words))
    tidy.breakable(SimpleNamespace(builder=SimpleNamespace(format="html")), tree, "page")
    (title,) = tree.findall(nodes.title)
    assert [part.astext() for part in title.children] == shown


def test_citations_become_links():
    text = "see docs/specification.md §1.5 and docs/serving.md"
    section = text.split()[2]  # written once: a citation without its page is a fault elsewhere
    assert (
        tidy.cited(text) == f"see :ref:`{section} <spec-1.5>` and :doc:`docs/serving.md </serving>`"
    )

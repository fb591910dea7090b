"""What ``make docs`` checks of a built site is found where it is wrong."""

from __future__ import annotations

import ast
from types import ModuleType

import pytest

from tests.site.built import Page, dead_links, undocumented
from tests.site.public import API, ROOT, modules

APPLICATIONS = {"flix.cli", "flix.quickstart.data"}  # their surface is the command line


def written(folder, **pages):
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    return folder


def test_a_site_without_faults_has_none(tmp_path):
    site = written(
        tmp_path,
        one='<h1 id="top">1</h1> <a href="two.html#part">2</a> <a href="#top">up</a>',
        two='<p id="part"></p> <a href="https://example.org/x#y">out</a> <a href="one.html">1</a>',
    )
    assert [*dead_links(site)] == []


@pytest.mark.parametrize(
    "link", ["three.html", "#gone", "two.html#gone", "http://example.org", "//example.org/x.js"]
)
def test_a_dead_link_is_found(tmp_path, link):
    site = written(tmp_path, one=f'<a href="{link}">x</a>', two="")
    (found,) = dead_links(site)
    assert found.startswith(f"one.html: {link} ")


def test_a_missing_picture_is_found(tmp_path):
    assert len([*dead_links(written(tmp_path, one='<img src="gone.svg">'))]) == 1


def test_a_site_without_pages_is_a_fault(tmp_path):
    assert len([*dead_links(tmp_path)]) == 1


def test_ids_are_anchors():
    assert Page('<p id="a"><a name="b"></a><meta name="c">').anchors == {"a", "b"}


def test_a_name_or_method_that_no_page_has_is_found():
    class Thing:
        """A thing."""

        def shown(self):
            """Shown."""

        def hidden(self):
            pass

    Thing.__module__ = "flix.made_up"
    module = ModuleType("flix.made_up")
    module.Thing, module.other, module.__all__ = Thing, 1, ["Thing", "other"]
    inventory = ["flix.made_up.Thing", "flix.made_up.Thing.shown"]
    assert undocumented(inventory, [module]) == ["flix.made_up.Thing.hidden", "flix.made_up.other"]


def test_every_public_package_has_a_page():
    public = set()
    for file in (ROOT / "flix").rglob("__init__.py"):
        assigned = [node for node in ast.parse(file.read_text("utf-8")).body if is_all(node)]
        if assigned:
            public.add(".".join(file.parent.relative_to(ROOT).parts))
    assert public - APPLICATIONS <= set(modules())
    assert len(modules()) == len(set(modules())) == len([*API.glob("*.md")]) - 1


def is_all(node):
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
    )

"""The public interface is the one that is written down: a change of it is meant, and seen in a diff."""

from __future__ import annotations

import importlib

import pytest

from tests.packaging import public
from tests.packaging.public import FILE, MODULES, names

WRITTEN = {
    part.splitlines()[0].removeprefix("# "): part.splitlines()[1:]
    for part in FILE.read_text(encoding="utf-8").split("\n\n")
}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_is_listed(module: str) -> None:
    for needed in MODULES[module]:
        pytest.importorskip(needed)
    assert names(module) == [line for line in WRITTEN[module] if line], (
        "the public interface changed: see the deprecation policy in CONTRIBUTING.md, then run "
        "python -m tests.packaging.public"
    )


def test_a_renamed_parameter_is_seen() -> None:
    def made(rows, *, weights=None): ...

    def other(rows, *, weight=None): ...

    assert public.called(made) == "(rows, *, weights=)"
    assert public.called(made) != public.called(other)


def test_a_lost_name_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = importlib.import_module("flix.ranks")
    monkeypatch.setattr(ranks, "__all__", ranks.__all__[1:])
    assert names("flix.ranks") != WRITTEN["flix.ranks"]

"""The seam's own rules: what counts as offered, and that the protocol says what the verbs ask for."""

from __future__ import annotations

import ast
import inspect
from types import SimpleNamespace

import pytest

from flix.backends import protocol, verbs
from flix.backends.protocol import Backend, Counts, lacking, members

OPTIONAL = [
    protocol.SupportsHeads,
    protocol.SupportsBase,
    protocol.SupportsDequantizing,
    protocol.SupportsDropout,
    protocol.SupportsFolding,
    protocol.SupportsPeft,
    protocol.SupportsSearching,
    protocol.SupportsProcesses,
]


def test_members_are_what_a_protocol_asks_for():
    assert members(protocol.SupportsFolding) == ("fold", "folded", "unfold")


def test_lacking_names_what_is_not_there_in_the_protocols_order():
    assert lacking(None) == members(Backend)
    some = SimpleNamespace(fold=print, unfold=print, folded="no function")
    assert lacking(some, protocol.SupportsFolding) == ("folded",)
    some.folded = print
    assert lacking(some, protocol.SupportsFolding) == ()


def test_counts_start_at_nothing():
    assert (Counts().total, Counts().trainable) == (0, 0)


@pytest.mark.parametrize("asked", [Backend, *OPTIONAL])
def test_every_member_is_documented_and_typed(asked):
    for name in members(asked):
        function = getattr(asked, name)
        assert inspect.getdoc(function), name
        hints = inspect.signature(function)
        parameters = list(hints.parameters.values())[1:]
        assert hints.return_annotation is not inspect.Signature.empty, name
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters), name


def test_the_seam_can_be_read_in_one_sitting():
    assert len(inspect.getsource(protocol).splitlines()) <= 220


def test_verbs_use_the_members_of_the_protocols_alone():
    """And all of them: a primitive that no verb asks for would be asked of every backend in vain."""
    used = set()
    for module in (
        verbs.features,
        verbs.files,
        verbs.merging,
        verbs.models,
        verbs.searching,
        verbs.shared,
    ):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute):
                source = ast.unparse(node.value)
                if source in (
                    "self.primitives",
                    "heads",
                    "primitives",
                    "folding",
                    "peft",
                    "supporting",
                ):
                    used.add(node.attr)
    assert used == {name for asked in (Backend, *OPTIONAL) for name in members(asked)}

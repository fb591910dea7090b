"""Backends by name: they are found, imported when asked for, and held to the protocol."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

import flix
from flix import backends
from flix.backends.protocol import Backend, members

NAMES = members(Backend)


def _stub(left_out=()):
    """A module whose primitives do nothing."""
    module = ModuleType("stub_backend")
    given = [name for name in NAMES if name not in left_out]
    module.primitives = SimpleNamespace(**dict.fromkeys(given, lambda *args: None))
    return module


def _tabled(monkeypatch, module):
    """The module as one of flix's own backends."""
    monkeypatch.setitem(sys.modules, "stub_backend", module)
    monkeypatch.setitem(backends._OWN, "stub", ("stub_backend", "numpy"))


def _registered(monkeypatch, folder, module):
    """The module as the entry point of an installed package."""
    monkeypatch.setitem(sys.modules, "stub_backend", module)
    info = folder / "stub_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flix.backends]\nstub = stub_backend\n")
    monkeypatch.syspath_prepend(folder)


def test_the_protocol_asks_for_fourteen_primitives():
    assert len(NAMES) == 14 and {"read", "write", "change", "merged"} <= set(NAMES)


def test_a_whole_stub_passes(monkeypatch, tmp_path):
    module = _stub()
    _registered(monkeypatch, tmp_path, module)
    assert backends.get("stub") is module
    assert backends.available()["stub"]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_primitive_is_named(monkeypatch, name):
    _tabled(monkeypatch, _stub([name]))
    with pytest.raises(backends.IncompleteBackendError) as caught:
        backends.get("stub")
    assert f"lacks the primitives {name}:" in str(caught.value)
    assert "'stub' (stub_backend)" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_primitive_of_an_installed_package_is_named(monkeypatch, tmp_path, name):
    _registered(monkeypatch, tmp_path, _stub([name]))
    with pytest.raises(backends.IncompleteBackendError, match=f"lacks the primitives {name}:"):
        backends.get("stub")


def test_all_that_are_missing_are_named(monkeypatch, tmp_path):
    _registered(monkeypatch, tmp_path, _stub(["read", "switch"]))
    with pytest.raises(TypeError, match=r"primitives read, switch: .*write-a-backend"):
        backends.get("stub")


def test_a_module_without_primitives_lacks_them_all(monkeypatch, tmp_path):
    module = _stub()
    del module.primitives
    _registered(monkeypatch, tmp_path, module)
    with pytest.raises(flix.FlixError, match=", ".join(NAMES)):
        backends.get("stub")


def test_what_is_not_callable_is_no_primitive(monkeypatch, tmp_path):
    module = _stub()
    module.primitives.read = None
    _registered(monkeypatch, tmp_path, module)
    with pytest.raises(backends.IncompleteBackendError, match=r"primitives read:"):
        backends.get("stub")


def test_flix_own_names_win_over_entry_points(monkeypatch, tmp_path):
    _registered(monkeypatch, tmp_path, _stub())
    (tmp_path / "stub_backend-1.0.dist-info" / "entry_points.txt").write_text(
        "[flix.backends]\ntorch = stub_backend\n"
    )
    assert backends._modules()["torch"] == "flix.backends.torch"


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(KeyError, match=r"no backend 'troch'.*did you mean 'torch'"):
        backends.get("troch")


@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow"])
def test_own_backends_are_listed_by_what_is_installed(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert backends.available()[name] is False

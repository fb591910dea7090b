"""The machine and the versions that something ran with."""

from __future__ import annotations

import os
import platform
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from flix._version import __version__
from flix.core.machine import command, machine, peak_memory, versions


def test_the_machine_is_described_with_its_device() -> None:
    assert machine("cpu") == {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("module", "program", "said"),
    [
        (None, "/venv/bin/flix", ["flix"]),
        ("flix.__main__", "/src/flix/__main__.py", ["flix"]),
        ("flix.cli.__main__", "/src/flix/cli/__main__.py", ["flix"]),
        ("some.tool.__main__", "/src/some/tool/__main__.py", ["python", "-m", "some.tool"]),
        ("some.tool", "/src/some/tool.py", ["python", "-m", "some.tool"]),
        (None, "own.py", ["own.py"]),
        (None, "", [""]),
    ],
)
def test_a_command_line_is_as_it_was_typed_and_flix_has_no_path(
    module: str | None, program: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if module is None else SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, "argv", [program, "train", "a b.yaml"])
    assert command() == [*said, "train", "a b.yaml"]


def test_versions_are_of_what_is_installed() -> None:
    assert versions("numpy", "no-such-package") == {
        "flix": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows does not say")
def test_the_most_memory_is_in_bytes_and_only_grows() -> None:
    before = peak_memory()
    assert 1 << 20 < before < 1 << 40
    held = np.ones(1 << 24, np.uint8)
    assert peak_memory() >= before and held.all()


def test_where_the_system_does_not_say_the_most_memory_is_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 0

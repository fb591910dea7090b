"""The marker from which the table in docs/support.md is made."""

from __future__ import annotations

from tests.architectures.claims import MARKER


def pytest_configure(config):
    config.addinivalue_line("markers", MARKER)

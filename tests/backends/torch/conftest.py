"""What every test of the torch backend runs under."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _compilers_forget():
    """Dynamo gives up on a frame for good once a call of it could not be compiled; the next test's may be."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"]._dynamo.reset()

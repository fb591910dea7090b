"""Pauses of the garbage collector end, whatever happens."""

from __future__ import annotations

import gc

import pytest

from flix.core.garbage import uncollected


def test_the_collector_is_paused_and_goes_on():
    @uncollected
    def run(fail):
        """Its own text."""
        assert not gc.isenabled()
        if fail:
            raise ValueError("no")
        return 3

    assert gc.isenabled()
    assert run(False) == 3 and gc.isenabled() and run.__doc__ == "Its own text."
    with pytest.raises(ValueError, match="no"):
        run(True)
    assert gc.isenabled()
    gc.disable()
    try:
        assert run(False) == 3 and not gc.isenabled()
    finally:
        gc.enable()

"""Initial values: keyed, pinned, of the right size."""

from __future__ import annotations

import numpy as np
import pytest

from flix.core.adapter import initial
from flix.core.adapter.initial import initial_a, initial_b


def test_initial_values():
    arguments = {"seed": 0, "layer": "a.q", "group": "task", "feature": "ner", "d_in": 100}
    a = initial_a(rank=64, **arguments)
    assert a.dtype == np.float32 and a.shape == (64, 100)
    assert np.abs(a).max() <= 0.1 and a.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
    np.testing.assert_array_equal(initial_a(rank=8, **arguments), a[:8])
    for change in ({"seed": 1}, {"layer": "a.k"}, {"group": "t"}, {"feature": "n"}):
        assert (initial_a(rank=64, **{**arguments, **change}) != a).mean() > 0.99
    assert not initial_b(rank=3, d_out=5).any()
    # Pinned: a change of these bytes changes every adapter that is trained from a seed.
    head = initial_a(rank=1, **{**arguments, "d_in": 4}).ravel().tolist()
    assert head == PINNED


PINNED = [0.2735711932182312, -0.25617116689682007, 0.182822585105896, 0.24849069118499756]


@pytest.mark.parametrize("values", [1, 100, 1 << 30])
def test_a_value_goes_by_its_position_however_many_are_made_at_a_time(monkeypatch, values):
    arguments = {"seed": 0, "layer": "a.q", "group": "task", "feature": "ner", "rank": 3}
    for d_in in (40, initial._VALUES + 3):
        wanted = initial_a(d_in=d_in, **arguments)
        assert len({row.tobytes() for row in wanted}) == 3
        with monkeypatch.context() as patch:
            patch.setattr(initial, "_VALUES", values)
            np.testing.assert_array_equal(initial_a(d_in=d_in, **arguments), wanted)

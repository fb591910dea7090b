"""A composition of known weights, and what a search for them must find."""

from __future__ import annotations

import pytest

from flix import SearchedWeights

GOAL = {"language": {"hau": 0.6, "zul": -0.3}, "task": "ner"}


def assert_goal_found(found: SearchedWeights) -> None:
    """The weights are those of GOAL, and the loss with them is a small part of what it was."""
    assert found.loss < 0.02 * found.before
    assert found.row["language"]["hau"] == pytest.approx(0.6, abs=0.08)
    assert found.row["language"]["zul"] == pytest.approx(-0.3, abs=0.08)
    assert found.row["task"] == {"ner": 1.0}

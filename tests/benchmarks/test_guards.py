"""The guards refuse arms that do not compute what they claim."""

import numpy as np
import pytest

from benchmarks.common import Arm
from benchmarks.guards import GuardError, Pair, check_values, guard, reference

RNG = np.random.default_rng(0)
X, DY = RNG.normal(size=(2, 3, 5)), RNG.normal(size=(2, 3, 4))
WEIGHT, BIAS = RNG.normal(size=(4, 5)), RNG.normal(size=4)
PAIRS = {f: Pair(RNG.normal(size=(2, 5)), RNG.normal(size=(4, 2))) for f in ("a", "b", "c")}
ROWS = [["a", "b"], ["b"]]
EXPECTED = reference(X, DY, WEIGHT, BIAS, PAIRS, ROWS)


def arm_of(**changed):
    """An arm that is right but for some results."""
    found = {**EXPECTED, **changed}
    return Arm("broken", lambda: {k: v for k, v in found.items() if v is not None})


def test_a_right_arm_passes():
    guard(arm_of(), EXPECTED, absent=["dA c", "dB c"])


def test_the_reference_is_the_definition():
    """By the per-example kernel, and by finite differences."""
    for n, names in enumerate(ROWS):
        kernel = WEIGHT + sum(PAIRS[f].b @ PAIRS[f].a for f in names)
        np.testing.assert_allclose(EXPECTED["y"][n], X[n] @ kernel.T + BIAS)
        np.testing.assert_allclose(EXPECTED["dx"][n], DY[n] @ kernel)
    step = 1e-6
    moved = {**PAIRS, "b": Pair(PAIRS["b"].a + step * np.eye(2, 5), PAIRS["b"].b)}
    change = (reference(X, DY, WEIGHT, BIAS, moved, ROWS)["y"] - EXPECTED["y"]) / step
    assert (change * DY).sum() == pytest.approx((EXPECTED["dA b"] * np.eye(2, 5)).sum(), rel=1e-4)
    assert "dA c" not in EXPECTED


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": None}, "y was not computed"),  # a pruned output
        ({"dB b": None}, "dB b was not computed"),  # a gradient that was lost
        ({"dA a": np.zeros((2, 5))}, "dA a is zero throughout"),  # a dead gradient
        ({"y": EXPECTED["y"] * np.nan}, "not finite"),
        ({"y": np.zeros((0, 3, 4))}, "empty"),
        ({"dx": EXPECTED["dx"] * 1.01}, "dx differs"),
        ({"dA b": EXPECTED["dA b"].T}, "shape"),
        ({"dA c": np.zeros((2, 5))}, "no row of the batch uses it"),  # zeros for an unused table
    ],
)
def test_a_broken_arm_is_refused(changed, message):
    with pytest.raises(GuardError, match=message):
        guard(arm_of(**changed), EXPECTED, absent=["dA c"])


def test_names_alone_want_a_value_that_is_not_zero():
    check_values("arm", {"y": np.ones(2)}, ["y"])
    with pytest.raises(GuardError, match="zero throughout"):
        check_values("arm", {"y": np.zeros(2)}, ["y"])


def test_results_are_read_from_what_the_run_returned():
    """An arm that keeps its output to itself has, to a compiler, no output."""
    hidden = Arm("hidden", dict, dict)
    with pytest.raises(GuardError, match="y was not computed"):
        guard(hidden, {"y": EXPECTED["y"]})

"""The kit's own definitions against numbers worked out elsewhere, and its comparisons against values at their edge."""

from __future__ import annotations

import numpy as np
import pytest
from flix_conformance import bits, compare, oracle
from flix_conformance.harness import Case
from flix_conformance.signatures import signature


def test_finaliser_gives_the_published_sequence() -> None:
    """SplitMix64 seeded with 1234567: its first outputs, as the generator's reference implementations print them."""
    golden, state, found = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        state = (state + golden) % 2**64
        found.append(bits._finalise(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_bfloat16_rounds_to_even() -> None:
    unit = 2.0**-8
    values = np.array([1 + unit, 1 + 3 * unit, 1 + 1.01 * unit, -(1 + unit), 0.0, 3.0])
    expected = [1.0, 1 + 4 * unit, 1 + 2 * unit, -1.0, 0.0, 3.0]
    assert compare.bfloat16(values).tolist() == expected


@pytest.mark.parametrize(("error", "passes"), [(60 * 2.0**-24, True), (70 * 2.0**-24, False)])
def test_close_goes_by_the_size_of_the_sum(error: float, passes: bool) -> None:
    def check() -> None:
        compare.close(
            np.array([1e-3 + 5 * error]), np.array([1e-3]), np.array([5.0]), "float32", "y"
        )

    if passes:
        check()
    else:
        with pytest.raises(AssertionError, match="times the tolerance"):
            check()


def test_oracle_gradients_are_those_of_its_forward() -> None:
    """Central differences of the oracle's own output."""
    chosen = signature(4)
    rng = np.random.default_rng(0)
    case = Case(
        config=chosen.config,
        table=chosen.table,
        path="proj",
        kind="linear",
        kernel=rng.normal(size=(4, 5)),
        bias=None,
        pairs={
            f: (rng.normal(size=(r, 4)), rng.normal(size=(5, r)))
            for f, r in zip(chosen.table.features, chosen.ranks, strict=True)
        },
        x=rng.normal(size=(1, 9, 4)),
        ids=rng.integers(-1, 3, (1, 9, 2)).astype(np.int32),
        weights=rng.normal(size=(1, 9, 2)).astype(np.float32),
        dtype="float64",
        strategy="auto",
    )
    dy = rng.normal(size=(1, 9, 5))
    found = oracle.gradients(case, dy)

    def slope(**ends: tuple[object, object]) -> float:
        high, low = ({name: pair[i] for name, pair in ends.items()} for i in (0, 1))
        difference = oracle.forward(case.but(**high)) - oracle.forward(case.but(**low))
        return float((difference * dy).sum() / 2e-6)

    step = np.zeros_like(case.x)
    step[0, 3, 2] = 1e-6
    assert slope(x=(case.x + step, case.x - step)) == pytest.approx(found.x[0, 3, 2], rel=1e-6)
    for feature, (a, b) in case.pairs.items():
        for part, value in enumerate((a, b)):
            step = np.zeros_like(value)
            step[0, 0] = 1e-6
            up, down = [a, b], [a, b]
            up[part], down[part] = value + step, value - step
            ends = tuple({**case.pairs, feature: tuple(pair)} for pair in (up, down))
            expected = found.pairs[feature][part][0, 0]
            assert slope(pairs=ends) == pytest.approx(expected, rel=1e-5, abs=1e-8)

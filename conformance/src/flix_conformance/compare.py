"""Comparisons: within rounding of the sums' own size, or bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from flix_conformance.harness import Array, Pairs
from flix_conformance.table import written

# Multiples of each dtype's rounding unit; sums here have some dozen terms at most, and backends may round on the way.
TOLERANCE = {"float64": 64 * 2.0**-53, "float32": 64 * 2.0**-24, "bfloat16": 8 * 2.0**-8}


def close(
    actual: Any, expected: Array, size: Array, dtype: str, what: str, slack: float = 1.0
) -> None:
    """Refuse values that differ from the expected ones by more than rounding.

    Args:
        actual: the backend's.
        expected: the truth, or another backend's.
        size: the absolute values of all summed terms, added up, element by element.
        dtype: that was computed in.
        what: for the message.
        slack: a factor for the tolerance.
    """
    assert actual is not None, f"{what}: nothing was returned"
    actual = np.asarray(actual, np.float64)
    assert actual.shape == np.shape(expected), (
        f"{what} has the shape {list(actual.shape)}, expected {list(np.shape(expected))}"
    )
    if actual.size == 0:
        return
    assert np.isfinite(actual).all(), f"{what} is not finite"
    bound = slack * TOLERANCE[dtype] * np.asarray(size) + 1e-30
    excess = np.abs(actual - expected) / bound
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    assert excess[worst] <= 1.0, (
        f"{what} is {actual[worst]:.9g} at {[int(i) for i in worst]}, expected {np.asarray(expected)[worst]:.9g}: "
        f"{excess[worst]:.3g} times the tolerance for {dtype}"
    )


def close_in_norm(actual: Array, expected: Array, start: Array, bound: float, what: str) -> None:
    """Refuse a trained value whose error is more than ``bound`` of the way that training took it."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, f"{what} has the shape {list(actual.shape)}"
    error = float(np.linalg.norm(actual - expected))
    way = float(np.linalg.norm(expected - start))
    floor = 1e-6 * float(np.linalg.norm(start))
    share = (
        f"{error / way:.3g} of the way {way:.3g} that training went" if way else "and should stay"
    )
    assert error <= bound * way + floor, f"{what} is off by {error:.3g}, {share}"


def same_bits(actual: Any, expected: Array, what: str) -> None:
    """Refuse values that are not the expected ones, bit by bit."""
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype, f"{what} is {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{what} has the shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    different = actual.tobytes() != expected.tobytes()
    assert not different, (
        f"{what} differs in its bits; largest difference "
        f"{np.max(np.abs(actual.astype(np.float64) - expected.astype(np.float64))):.3g}"
    )


def same_pairs(actual: Pairs, expected: Pairs, what: str) -> None:
    """Refuse pairs that are not the expected ones, bit by bit."""
    assert set(actual) == set(expected), (
        f"{what}: has the features {sorted(actual)}, expected {sorted(expected)}"
    )
    for feature, pair in expected.items():
        for part in (0, 1):
            label = f"{what}: {'AB'[part]} of {written(feature)}"
            same_bits(actual[feature][part], pair[part], label)


def bfloat16(values: Array) -> Array:
    """Values rounded to bfloat16, to nearest and ties to even, held in float32."""
    raw: Any = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    raw = (raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000
    rounded: Array = raw.astype(np.uint32).view(np.float32)
    return rounded


def representable(values: Array, dtype: str) -> Array:
    """Values that a dtype has, in the narrowest numpy floats that hold them."""
    if dtype == "float64":
        return np.asarray(values, np.float64)
    return bfloat16(values) if dtype == "bfloat16" else np.asarray(values, np.float32)

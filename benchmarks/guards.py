"""Guards: an arm's figure counts only if it computed what it claims, all of it and no more.

Two mistakes make a benchmark lie: an output that nobody reads, which a compiler then never computes, and gradients that
are not what training needs, either dead (zero, missing) or superfluous (zeros written for tables that no row uses).
An arm therefore returns its output and gradients, and they are held to a reference computed here in float64 from
the definition, row by row, without flix.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Arm, once

Array = NDArray[Any]


class GuardError(AssertionError):
    """An arm did not compute what it claims."""


@dataclass(frozen=True)
class Pair:
    """A low-rank pair as the reference takes it.

    Attributes:
        a: ``[r, d_in]``.
        b: ``[d_out, r]``.
    """

    a: Array
    b: Array


def reference(
    x: Array,
    dy: Array | None,
    weight: Array,
    bias: Array | None,
    pairs: Mapping[Hashable, Pair],
    rows: Sequence[Sequence[Hashable]],
) -> dict[str, Array]:
    """Output and gradients of one routed layer, from the definition and in float64.

    Args:
        x: ``[N, S, d_in]``.
        dy: the gradient of the output, ``[N, S, d_out]``; None for the output alone.
        weight: ``[d_out, d_in]``.
        bias: ``[d_out]`` or None.
        pairs: every feature's pair.
        rows: the features of each row.

    Returns:
        ``y``, and with ``dy`` also ``dx``, and ``dA f``, ``dB f`` for each feature f that some row uses.
    """
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    y = x @ weight.T
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    wide = {f: Pair(*(np.asarray(v, np.float64) for v in (p.a, p.b))) for f, p in pairs.items()}
    for n, names in enumerate(rows):
        for name in names:
            y[n] += x[n] @ wide[name].a.T @ wide[name].b.T
    if dy is None:
        return {"y": y}
    dy = np.asarray(dy, np.float64)
    dx, gradients = dy @ weight, dict[str, Array]()
    for n, names in enumerate(rows):
        for name in names:
            a, b = wide[name].a, wide[name].b
            h, dh = x[n] @ a.T, dy[n] @ b
            dx[n] += dh @ a
            for key, part in ((f"dA {name}", dh.T @ x[n]), (f"dB {name}", dy[n].T @ h)):
                gradients[key] = gradients.get(key, 0) + part
    return {"y": y, "dx": dx, **gradients}


def check_values(
    arm: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any] | Iterable[str],
    tolerance: float = 1e-4,
    absent: Iterable[str] = (),
) -> None:
    """Hold an arm's results to what is expected of them.

    Args:
        arm: its name, for messages.
        found: results by name.
        expected: values by name, or names alone where no reference is known.
        tolerance: the largest allowed difference, over the largest expected value.
        absent: names of gradients that must not have been computed.

    Raises:
        GuardError: a result that is missing, not finite, zero throughout or other than expected, or a gradient that
            nobody needs.
    """
    values = expected if isinstance(expected, Mapping) else dict.fromkeys(expected)
    for name, want in values.items():
        got = found.get(name)
        if got is None:
            raise GuardError(f"{arm}: {name} was not computed")
        got = np.asarray(got)
        if got.size == 0 or not np.isfinite(got).all():
            raise GuardError(f"{arm}: {name} is empty or not finite")
        if not got.any():
            raise GuardError(f"{arm}: {name} is zero throughout")
        if want is None:
            continue
        want = np.asarray(want)
        if got.shape != want.shape:
            raise GuardError(f"{arm}: {name} has shape {got.shape}, expected {want.shape}")
        error = float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-30))
        if error > tolerance:
            raise GuardError(f"{arm}: {name} differs from the reference by {error:.1e} of its size")
    for name in absent:
        if found.get(name) is not None:
            raise GuardError(f"{arm}: {name} was computed, but no row of the batch uses it")


def guard(
    arm: Arm,
    expected: Mapping[str, Any] | Iterable[str],
    tolerance: float = 1e-4,
    absent: Iterable[str] = (),
) -> None:
    """Run an arm once and check what it returned; see :func:`check_values`."""
    _, out = once(arm)
    check_values(arm.name, arm.results(out), expected, tolerance, absent)

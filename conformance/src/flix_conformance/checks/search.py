"""Weights of a new combination, found from examples (docs/specification.md §5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flix_conformance import bits, oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.checks.outputs import check_output
from flix_conformance.compare import same_pairs
from flix_conformance.harness import Array, Batch, Case
from flix_conformance.strategies import Draw

_LARGEST = 1.5
# Of what there was to gain, which least squares tell.
_SHARE = {"gradient": 0.7, "evolution": 0.4}


def _effects(case: Case) -> tuple[Array, dict[int, Array]]:
    """The base's output, and what each feature adds with weight 1, by id."""

    def given(number: int) -> Array:
        ids = np.full((len(case.x), 1), number, np.int32)
        return oracle.forward(case.but(ids=ids, weights=None))

    base = given(-1)
    return base, {number: given(number) - base for number in case.table.ids.values()}


def _loss(base: Array, effects: Mapping[int, Array], weights: Mapping[int, float], target: Array) -> float:  # fmt: skip
    y = base + sum(w * effects[number] for number, w in weights.items())
    return float(((y - target) ** 2).sum() / (2 * len(target)))


def _best(
    base: Array, effects: Mapping[int, Array], kept: Mapping[int, float], free: list[int], target: Array
) -> float:  # fmt: skip
    """The least loss that weights within the bounds have: a quadratic form, descended coordinate by coordinate."""
    weights = {**kept, **dict.fromkeys(free, 0.0)}
    for _ in range(200):
        for number in free:
            rest = base + sum(w * effects[n] for n, w in weights.items() if n != number) - target
            size = float((effects[number] ** 2).sum())
            step = -float((rest * effects[number]).sum()) / size if size else 0.0
            weights[number] = min(max(step, -_LARGEST), _LARGEST)
    return _loss(base, effects, weights, target)


@check(
    "a search finds weights that come near the best, says their loss, and changes neither other groups' weights nor the model",
    examples=4,
    needs=("search",),
)
def searched(draw: Draw, backend: Backend) -> None:
    case = draw.trainable(
        any_kind(draw, backend.kinds),
        6,
        where=lambda s: not s.per_token and len(s.table.groups) > 1,
    )
    case = case.for_any_rows()
    method = draw.of_turn(["gradient", "evolution"])
    table, rng = case.table, draw.generator()
    first = table.features[0]
    row = {first[0]: first[1]}
    groups = draw.of_turn([None, None, [g for g in table.groups if g != first[0]]])
    base, effects = _effects(case)
    hidden = {number: float(rng.uniform(-1, 1)) for number in effects}
    target = (
        base + sum(w * effects[n] for n, w in hidden.items()) + 0.1 * rng.normal(size=base.shape)
    )
    batch = Batch(case.x, dtype=case.dtype, target=target.astype(np.float32))
    model = backend.adapted(case)
    found: Any = backend.harness.search(model, batch, row, groups=groups, method=method, l1=0.0, steps=80)  # fmt: skip
    start, end = bits.active_features(table, row), bits.active_features(table, found.row)
    target = batch.target.astype(np.float64)
    for what, told, weights in (("at first", found.before, start), ("in the end", found.loss, end)):
        loss = _loss(base, effects, weights, target)
        # Weights of less than 0.01 are left out of the row.
        left = 0.01 * sum(float(np.abs(e).sum()) for e in effects.values()) / len(target)
        slack = left * np.sqrt(loss) if what == "in the end" else 0.0
        assert abs(told - loss) <= 1e-3 * loss + slack + 1e-5, (
            f"the loss {what} is said to be {told:.6g}; that of its row is {loss:.6g}"
        )
    tried = [n for f, n in table.ids.items() if groups is None or f[0] in groups]
    kept = {number: w for number, w in start.items() if number not in tried}
    for number in set(kept) | {n for n in end if n not in tried}:
        assert end.get(number, 0.0) == kept.get(number, 0.0), (
            f"{table.features[number]} is in none of the groups {groups}, and went from {kept.get(number, 0.0)} to "
            f"{end.get(number, 0.0)}"
        )
    best = _best(base, effects, kept, tried, target)
    gained, there = found.before - found.loss, found.before - best
    assert gained >= _SHARE[method] * there - 1e-6, (
        f"{method} took the loss from {found.before:.4g} to {found.loss:.4g}, of {best:.4g} that there is"
    )
    same_pairs(backend.pairs(model), case.pairs, "the pairs after the search")
    check_output(backend, case.but(model=model))

"""Training in which something happens: a step without routing, another name, a freeze, a removal; and in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import assume

from flix_conformance import oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import NotOffered, any_kind, check
from flix_conformance.checks.gradients import sizes
from flix_conformance.checks.lifecycle import NEW, removable
from flix_conformance.checks.training import SETTINGS, check_trajectory
from flix_conformance.compare import TOLERANCE, close_in_norm, same_bits, same_pairs
from flix_conformance.harness import AdamW, Batch, Case, Pairs
from flix_conformance.strategies import Draw
from flix_conformance.table import Feature, written

# Steps that move a value of 1 by less than bfloat16 tells apart.
_SMALL = AdamW(lr=1e-3)
# Of the way that training went.
_COARSE = 0.1


@check(
    "a step without routing is refused, and changes nothing; the next one trains as the formula does",
    examples=1,
    uses=("training",),
)
def trained_without_routing(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=5)
    model, run = backend.adapted(case), oracle.Run([case], SETTINGS)
    step = backend.harness.trainer(model, SETTINGS)
    for number, batch in enumerate(batches):
        before = backend.pairs(model)
        weights = np.ones(batch.ids.shape, np.float32) if number == 1 else None
        try:
            step(replace(batch, ids=None, weights=weights))
        except ValueError as error:
            assert "flix_features" in str(error) or "routing" in str(error), (
                f"the message does not say what is missing: {error}"
            )
        else:
            raise AssertionError(f"a step without routing was served, before step {number}")
        same_pairs(backend.pairs(model), before, "after a step that was refused")
        step(batch)
        check_trajectory(case, [backend.pairs(model)], run.step(batch))


@check(
    "an optimizer's state stays with a feature that is renamed, and with one that is frozen until it thaws",
    examples=1,
    uses=("training", "changes"),
)
def state_stays(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=4)
    model, run = backend.adapted(case), oracle.Run([case], SETTINGS)
    step = backend.harness.trainer(model, SETTINGS)
    active = [batch for batch in batches if oracle.listed(case, batch.ids)]
    assume(active)
    old = draw.one_of(oracle.listed(case, active[0].ids))

    def go_on(verb: str, *arguments: Any) -> None:
        if backend.verb(verb)(model, *arguments) is not model:
            raise NotOffered(f"{verb} gives another model, for which an optimizer is made anew")

    def train(frozen: tuple[Feature, ...], name: str, when: str) -> None:
        for batch in active:
            step(batch)
            [wanted] = run.step(batch, frozen)
        found = backend.pairs(model)
        new = (old[0], name)
        found = {old if f == new else f: pair for f, pair in found.items()}
        assert found.keys() == case.pairs.keys(), f"{when}, there are {sorted(found)}"
        check_trajectory(case, [found], [wanted], when=f"{when}, by the same optimizer")

    train((), old[1], "before any change")
    go_on("rename_feature", *old, NEW)
    train((), NEW, f"after renaming {old[1]} to {NEW}")
    before = backend.pairs(model)[old[0], NEW]
    go_on("freeze", {old[0]: NEW})
    train((old,), NEW, "while one is frozen")
    for part, value in enumerate(backend.pairs(model)[old[0], NEW]):
        same_bits(value, before[part], f"{'AB'[part]} of the frozen feature")
    go_on("thaw", {old[0]: NEW})
    train((), NEW, "after thawing")


@check(
    "an optimizer made before a feature was removed goes on with the state of the others, or refuses to",
    examples=1,
    uses=("training", "changes"),
)
def state_after_removal(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(
        any_kind(draw, backend.kinds), steps=3, where=lambda s: removable(s.table)
    )
    model, run = backend.adapted(case), oracle.Run([case], SETTINGS)
    step = backend.harness.trainer(model, SETTINGS)
    for batch in batches:
        step(batch)
        run.step(batch)
    gone = draw.one_of(removable(case.table))
    number = case.table.ids[gone]
    changed = backend.remove_feature(model, *gone)
    if changed is not model:
        raise NotOffered("remove_feature gives another model, for which an optimizer is made anew")
    left = case.but(pairs={f: pair for f, pair in case.pairs.items() if f != gone})
    before = backend.pairs(model)
    for batch in batches:
        ids = np.where(batch.ids == number, -1, batch.ids).astype(np.int32)
        given = replace(batch, ids=ids)
        try:
            step(given)
        except Exception:  # of whatever kind: frameworks meet arrays of another shape
            same_pairs(backend.pairs(model), before, "after a step that was refused")
            return
        [wanted] = run.step(given)
        check_trajectory(
            left, [backend.pairs(model)], [wanted], when=f"after removing {written(gone)}"
        )


def _clear(case: Case, batch: Batch) -> Pairs:
    """Which elements have a gradient that bfloat16 cannot turn around.

    Where next to nothing is left of a sum, its sign is rounding's, and AdamW takes a whole step by it.
    """
    case = case.but(x=batch.x, ids=batch.ids, weights=batch.weights)
    dy = oracle.forward(case) - batch.target
    summed = oracle.forward(oracle.magnitude(case)) + np.abs(batch.target)
    exact, size = oracle.gradients(case, dy).pairs, sizes(case, summed).pairs
    return {
        feature: tuple(  # type: ignore[misc]
            (np.abs(g) > TOLERANCE["bfloat16"] * s) | (s == 0)
            for g, s in zip(pair, size[feature], strict=True)
        )
        for feature, pair in exact.items()
    }


@check(
    "a layer in bfloat16 trains as the formula does, in steps too small for bfloat16; absent features keep their bits",
    examples=1,
    uses=("training",),
    dtype="bfloat16",
)
def trained_in_halves(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=6, dtype="bfloat16")
    with backend.within("bfloat16"):
        found = backend.train(case, batches, _SMALL)["pairs"]
    run, before = oracle.Run([case], _SMALL), case.pairs
    clear = {f: tuple(np.ones(p.shape, bool) for p in pair) for f, pair in case.pairs.items()}
    for number, (batch, after) in enumerate(zip(batches, found, strict=True)):
        now = _clear(run.layers[0], batch)
        [wanted] = run.step(batch)
        present = oracle.listed(case, batch.ids)
        for feature, pair in case.pairs.items():
            for part, start in enumerate(pair):
                what = f"{'AB'[part]} of {written(feature)} after step {number}"
                if feature in present:
                    held = clear[feature][part]
                    held &= now[feature][part]
                    value = np.asarray(wanted[feature][part], np.float64)[held]
                    close_in_norm(after[feature][part][held], value, start[held], _COARSE, what)
                else:
                    same_bits(after[feature][part], before[feature][part], f"absent: {what}")
        before = after

"""What is promised of training: initial bytes, dropout masks, AdamW steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import flix
from flix_conformance import bits, oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.compare import close_in_norm, same_bits, same_pairs
from flix_conformance.harness import AdamW, Batch, Case, Pairs
from flix_conformance.strategies import Draw
from flix_conformance.table import written

SETTINGS = AdamW()
STEPS = 20
# Of the way that training went: float32 and the place of eps differ between frameworks' AdamW, by far less.
TRAJECTORY = 2e-3


@check("initial values have the defined bytes: A uniform by position, B zero")
def initial_values(draw: Draw, backend: Backend) -> None:
    case = draw.case(kind=any_kind(draw, backend.kinds), pool=16).but(dtype="float32")
    seed = draw.one_of([0, 1, 7, 2**31, -5])
    case = case.but(config=replace(case.config, seed=seed), table=replace(case.table, seed=seed))
    same_pairs(backend.initial(case), bits.initial_pairs(case), "initial values")


def dropout_case(draw: Draw) -> tuple[flix.FlixConfig, bits.Rates, Case, dict[str, int]]:
    """A configuration with dropout, its rates, a case whose routing is dropped, and a place in a run."""
    case = draw.case()
    rates = [0.0, 0.1, 0.5, 0.9, 1.0]
    chosen = bits.Rates(
        p=draw.one_of(rates),
        per_group={g: draw.one_of(rates) for g in case.table.groups[:1]},
        keep_one=draw.one_of([False, True]),
        rescale=draw.one_of([False, True]),
    )
    weights = case.weights
    if weights is None:
        weights = np.where(case.ids < 0, 0, 1).astype(np.float32)
    if draw.one_of([False, True]):
        # A feature that is listed twice is dropped, or kept, as one.
        case = case.but(ids=np.repeat(case.ids, 2, -1))
        weights = np.repeat(weights, 2, -1)
    place = {
        "seed": draw.integer(0, 2**31),
        "step": draw.integer(0, 10**6),
        "first_row": draw.one_of([0, 3]),
    }
    config = replace(case.config, feature_dropout=flix.FeatureDropout(**vars(chosen)))
    return config, chosen, case.but(weights=weights), place


@check(
    "feature dropout gives the defined mask of a seed, step and row", examples=40, core="dropout"
)
def dropout_masks(draw: Draw, backend: Backend) -> None:
    config, rates, case, place = dropout_case(draw)
    assert case.weights is not None
    expected = bits.dropped(case.table, rates, case.ids, case.weights, **place)
    found = backend.dropout(config, case.ids.copy(), case.weights.copy(), **place)
    same_bits(found[0], expected[0], "ids after dropout")
    same_bits(found[1], expected[1], "weights after dropout")


@check(
    "an AdamW step with decay leaves features absent from its batch as they were, bit by bit",
    examples=8,
    uses=("training",),
)
def absent_stay(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=4)
    before: Pairs = case.pairs
    for step, after in enumerate(backend.train(case, batches, SETTINGS)["pairs"]):
        present = oracle.listed(case, batches[step].ids)
        for feature, pair in before.items():
            for part in (0, 1):
                label = f"{'AB'[part]} of {written(feature)}, absent from step {step},"
                if feature not in present:
                    same_bits(after[feature][part], pair[part], label)
        before = after


def check_trajectory(
    case: Case,
    found: Any,
    expected: list[Pairs],
    slack: float = 1.0,
    batches: Sequence[Batch] = (),
    when: str = "",
) -> None:
    """Hold the values after every step to the expected ones.

    Args:
        case: has the values before.
        found: the backend's, by step.
        expected: the formula's.
        slack: a factor for the tolerance.
        batches: those of the steps, for messages; they then say what each lists.
        when: what the values come after, for messages, if it is no step of that number.
    """
    assert len(found) == len(expected), f"{len(found)} steps were reported, not {len(expected)}"
    lists = [oracle.listed(case, batch.ids) for batch in batches]
    for step, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        for feature, start in case.pairs.items():
            seen = [n for n, listed in enumerate(lists[: step + 1]) if feature in listed]
            beside = ", ".join(sorted(map(written, lists[step]))) if lists else ""
            listed = f" (listed at steps {seen}; step {step} lists {beside or 'nothing'})"
            for part in (0, 1):
                close_in_norm(
                    actual[feature][part],
                    np.asarray(wanted[feature][part], np.float64),
                    start[part],
                    slack * TRAJECTORY,
                    f"{'AB'[part]} of {written(feature)} {when or f'after step {step}'}{listed if lists else ''}",
                )


@check(
    f"{STEPS} AdamW steps end where the formula's do, and pass where they pass",
    examples=6,
    uses=("training",),
)
def trajectory(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=STEPS)
    found = backend.train(case, batches, SETTINGS)["pairs"]
    check_trajectory(case, found, oracle.train(case, batches, SETTINGS), batches=batches)


@check(
    "frozen features stay as they were, bit by bit, while the others train as the formula does; thawed ones train again",
    examples=4,
    uses=("training",),
)
def frozen_stay(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=6)
    some = draw.one_of([{f} for f in sorted(case.pairs)] + [set(case.pairs)])
    model = backend.adapted(case)
    for feature in sorted(some):  # one after the other: what was frozen before stays so
        model = backend.verb("freeze")(model, [feature])
    for frozen, part in ((some, batches[:3]), (some - {min(some)}, batches[3:])):
        now = case.but(pairs=backend.pairs(model), model=model)
        if frozen != set(case.pairs):
            found = backend.train(now, part, SETTINGS)["pairs"]
            expected = oracle.train(now.but(model=None), part, SETTINGS, frozen=frozen)
            check_trajectory(now, found, expected, batches=part)
        for feature in sorted(frozen):
            for side in (0, 1):
                label = f"{'AB'[side]} of {written(feature)}, which is frozen,"
                same_bits(backend.pairs(model)[feature][side], now.pairs[feature][side], label)
        model = backend.verb("thaw")(model, [min(some)])

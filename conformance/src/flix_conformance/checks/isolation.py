"""What one feature holds reaches no row that does not use it; and what is refused rather than served."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from flix_conformance import oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.checks.conduct import SECOND, two_layers
from flix_conformance.checks.gradients import of_pairs, output_gradient, sizes
from flix_conformance.compare import close
from flix_conformance.harness import Array, Case
from flix_conformance.signatures import Signature
from flix_conformance.strategies import Draw
from flix_conformance.table import Feature, written


def _broken(draw: Draw, backend: Backend) -> tuple[Case, Case, Feature, Array, Array]:
    """A case with values that are not finite, or soon are not, in one feature; the case without it; the feature; which
    places list it, and in which of them it acts."""
    case = draw.case(kind=any_kind(draw, backend.kinds), where=lambda s: s.acts)
    # The last one stands where reading too far ends.
    last = max(case.pairs, key=case.table.ids.__getitem__)
    feature = draw.one_of([last, draw.one_of(sorted(case.pairs))])
    entries = case.ids == case.table.ids[feature]
    if entries.any(-1).all():  # someone must be left who does not use it
        alike = case.strategy == "single" or len(case.ids) == 1
        gone = (
            entries
            if alike
            else entries & (np.arange(len(entries)) == 0).reshape(-1, *[1] * (entries.ndim - 1))
        )
        case = case.but(ids=np.where(gone, -1, case.ids).astype(np.int32))
        entries = entries & ~gone
    acts = entries if case.weights is None else entries & (case.weights != 0)
    value = draw.one_of([np.nan, np.inf, -np.inf, 3e38])
    pair: Any = tuple(np.full_like(part, value) for part in case.pairs[feature])
    broken = case.but(pairs={**case.pairs, feature: pair})
    whole = case.but(pairs={f: pair for f, pair in case.pairs.items() if f != feature})
    return broken, whole, feature, entries.any(-1), acts.any(-1)


@check(
    "values of one feature that are not finite, or overflow, change no row in which it does not act",
    examples=36,
)
def isolated(draw: Draw, backend: Backend) -> None:
    broken, whole, feature, _, acts = _broken(draw, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that names the feature is welcome
        y = np.asarray(backend.forward(broken)[0], np.float64)
    size, what = oracle.forward(oracle.magnitude(whole)), f"without {written(feature)}, the output"
    close(y[~acts], oracle.forward(whole)[~acts], size[~acts], whole.dtype, what, 2.0)


@check("nor the gradients that these rows and their features get", examples=36, uses=("gradients",))
def isolated_gradients(draw: Draw, backend: Backend) -> None:
    broken, whole, feature, lists, _ = _broken(draw, backend)
    dy = output_gradient(draw, broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = backend.gradients(broken, dy)
    expected, size = oracle.gradients(whole, dy.astype(np.float64)), sizes(whole, dy)
    if whole.kind == "linear":
        what = f"without {written(feature)}, the gradient of x"
        x = np.asarray(found["x"], np.float64)[~lists]
        close(x, expected.x[~lists], size.x[~lists], whole.dtype, what, 2.0)
    beside = {whole.table.features[i] for i in np.unique(whole.ids[lists]) if i >= 0}
    for part in (0, 1):
        for other, gradient in of_pairs(found, whole, part).items():
            if other not in beside:
                what = (
                    f"beside {written(feature)}, the gradient of {'AB'[part]} of {written(other)}"
                )
                wanted, scale = expected.pairs[other][part], size.pairs[other][part]
                close(gradient, wanted, scale, whole.dtype, what, 2.0)


@check(
    'strategy "single" refuses rows that differ, by the number of the row',
    examples=4,
    strategy="single",
)
def unlike_rows(draw: Draw, backend: Backend) -> None:
    by_token = draw.turn % 2 == 1

    def wanted(s: Signature) -> bool:
        return s.filled and s.acts and len(s.table) > 1 and s.per_token == by_token

    case = draw.case(where=wanted)
    ids = case.ids.copy()
    place = (draw.integer(1, len(ids) - 1), *(draw.integer(0, n - 1) for n in ids.shape[1:]))
    ids[:] = ids[(0,) * (ids.ndim - 1)]
    ids[place] = (ids[place] + 2) % (len(case.table) + 1) - 1  # another feature, or none
    weights = np.ones(ids.shape, np.float32)
    case = case.but(ids=ids, weights=weights, strategy="single", dtype="float32")
    case = case.but(kernel=case.kernel.astype(np.float32), x=case.x.astype(np.float32))
    error = backend.refuse(case)
    assert isinstance(error, ValueError), f"rows that differ under 'single': {error!r}"
    for part in ("single", f"row {place[0]}"):
        found = re.search(rf"\b{part}\b", str(error))
        assert found, f"the message does not name {part!r}, which differs at {place[:-1]}: {error}"


@check(
    "a call without routing is refused, of a model and of a layer inside, in evaluation too, before and after one that had it",
    examples=4,
)
def without_routing(draw: Draw, backend: Backend) -> None:
    stack = two_layers(draw)
    model, bare = backend.stacked(stack), replace(stack.batch, ids=None, weights=None)
    calls: dict[str, Any] = {
        "the model": lambda batch: backend.harness.call(model, batch),
        "a layer by hand": lambda batch: backend.harness.call(model, batch, SECOND),
    }
    if not backend.lacks(["evaluated"]):
        calls["the model in evaluation"] = lambda batch: backend.harness.evaluated(model, batch)
    for what, call in calls.items():
        for when in ("", ", after one with routing"):
            try:
                call(bare)
            except ValueError as error:
                assert "flix_features" in str(error) or "routing" in str(error), (
                    f"{what}{when}: the message does not say what is missing: {error}"
                )
            else:
                raise AssertionError(f"{what} served a call without routing{when}")
            call(stack.batch)

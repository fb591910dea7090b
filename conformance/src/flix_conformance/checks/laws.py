"""Laws of composition: what must hold between outputs, whatever the values."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from flix_conformance import oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.checks.outputs import output
from flix_conformance.compare import close
from flix_conformance.harness import Array, Case
from flix_conformance.strategies import WEIGHTS, Draw

_POOL = 10


def _case(draw: Draw, backend: Backend, weighted: bool = False) -> Case:
    return draw.case(
        kind=any_kind(draw, backend.kinds),
        pool=_POOL,
        where=lambda s: s.weighted or not weighted,
    )


def _size(case: Case) -> Array:
    return oracle.forward(oracle.magnitude(case))


def _coarse(weights: Array) -> Array:
    return (np.round(weights * 1024) / 1024).astype(np.float32)


@check("outputs are linear in the weights")
def linear_in_weights(draw: Draw, backend: Backend) -> None:
    case = _case(draw, backend, weighted=True)
    assert case.weights is not None
    # Multiples of 2^-10, so that w + c v is exact in float32, which weights are in whatever the layer computes in.
    case = case.but(weights=_coarse(case.weights))
    factor = draw.one_of([2.0, -3.0, 0.5])
    shape = (case.ids.shape[-1],)  # one change for all rows: alike rows stay alike
    change = np.array(
        draw(st.lists(st.sampled_from(WEIGHTS), min_size=shape[0], max_size=shape[0])), np.float32
    )
    added = _coarse(np.where(case.ids < 0, 0, change))
    base = output(backend, case.but(weights=np.zeros_like(case.weights)))
    first = output(backend, case)
    second = output(backend, case.but(weights=added))
    both = output(backend, case.but(weights=case.weights + factor * added))
    size = _size(case) + 4 * _size(case.but(weights=added))
    expected = first + factor * (second - base)
    close(both, expected, size, case.dtype, "the output under w + c v", slack=2.0)


@check("the order of the features in a row changes nothing")
def permuted_features(draw: Draw, backend: Backend) -> None:
    case = _case(draw, backend)
    order = draw(st.permutations(range(case.ids.shape[-1])))
    weights = None if case.weights is None else case.weights[..., order]
    other = output(backend, case.but(ids=case.ids[..., order], weights=weights))
    close(other, output(backend, case), _size(case), case.dtype, "the output", slack=2.0)


@check("permuting the rows of a batch permutes the outputs")
def permuted_rows(draw: Draw, backend: Backend) -> None:
    case = _case(draw, backend)
    order = np.array(draw(st.permutations(range(len(case.x)))), int)
    other = output(backend, _rows(case, order))
    expected, size = output(backend, case)[order], _size(case)[order]
    close(other, expected, size, case.dtype, "the output", slack=2.0)


def _rows(case: Case, chosen: Array) -> Case:
    weights = None if case.weights is None else case.weights[chosen]
    return case.but(x=case.x[chosen], ids=case.ids[chosen], weights=weights)


@check("a weight of 0 is the same as not being listed; what is not listed does not matter")
def inactive_is_absent(draw: Draw, backend: Backend) -> None:
    case = _case(draw, backend, weighted=True)
    assert case.weights is not None
    entry = draw.integer(0, case.ids.shape[-1] - 1)
    weights, ids = case.weights.copy(), case.ids.copy()
    weights[..., entry] = 0.0
    ids[..., entry] = -1
    silenced = case.but(weights=weights)
    # Features without any say get other values.
    acting = {case.table.features[i] for i in np.unique(ids[weights != 0]) if i >= 0}
    pairs = {f: p if f in acting else (p[0] + 3, p[1] - 2) for f, p in case.pairs.items()}
    absent = case.but(ids=ids, weights=weights, pairs=pairs)
    size = _size(silenced)
    close(output(backend, absent), output(backend, silenced), size, case.dtype, "the output", 2.0)


@check("the outputs of a split batch are those of the whole one")
def split_batch(draw: Draw, backend: Backend) -> None:
    case = _case(draw, backend)
    cut = len(case.x) // 2
    parts = [_rows(case, np.arange(len(case.x))[part]) for part in (slice(cut), slice(cut, None))]
    joined = np.concatenate([output(backend, part) for part in parts])
    close(joined, output(backend, case), _size(case), case.dtype, "the output", slack=2.0)


@check("entries of -1 do nothing, wherever they stand and whatever their weight")
def padding(draw: Draw, backend: Backend) -> None:
    case = _case(draw, backend)
    wider = (*case.ids.shape[:-1], case.ids.shape[-1] + 2)
    at = draw.one_of([0, case.ids.shape[-1]])
    places = [i for i in range(wider[-1]) if not at <= i < at + 2]
    ids, weights = np.full(wider, -1, np.int32), np.full(wider, 1.5, np.float32)
    ids[..., places] = case.ids
    if case.weights is not None:
        weights[..., places] = case.weights
    other = case.but(ids=ids, weights=None if case.weights is None else weights)
    close(output(backend, other), output(backend, case), _size(case), case.dtype, "the output", 2.0)


@check("a feature listed twice acts with the sum of its weights")
def listed_twice(draw: Draw, backend: Backend) -> None:
    case = _case(draw, backend, weighted=True)
    assert case.weights is not None
    entry = draw.integer(0, case.ids.shape[-1] - 1)
    share = np.float32(draw.one_of([0.5, -1.0, 2.0]))
    ids = np.concatenate([case.ids, case.ids[..., entry : entry + 1]], -1)
    weights = np.concatenate([case.weights, share * case.weights[..., entry : entry + 1]], -1)
    weights[..., entry] -= weights[..., -1]
    other = case.but(ids=ids, weights=weights)
    size = _size(other)
    close(output(backend, other), output(backend, case), size, case.dtype, "the output", 2.0)

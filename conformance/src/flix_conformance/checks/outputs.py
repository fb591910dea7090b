"""Outputs against the oracle, and what is promised about them."""

from __future__ import annotations

import warnings

import numpy as np

from flix_conformance import bits, oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.compare import close, same_bits
from flix_conformance.harness import Array, Case
from flix_conformance.strategies import Draw
from flix_conformance.table import written


def output(backend: Backend, case: Case) -> Array:
    """The backend's output in float64."""
    return np.asarray(backend.forward(case)[0], np.float64)


def check_output(backend: Backend, case: Case) -> None:
    """Hold one output to the oracle's."""
    size = oracle.forward(oracle.magnitude(case))
    close(backend.forward(case)[0], oracle.forward(case), size, case.dtype, "the output")


@check("outputs are those of the formula, in every shape, dtype and strategy", examples=96)
def forward(draw: Draw, backend: Backend) -> None:
    check_output(backend, draw.case())


@check("an embedding's outputs are those of the formula", examples=36, kind="embedding")
def embedding_forward(draw: Draw, backend: Backend) -> None:
    check_output(backend, draw.case(kind="embedding", pool=24))


@check("ids act by their value, whatever integers they come in", examples=6)
def id_dtypes(draw: Draw, backend: Backend) -> None:
    case = draw.case(kind=any_kind(draw, backend.kinds), pool=12)
    dtype = draw.one_of(backend.id_dtypes)
    ids = case.ids if np.dtype(dtype).kind == "i" else np.where(case.ids < 0, 0, case.ids)
    check_output(backend, case.but(ids=ids.astype(dtype)))


@check(
    "in evaluation mode outputs are those of the formula; training mode comes back as it was",
    examples=6,
    needs=("evaluated",),
)
def evaluation(draw: Draw, backend: Backend) -> None:
    case = draw.case(kind=any_kind(draw, backend.kinds), pool=12)
    size, expected = oracle.forward(oracle.magnitude(case)), oracle.forward(case)
    with backend.within(case.dtype):
        case = case.but(model=backend.adapted(case))
    for mode in ("evaluated", "forward", "evaluated"):
        y, dtype = getattr(backend, mode)(case)
        assert dtype == case.dtype, f"{mode}: the output of a {case.dtype} layer is {dtype}"
        close(y, expected, size, case.dtype, f"the output, {mode},")


@check("the output has the dtype of the layer")
def output_dtype(draw: Draw, backend: Backend) -> None:
    case = draw.case(kind=any_kind(draw, backend.kinds))
    _, dtype = backend.forward(case)
    assert dtype == case.dtype, f"the output of a {case.dtype} layer is {dtype}"


@check("a call does not depend on the calls before it", examples=8)
def repeatable(draw: Draw, backend: Backend) -> None:
    case = draw.case(pool=12)
    first, size = output(backend, case), oracle.forward(oracle.magnitude(case))
    # The same layer and batch under another routing, in between. What is compiled anew may round otherwise.
    backend.forward(case.but(ids=np.full_like(case.ids, -1), weights=_zeros(case)))
    close(
        output(backend, case), first, size, case.dtype, "the output of the same call, made again,"
    )


def _zeros(case: Case) -> Array | None:
    return None if case.weights is None else np.zeros_like(case.weights)


@check(
    "forward and backward leave the arrays that they are given as they were", uses=("gradients",)
)
def inputs_unchanged(draw: Draw, backend: Backend) -> None:
    case = draw.case(kind=any_kind(draw, backend.kinds), pool=12)
    given = {
        "x": case.x,
        "ids": case.ids,
        "weights": case.weights,
        "kernel": case.kernel,
        "bias": case.bias,
        **{f"A of {written(f)}": a for f, (a, _) in case.pairs.items()},
        **{f"B of {written(f)}": b for f, (_, b) in case.pairs.items()},
    }
    before = {name: array.copy() for name, array in given.items() if array is not None}
    y, _ = backend.forward(case)
    backend.gradients(case, np.ones(np.shape(y)))
    for name, array in before.items():
        same_bits(given[name], array, f"{name}, which the backend was given,")


@check(
    "merging one composition gives the formula's kernel, and the output that routing gives",
    uses=("merge",),
)
def merge(draw: Draw, backend: Backend) -> None:
    case = draw.case(kind=any_kind(draw, backend.kinds), pool=12)
    row = draw.rows(case.table, 1, full=True)[0]
    active = {case.table.features[i]: w for i, w in bits.active_features(case.table, row).items()}
    kernel = np.asarray(backend.merge(case, row), np.float64)
    size = oracle.merged(oracle.magnitude(case), {f: abs(w) for f, w in active.items()})
    close(kernel, oracle.merged(case, active), size, case.dtype, "the merged kernel")
    ids, weights = backend.encode(case.config, [row] * len(case.x))
    routed = case.but(ids=ids, weights=weights)
    x = oracle.dense_x(case)
    expected = x @ kernel + (0.0 if case.bias is None else case.bias)
    close(
        output(backend, routed),
        expected,
        np.abs(x) @ size + (0.0 if case.bias is None else np.abs(case.bias)),
        case.dtype,
        "the output, beside the merged kernel's,",
        slack=2.0,
    )


@check(
    "a merged model refuses routing; adapted anew, its features act beside what was merged",
    examples=4,
    uses=("merge",),
)
def merged_anew(draw: Draw, backend: Backend) -> None:
    case = draw.case(kind=any_kind(draw, backend.kinds), where=lambda s: s.acts, pool=12)
    row = draw.rows(case.table, 1, full=True)[0]
    with backend.within(case.dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what else reads a kernel is the user's
        merged = backend.verb("merge")(backend.adapted(case), row)
        kernel = np.asarray(backend.harness.kernel(merged, case.path), np.float64)
        # A TypeError will do: where calls are of the user's own classes, a plain model knows of no routing.
        assert backend.refuse(case.but(model=merged)), "a merged model took routing"
        again = backend.verb("adapt")(merged, case.config, strategy=case.strategy)
        again = backend.primitives.write(again, {case.path: case.pairs})
        check_output(backend, case.but(model=again, kernel=kernel))

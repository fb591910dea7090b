"""Gradients against the oracle's, which were derived by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from flix_conformance import oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.compare import close, representable, same_bits
from flix_conformance.harness import Array, Case
from flix_conformance.strategies import Draw
from flix_conformance.table import written


def output_gradient(draw: Draw, case: Case) -> Array:
    """A drawn dy in the shape of the output."""
    lead = case.x.shape if case.kind == "embedding" else case.x.shape[:-1]
    return representable(draw.generator().normal(size=(*lead, case.d_out)), case.dtype)


def sizes(case: Case, dy: Array) -> oracle.Gradients:
    """The sizes of the sums that gradients are."""
    return oracle.gradients(oracle.magnitude(case), np.abs(dy).astype(np.float64))


def of_pairs(found: Any, case: Case, part: int) -> dict[Any, Array]:
    """A's or B's gradients of every feature with an update; those left out are zero."""
    gradients = {}
    for feature, pair in case.pairs.items():
        own = found["pairs"].get(feature)
        value = None if own is None else own[part]
        gradients[feature] = np.zeros(pair[part].shape) if value is None else np.asarray(value)
    return gradients


def check_pairs(backend: Backend, case: Case, dy: Array, part: int) -> None:
    """Hold the gradients of all A (part 0) or all B (part 1) to the oracle's."""
    found = of_pairs(backend.gradients(case, dy), case, part)
    expected, size = oracle.gradients(case, dy.astype(np.float64)), sizes(case, dy)
    for feature, gradient in found.items():
        close(
            gradient,
            expected.pairs[feature][part],
            size.pairs[feature][part],
            case.dtype,
            f"the gradient of {'AB'[part]} of {written(feature)}",
            slack=2.0,
        )


@check("the gradient that x gets is the formula's", examples=36, uses=("gradients",))
def gradient_x(draw: Draw, backend: Backend) -> None:
    case = draw.case()
    dy = output_gradient(draw, case)
    expected, size = oracle.gradients(case, dy.astype(np.float64)).x, sizes(case, dy).x
    found = backend.gradients(case, dy)["x"]
    close(found, expected, size, case.dtype, "the gradient of x", slack=2.0)


@check(
    "the gradients that the features' A get are the formula's, zero for absent features",
    examples=36,
    uses=("gradients",),
)
def gradient_a(draw: Draw, backend: Backend) -> None:
    case = draw.case()
    check_pairs(backend, case, output_gradient(draw, case), 0)


@check(
    "the gradients that the features' B get are the formula's, zero for absent features",
    examples=36,
    uses=("gradients",),
)
def gradient_b(draw: Draw, backend: Backend) -> None:
    case = draw.case()
    check_pairs(backend, case, output_gradient(draw, case), 1)


@check(
    "the gradient that the weights get is the formula's, for weights of 0 too",
    examples=36,
    uses=("gradients",),
)
def gradient_weights(draw: Draw, backend: Backend) -> None:
    case = draw.case(where=lambda s: s.weighted and s.acts, every_way=True)
    check_weights(backend, case, output_gradient(draw, case))


def check_weights(backend: Backend, case: Case, dy: Array) -> None:
    """Hold the weights' gradient to the oracle's."""
    expected = oracle.gradients(case, dy.astype(np.float64)).weights
    found = backend.gradients(case, dy)["weights"]
    used = case.ids >= 0  # a padding's weight is nobody's
    assert found is not None, "the weights got no gradient"
    assert np.shape(found) == case.ids.shape, f"the weights' gradient is {np.shape(found)}"
    size = sizes(case, dy).weights[used]
    dtype = "float32" if case.dtype == "float64" else case.dtype  # weights are float32
    close(np.asarray(found)[used], expected[used], size, dtype, "the weights' gradient", 2.0)


@check(
    "an embedding's gradients are the formula's, its weights' too",
    examples=24,
    kind="embedding",
    uses=("gradients",),
)
def embedding_gradients(draw: Draw, backend: Backend) -> None:
    case = draw.case(kind="embedding", pool=16)
    dy = output_gradient(draw, case)
    check_pairs(backend, case, dy, 0)
    check_pairs(backend, case, dy, 1)
    if case.weights is not None:
        check_weights(backend, case, dy)


@check(
    "the base gets no gradient, and training leaves its bytes as they were",
    examples=6,
    uses=("gradients", "training"),
)
def base_frozen(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=2)
    lead = batches[0].target.shape
    gradient = backend.gradients(case, np.ones(lead, np.float32))["base"]
    assert gradient is None or not np.any(gradient), (
        f"the base's kernel gets a gradient, up to {np.max(np.abs(gradient)):.3g}"
    )
    from flix_conformance.checks.training import SETTINGS

    after = np.asarray(backend.train(case, batches, SETTINGS)["base"])
    same_bits(after.astype(case.kernel.dtype), case.kernel, "the base's kernel after training")

"""Sizes at which what is counted in few bits, or made whole, goes wrong: many features, many inputs, many examples."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from flix_conformance import bits, oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import check
from flix_conformance.checks.gradients import check_weights, of_pairs, output_gradient
from flix_conformance.checks.gradients import sizes as sizes_of
from flix_conformance.checks.lifecycle import NEW, check_state, routed_to
from flix_conformance.checks.outputs import check_output
from flix_conformance.checks.training import SETTINGS, check_trajectory
from flix_conformance.compare import close, same_bits, same_pairs
from flix_conformance.harness import Array, Batch, Case
from flix_conformance.signatures import crowded, wide
from flix_conformance.strategies import Draw
from flix_conformance.table import written

# (features, rows, entries of a row): a few of them, and nearly all in one batch.
_CROWDS = ((530, 3, 4), (530, 8, 80))
_MORE = ((130, 3, 3), (130, 4, 40), (1200, 3, 4))
# More than 16 bits count.
_WIDE = 2**16 + 40


def check_all(backend: Backend, case: Case, dy: Array) -> None:
    """Hold the output and all gradients to the oracle's."""
    check_output(backend, case)
    found = backend.gradients(case, dy)
    expected, size = oracle.gradients(case, dy.astype(np.float64)), sizes_of(case, dy)
    for part in (0, 1):
        for feature, gradient in of_pairs(found, case, part).items():
            what = f"the gradient of {'AB'[part]} of {written(feature)}"
            wanted, scale = expected.pairs[feature][part], size.pairs[feature][part]
            close(gradient, wanted, scale, case.dtype, what, 2.0)
    if case.kind == "linear":
        close(found["x"], expected.x, size.x, case.dtype, "the gradient of x", 2.0)


def _crowd(draw: Draw, features: int, rows: int, entries: int, strategy: str) -> Case:
    """Rows of different features, the last ones and those at powers of two among them."""
    case = draw.fill(crowded(features, rows, entries), (strategy, "float32"))
    edges = [n for n in (features - 1, 512, 511, 256, 255, 128, 127, 0) if n < features]
    others = draw.generator().permutation([n for n in range(features) if n not in edges])
    ids = np.resize(np.array([*edges, *others], np.int32), (rows, entries))
    if strategy == "single":
        ids[:] = ids[draw.integer(0, rows - 1)]
    weights = np.resize(np.array([1.0, -0.5, 2.0], np.float32), ids.shape)
    if strategy == "single":
        weights[:] = weights[:1]
    return case.but(ids=ids, weights=weights)


@check(
    "each of over 128 or 512 features acts and learns as itself, alone and with all others in one batch",
    examples=3,
    uses=("gradients",),
)
def many_features(draw: Draw, backend: Backend) -> None:
    sizes = _CROWDS if draw.profile.fixed else _CROWDS + _MORE
    crowds = [(*crowd, way[0]) for way in draw.ways("float32") for crowd in sizes]
    case = _crowd(draw, *draw.of_turn(crowds))
    dy = output_gradient(draw, case)
    check_all(backend, case, dy)
    check_weights(backend, case, dy)


@check(
    "a model of over 128 or 512 features trains, is written and read, loses a feature and gets another",
    examples=1,
    uses=("training", "files", "changes"),
)
def many_changes(draw: Draw, backend: Backend) -> None:
    case = _crowd(draw, *_CROWDS[0], "auto")
    model, rng = backend.adapted(case), draw.generator()
    target = rng.normal(size=(*case.x.shape[:-1], case.d_out)).astype(np.float32)
    batch = Batch(case.x, case.ids, case.weights, "float32", target)
    step, run = backend.harness.trainer(model, SETTINGS), oracle.Run([case], SETTINGS)
    for _ in range(2):
        step(batch)
        expected = run.step(batch)
    pairs = backend.pairs(model)
    check_trajectory(case, [pairs], expected)
    for feature in set(case.pairs) - {*oracle.listed(case, case.ids)}:
        for part in (0, 1):
            same_bits(pairs[feature][part], case.pairs[feature][part], f"absent {written(feature)}")
    with tempfile.TemporaryDirectory() as name:
        backend.verb("save")(model, Path(name) / "adapter")
        same_pairs(backend.load(case, Path(name) / "adapter"), pairs, "after loading")
    gone, new = case.table.features[128], ("task", NEW)
    model = backend.remove_feature(model, *gone)
    model = backend.add_feature(model, *new, 1, ())
    table = case.table.removed(gone).added(new)
    left = {f: pair for f, pair in pairs.items() if f != gone}
    fresh = check_state(backend, model, table.ids, left, "after removing and adding")
    a, b = fresh[new]
    taught = {new: (a, b + np.float32(1.5))}
    model = backend.primitives.write(model, {case.path: taught})
    ids = np.where(case.ids == 128, -1, case.ids).astype(np.int32)
    grown = case.but(table=table, pairs={**left, **taught}, model=model, ids=ids)
    check_output(backend, routed_to(draw, grown, len(case.table)))


@check(
    "layers of over 65,536 inputs, and embeddings of so many rows, start, act, learn and merge as small ones",
    examples=2,
    uses=("gradients",),
)
def wide_layers(draw: Draw, backend: Backend) -> None:
    ways = [way for way in draw.ways("float32") if way[0] != "single"]
    kind, way = draw.of_turn([(kind, way) for way in ways for kind in draw.shared("kinds")])
    case = draw.fill(wide(kind, _WIDE), way)
    if kind == "embedding":
        edges = np.array([_WIDE - 1, 2**16, 2**16 - 1, 2**15, 39, 0], np.int32)
        case = case.but(x=np.stack([edges, edges[::-1]]))
    first, second, third = range(3)
    case = case.but(ids=np.array([[third, first], [second, third]], np.int32))
    check_all(backend, case, output_gradient(draw, case))
    if draw.turn == 0:
        same_pairs(backend.initial(case), bits.initial_pairs(case), "initial values")
    if "merge" not in backend.absent:
        row = {"language": "hau", "task": {"ner": 0.5}}
        active = {("language", "hau"): 1.0, ("task", "ner"): 0.5}
        kernel = backend.merge(case, row)
        size = oracle.merged(oracle.magnitude(case), active)
        close(kernel, oracle.merged(case, active), size, "float32", "the merged kernel")


@check(
    "a call and its gradients make no array of a kernel's size for each example",
    examples=4,
    needs=("largest",),
)
def no_kernel_each(draw: Draw, backend: Backend) -> None:
    way = draw.of_turn(draw.ways("float32"))
    case = draw.fill(replace(crowded(130, 16, 2), d_in=256, d_out=256), way)
    kernel = 4 * case.d_in * case.d_out
    found = backend.harness.largest(backend.adapted(case), case.batch, output_gradient(draw, case))
    assert found <= 8 * kernel, (
        f"{found:,} bytes, {found / kernel:.1f} times the kernel's, for a batch of {len(case.x)}"
    )

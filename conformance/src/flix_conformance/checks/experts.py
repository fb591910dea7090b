"""Kernels with an axis of experts: every position under its own row's features, whichever experts it is sent to."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flix_conformance import bits, mixture
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import check
from flix_conformance.checks.training import SETTINGS, check_trajectory
from flix_conformance.compare import close, representable, same_bits, same_pairs
from flix_conformance.harness import Array, Batch, Experts, Pairs
from flix_conformance.mixture import Mixture
from flix_conformance.signatures import crowded
from flix_conformance.strategies import Draw
from flix_conformance.table import written

_EXPERTS, _EACH, _SIZE, _INNER = 5, 2, 6, 4
# Two products and a gate, each rounded.
_SLACK = 8.0


def _drawn(
    draw: Draw,
    backend: Backend,
    way: tuple[str, str],
    sizes: tuple[int, int, int] = (_SIZE, _INNER, 3),
    **static: Any,
) -> tuple[Mixture, Any]:
    """A mixture with values, and its adapted model. One expert gets nothing.

    Args:
        draw, backend: what it is drawn from, and by whom it is made.
        way: the strategy and the dtype.
        sizes: d, h, and the positions of a row.
        static: more of the signature's.
    """
    size, inner, length = sizes
    chosen = replace(crowded(24, 4, 3), d_in=size, lead=(length,), bias=False, **static)
    case = draw.fill(chosen, way)
    rng, dtype = draw.generator(), case.dtype

    def values(*shape: int) -> Array:
        return representable(rng.normal(size=shape), dtype)

    busy = rng.permutation(_EXPERTS)[1:]
    sent = np.stack([rng.permutation(busy)[:_EACH] for _ in range(7)])
    share = representable(rng.uniform(0.2, 0.8, sent.shape), "bfloat16")
    kernels = values(_EXPERTS, size, 2 * inner), values(_EXPERTS, inner, size)
    plain = Experts("moe", *kernels, sent, share, dtype)
    with backend.within(dtype):
        model, *paths = backend.harness.experts(plain, case.x)
        config = replace(case.config, target_modules=tuple(paths))
        model = backend.verb("adapt")(model, config, strategy=case.strategy)
        holds = "float64" if dtype == "float64" else "float32"
        sides = []
        for path, kernel in zip(paths, kernels, strict=True):
            pairs = {
                feature: (
                    representable(rng.normal(size=(_EXPERTS, rank, kernel.shape[1])), holds),
                    representable(rng.normal(size=(_EXPERTS, kernel.shape[2], rank)), holds),
                )
                for feature, rank in zip(case.table.features, chosen.ranks, strict=True)
                if rank
            }
            sides.append(case.but(path=path, kernel=kernel, pairs=pairs, config=config))
        return Mixture(plain, *sides), model


def _written(backend: Backend, model: Any, drawn: Mixture) -> Any:
    sides = (drawn.up, drawn.down)
    with backend.within(drawn.experts.dtype):
        return backend.primitives.write(model, {case.path: case.pairs for case in sides})


def _read(backend: Backend, model: Any, drawn: Mixture) -> tuple[Pairs, Pairs]:
    found = backend.primitives.read(model)
    up, down = (
        {f: (np.array(a), np.array(b)) for f, (a, b) in found[case.path].items()}
        for case in (drawn.up, drawn.down)
    )
    return up, down


def _check_output(
    backend: Backend, model: Any, drawn: Mixture, what: str, call: Any = None
) -> None:
    expected, size = mixture.forward(drawn)
    dtype = drawn.experts.dtype
    with backend.within(dtype):
        y, found = (call or backend.harness.call)(model, drawn.up.batch)
    assert found == dtype, f"{what} of experts in {dtype} is {found}"
    close(y, expected, size, dtype, what, _SLACK)


def _way(draw: Draw, *dtypes: str) -> tuple[str, str]:
    way: tuple[str, str] = draw.of_turn(draw.ways(*dtypes))
    return way


@check(
    "each of a mixture's experts starts as a layer by itself, and adds each position's own row's features to what it gives",
    examples=8,
    needs=("experts",),
)
def experts(draw: Draw, backend: Backend) -> None:
    static = {"per_token": draw.one_of([False, True]), "weighted": draw.one_of([True, False])}
    drawn, model = _drawn(draw, backend, _way(draw), **static)
    for case, pairs in zip((drawn.up, drawn.down), _read(backend, model, drawn), strict=True):
        if drawn.experts.dtype == "float32":
            each = [bits.initial_pairs(mixture.expert(case, e)) for e in range(_EXPERTS)]
            wanted = {
                feature: (
                    np.stack([own[feature][0] for own in each]),
                    np.stack([own[feature][1] for own in each]),
                )
                for feature in case.pairs
            }
            same_pairs(pairs, wanted, f"initial values of {case.path}")
    model = _written(backend, model, drawn)
    _check_output(backend, model, drawn, "the output of experts")
    nobody = np.full_like(drawn.up.ids, -1)
    idle = drawn.routed(replace(drawn.up.batch, ids=nobody))
    _check_output(backend, model, idle, "the output of experts without a feature")
    short = replace(drawn.up.batch, x=drawn.up.x[:, :1])
    if drawn.up.ids.ndim == 2:
        _check_output(backend, model, drawn.routed(short), "the output of experts at one position")
    if hasattr(backend.harness, "evaluated"):
        call = backend.harness.evaluated
        _check_output(backend, model, drawn, "the output of experts in evaluation mode", call)
    if hasattr(backend.harness, "compiled_forward") and draw.turn == 1:  # it takes a while
        with backend.within(drawn.experts.dtype):
            run = backend.harness.compiled_forward(model)
        for batch in (drawn.up.batch, idle.up.batch):
            given = drawn.routed(batch)
            _check_output(
                backend, model, given, "the output of compiled experts", lambda _, b: run(b)
            )


@check(
    "the gradients of a mixture's x, weights and pairs are the formula's, zero for absent features and experts that get nothing",
    examples=8,
    needs=("experts",),
    uses=("gradients",),
)
def experts_gradients(draw: Draw, backend: Backend) -> None:
    # One is so large that programs may go through it piece by piece.
    large = draw.turn == 2
    sizes = (64, 128, 600) if large else (_SIZE, _INNER, 3)
    static = {"per_token": not large and draw.one_of([False, True])}
    exact = [d for d in draw.shared("dtypes") if d != "bfloat16"]
    drawn, model = _drawn(draw, backend, _way(draw, *exact), sizes, **static)
    model, dtype = _written(backend, model, drawn), drawn.experts.dtype
    dy = representable(draw.generator().normal(size=drawn.up.x.shape), dtype)
    expected, size = mixture.gradients(drawn, dy.astype(np.float64))
    with backend.within(dtype):
        found = backend.harness.gradients(model, drawn.up.batch, dy)
    close(found["x"], expected.x, size.x, dtype, "the gradient of x", _SLACK)
    used = drawn.up.ids >= 0
    weights = np.asarray(found["weights"])[used]
    # Weights are float32.
    close(
        weights,
        expected.weights[used],
        size.weights[used],
        "float32",
        "the weights' gradient",
        _SLACK,
    )
    sides = ((drawn.up, expected.up, size.up), (drawn.down, expected.down, size.down))
    for case, wanted, scale in sides:
        own = found["pairs"].get(case.path, {})
        for feature, pair in case.pairs.items():
            for part in (0, 1):
                value = own[feature][part] if feature in own else None
                value = np.zeros(pair[part].shape) if value is None else value
                what = f"the gradient of {'AB'[part]} of {written(feature)} in {case.path}"
                close(value, wanted[feature][part], scale[feature][part], dtype, what, _SLACK)


@check(
    "experts train as the formula does, leave absent features' bits, are written and read, and merge each by itself",
    examples=3,
    needs=("experts",),
    uses=("training", "files", "merge"),
)
def experts_live(draw: Draw, backend: Backend) -> None:
    drawn, model = _drawn(draw, backend, _way(draw, "float32"))
    model = _written(backend, model, drawn)
    step, run = backend.harness.trainer(model, SETTINGS), mixture.Run(drawn, SETTINGS)
    rng = draw.generator()
    target = rng.normal(size=drawn.up.x.shape).astype(np.float32)
    # Sums that cancel would leave the optimizer noise to follow.
    ids = rng.permuted(np.tile(np.arange(6, dtype=np.int32), (4, 1)), axis=1)[:, :3]
    weights = rng.choice([1.0, 0.5, 2.0], ids.shape).astype(np.float32)
    if drawn.up.strategy == "single":
        ids[:], weights[:] = ids[:1], weights[:1]
    batch = Batch(drawn.up.x, ids, weights, "float32", target)
    for _ in range(4):
        step(batch)
        expected = run.step(batch)
    found = _read(backend, model, drawn)
    listed = [drawn.up.table.features[i] for i in np.unique(ids)]
    for case, pairs, wanted in zip((drawn.up, drawn.down), found, expected, strict=True):
        check_trajectory(case, [pairs], [wanted], 5.0, when=f"in {case.path}")
        for feature in set(case.pairs) - set(listed):
            for part in (0, 1):
                what = f"{'AB'[part]} of {written(feature)} in {case.path}, absent,"
                same_bits(pairs[feature][part], case.pairs[feature][part], what)
    drawn = drawn.holding(*found).routed(batch)
    with tempfile.TemporaryDirectory() as name:
        backend.verb("save")(model, Path(name) / "adapter")
        plain, *_ = backend.harness.experts(drawn.experts, drawn.up.x)
        loaded = backend.verb("load")(plain, Path(name) / "adapter")
    for case, pairs, wanted in zip((drawn.up, drawn.down), _read(backend, loaded, drawn), found, strict=True):  # fmt: skip
        same_pairs(pairs, wanted, f"{case.path}, after loading")
    _check_output(backend, loaded, drawn, "the output of experts after loading")
    row = {"language": "l1", "task": {"t3": 0.5, "t4": -2.0}}
    active = {("language", "l1"): 1.0, ("task", "t3"): 0.5, ("task", "t4"): -2.0}
    folded = backend.verb("merge")(model, row)
    for case in (drawn.up, drawn.down):
        kernel, size = mixture.merged(case, active)
        what = f"{case.path}'s merged kernel"
        close(backend.harness.kernel(folded, case.path), kernel, size, "float32", what)
    plain, *_ = backend.harness.experts(drawn.experts, drawn.up.x)
    for case in (drawn.up, drawn.down):
        held = np.asarray(backend.harness.kernel(plain, case.path))
        same_bits(held.astype(np.float32), case.kernel, f"{case.path}, in a plain model,")

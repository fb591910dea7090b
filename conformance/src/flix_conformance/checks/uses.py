"""One model over many calls: trained, evaluated, compiled, asked position by position."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import numpy as np

from flix_conformance import oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.checks.gradients import check_pairs, output_gradient
from flix_conformance.checks.outputs import check_output
from flix_conformance.checks.training import SETTINGS, check_trajectory
from flix_conformance.compare import close, same_bits
from flix_conformance.harness import Array, Batch, Case
from flix_conformance.strategies import Draw
from flix_conformance.table import Table


def _check_answer(case: Case, y: Any, what: str) -> None:
    size = oracle.forward(oracle.magnitude(case))
    close(y, oracle.forward(case), size, case.dtype, what, slack=2.0)


@check(
    "one model answers many calls, between optimizer steps, in place of ids that changed, in training and evaluation",
    examples=4,
    uses=("training",),
)
def many_calls(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=3)
    model = backend.adapted(case)
    step = backend.harness.trainer(model, SETTINGS)
    ids = np.empty_like(case.ids)
    weights = None if case.weights is None else np.empty_like(case.weights)
    modes = ["forward", *(() if backend.lacks(["evaluated"]) else ["evaluated"])]
    for number, batch in enumerate(batches):
        for other in (batch, batches[number - 1]):
            ids[...] = other.ids  # the same arrays, with other values
            if weights is not None:
                weights[...] = other.weights
            now = case.but(ids=ids, weights=weights, pairs=backend.pairs(model), model=model)
            for mode in modes:
                y, _ = getattr(backend, mode)(now)
                _check_answer(now, y, f"the output ({mode}) before step {number}")
        step(batch)
    check_output(backend, case.but(pairs=backend.pairs(model), model=model))


@check(
    "a sequence gives the same outputs at once and one position at a time; ids of more positions than there are are refused",
    examples=6,
)
def one_by_one(draw: Draw, backend: Backend) -> None:
    case = draw.case(
        kind=any_kind(draw, backend.kinds),
        where=lambda s: s.acts and len(s.lead) == 1 and s.lead[0] in (3, 9),
    )
    with backend.within(case.dtype):
        case = case.but(model=backend.adapted(case))
    check_output(backend, case)
    held = {"ids": case.ids[:, :1].copy() if case.ids.ndim == 3 else case.ids.copy()}
    if case.weights is not None:
        held["weights"] = case.weights[:, :1].copy() if case.ids.ndim == 3 else case.weights.copy()
    for t in range(min(case.x.shape[1], 4)):
        if case.ids.ndim == 3:
            for name, array in held.items():
                array[...] = getattr(case, name)[:, t : t + 1]
        elif t == 2:
            for array in held.values():  # another request in the same arrays
                array[...] = array[::-1].copy()
        check_output(backend, case.but(x=case.x[:, t : t + 1], **held))
    if case.ids.ndim == 3:
        error = backend.refuse(case.but(x=case.x[:, :1]))
        assert isinstance(error, ValueError), f"one position under ids of more: {error!r}"
        if not backend.lacks(["evaluated"]):
            _check_last(backend, case.but(x=case.x[:, -1:]))


def _check_last(backend: Backend, case: Case) -> None:
    """Generation may ask for the last position under all ids given: their last act, or they are refused."""
    try:
        y, _ = backend.evaluated(case)
    except ValueError:
        return
    last = None if case.weights is None else case.weights[:, -1:]
    _check_answer(case.but(ids=case.ids[:, -1:], weights=last), y, "the last position's output")


@check(
    "threads that call one model at once, each with routing of its own, get the answers to their own calls",
    examples=3,
)
def threads(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run("linear", steps=4)
    with backend.within(case.dtype):
        model = backend.adapted(case)
        start = Barrier(len(batches))

        def called(batch: Batch) -> list[Array]:
            start.wait(60)
            given = replace(batch, x=case.x)
            return [np.asarray(backend.harness.call(model, given)[0]) for _ in range(6)]

        with ThreadPoolExecutor(len(batches)) as pool:
            found = list(pool.map(called, batches))
    for number, (batch, answers) in enumerate(zip(batches, found, strict=True)):
        now = case.but(ids=batch.ids, weights=batch.weights)
        for y in answers:
            _check_answer(now, y, f"the output that thread {number} got")


def _base(case: Case) -> Array:
    return oracle.forward(case.but(ids=np.full_like(case.ids, -1)))


@check(
    "a compiled function goes by each call's ids, by the values of then, and by disable or refuses to; unknown ids are an error or NaN",
    examples=5,
    needs=("compiled_forward",),
    uses=("training",),
)
def compiled(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=2)
    model = backend.adapted(case)
    run: Callable[[Batch], Any] = backend.harness.compiled_forward(model)
    step = backend.harness.trainer(model, SETTINGS)
    for number, batch in enumerate([*batches, *batches]):
        now = case.but(ids=batch.ids, weights=batch.weights, pairs=backend.pairs(model))
        _check_answer(now, run(now.batch)[0], f"the compiled output of call {number}")
        step(batch)
    with backend.verb("disable")(model):
        try:
            off = run(case.batch)[0]
        except ValueError:  # it may refuse to be another function than was compiled
            off = _base(case)
    size = oracle.forward(oracle.magnitude(case))
    close(off, _base(case), size, case.dtype, "the compiled output inside disable")
    now = case.but(pairs=backend.pairs(model))
    _check_answer(now, run(now.batch)[0], "the compiled output after disable")
    bad = case.ids.copy()
    place = tuple(draw.integer(0, size - 1) for size in bad.shape)
    bad[place] = draw.one_of([len(case.table), -2])
    try:
        y = np.asarray(run(case.but(ids=bad).batch)[0], np.float64)
    except Exception:
        return
    assert np.isnan(y[place[:-1]]).all(), f"row {place[0]}, with an id of no feature, was served"


@check(
    "a framework's own loop trains as the formula does; absent features and the base stay as they were",
    examples=4,
    needs=("fit",),
    uses=("training",),
)
def fitted(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=5)
    model = backend.adapted(case)
    backend.harness.fit(model, batches, SETTINGS)
    _check_fitted(backend, case, batches, model)


def _check_fitted(
    backend: Backend, case: Case, batches: list[Batch], model: Any, what: str = ""
) -> None:
    found, expected = backend.pairs(model), oracle.train(case, batches, SETTINGS)
    try:
        check_trajectory(case, [found], expected[-1:], when="after the framework's own loop")
    except AssertionError as error:
        raise AssertionError(f"{what}{error}") from error
    present = {f for batch in batches for f in oracle.listed(case, batch.ids)}
    for feature in set(case.pairs) - present:
        for part in (0, 1):
            same_bits(found[feature][part], case.pairs[feature][part], f"{what}absent {feature}")
    kernel = np.asarray(backend.harness.kernel(model, case.path))
    same_bits(
        kernel.astype(case.kernel.dtype), case.kernel, f"{what}the base's kernel after training"
    )


@check(
    "every other way that a backend has to call a model gives what a call gives, and leaves the model as it was",
    examples=2,
    needs=("ways",),
)
def other_ways(draw: Draw, backend: Backend) -> None:
    case = draw.trainable(any_kind(draw, backend.kinds), 4)
    for name, way in backend.harness.ways().items():
        model = backend.adapted(case)
        for turn in (case, case.but(x=case.x[::-1].copy(), ids=case.ids[::-1].copy())):
            now = turn if turn is case or case.weights is None else turn.but(weights=case.weights[::-1].copy())  # fmt: skip
            y, _ = way(model, now.batch)
            _check_answer(now, y, f"the output of {name!r}")
        check_output(backend, case.but(model=model))


@check(
    "every other loop that a backend has trains as the formula does; absent features and the base stay as they were",
    examples=1,
    needs=("loops",),
    uses=("training",),
)
def other_loops(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=4)
    for name, loop in backend.harness.loops().items():
        model = backend.adapted(case)
        loop(model, batches, SETTINGS)
        _check_fitted(backend, case, batches, model, f"{name!r}: ")


@check(
    "models that differ in their scales alone, at work in turns, each answer by their own",
    examples=4,
)
def two_models(draw: Draw, backend: Backend) -> None:
    case = draw.trainable(any_kind(draw, backend.kinds), 4)
    alpha, scaling = draw.one_of([5.0, 0.25]), draw.one_of(["lora", "rslora"])
    config = replace(case.config, alpha=alpha, scaling=scaling)
    table = replace(case.table, alpha=alpha, alphas={}, scaling=scaling)
    both = (case, case.but(config=config, table=table))
    made = [now.but(model=backend.adapted(now)) for now in both]
    for now in (*made, *made):
        check_output(backend, now)
    if "gradients" not in backend.absent:
        for now in made:
            check_pairs(backend, now, output_gradient(draw, now), 1)


@check(
    "layers of one model in which features have other ranks and scales each go by their own, in training and evaluation",
    examples=4,
)
def layers_apart(draw: Draw, backend: Backend) -> None:
    features = {"language": ["hau", "swa"], "task": ["ner", "pos"]}
    named = [(group, name) for group, own in features.items() for name in own]
    given = {path: {f: draw.one_of([0, 1, 2, 4]) for f in named} for path in ("q", "k", "up")}
    config: dict[str, Any] = {"alpha": draw.one_of([3.0, None]), "scaling": draw.one_of(["lora", "rslora"])}  # fmt: skip
    stack = draw.stack([*given], [*given], features, **config, rank_pattern=given)
    rng, x = draw.generator(), stack.batch.x.astype(np.float64)
    pairs = {
        path: {
            f: (
                rng.normal(size=(r, 4)).astype(np.float32),
                rng.normal(size=(4, r)).astype(np.float32),
            )
            for f, r in ranks.items()
            if r
        }
        for path, ranks in given.items()
    }
    table = Table.of(features, **config)
    size = np.abs(x)
    for layer in stack.layers:
        now = Case(
            stack.config, table, layer.path, "linear", layer.kernel, layer.bias, pairs[layer.path], x,
            stack.batch.ids, stack.batch.weights, "float32", "auto",
        )  # fmt: skip
        x, size = oracle.forward(now), oracle.forward(oracle.magnitude(now.but(x=size)))
    model = backend.stacked(replace(stack, pairs=pairs))
    calls = [backend.harness.call, *(() if backend.lacks(["evaluated"]) else [backend.harness.evaluated])]  # fmt: skip
    for call in calls:
        close(call(model, stack.batch)[0], x, size, "float32", "the output of layers of unlike ranks", 8.0)  # fmt: skip

"""Many requests at once, and for long: each gets its own answer, and memory stays (docs/specification.md §5.1.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import FlixOptimizer, adamw, adapt, disable, route, value_and_grad
from tests.helpers.jax import randomize
from tests.helpers.stress import (
    CALLS,
    FEATURES,
    REGISTRY,
    answers,
    check_memory,
    in_tasks,
    in_threads,
    needs_proc,
    pair_of,
)

X = np.random.default_rng(0).normal(size=(2, 4, 16)).astype("f")


class Net(nnx.Module):
    def __init__(self) -> None:
        self.first = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(16, 16, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.tanh(self.first(x)))


def made() -> Any:
    model = adapt(Net(), flix.FlixConfig(registry=REGISTRY, ranks=4))
    randomize(model)
    return model


@nnx.jit(graph_updates=False)
def compiled(model: Any, ids: Any) -> Any:
    return model(X, flix_features=ids)


@pytest.mark.parametrize("calls", CALLS)
def test_threads_get_their_own_answers(calls: int) -> None:
    model = made()
    want = answers(lambda pair: compiled(model, np.array(pair)[:, None]))

    def ask(worker: int, call: int) -> bool:
        pair = pair_of(worker, call)
        ids, kind = np.array(pair)[:, None], (worker + call) % 5
        if kind == 0:
            with route(REGISTRY, ids):
                y = model(X)
        elif kind == 1:
            with disable(model):
                y, pair = model(X, flix_features=ids), None  # type: ignore[assignment]
        elif kind == 2:
            with disable(model):
                y, pair = compiled(model, ids), None  # type: ignore[assignment]
        else:
            y = compiled(model, ids) if kind == 3 else model(X, flix_features=ids)
        return np.allclose(y, want[pair], atol=1e-5)

    assert in_threads(calls, ask) == {"right": calls}


@pytest.mark.parametrize("calls", CALLS)
def test_tasks_get_their_own_answers(calls: int) -> None:
    model = made()
    want = answers(lambda pair: compiled(model, np.array(pair)[:, None]))

    def block(worker: int, call: int) -> Any:
        ids = np.array(pair_of(worker, call))[:, None]
        return disable(model) if call % 5 == 0 else route(REGISTRY, ids)

    def ask(worker: int, call: int) -> bool:
        pair = pair_of(worker, call)
        key = None if call % 5 == 0 else pair
        y = compiled(model, np.array(pair)[:, None]) if call % 2 else model(X)
        return np.allclose(y, want[key], atol=1e-5)

    assert in_tasks(calls, block, ask) == {"right": calls}


@pytest.mark.slow
@needs_proc
def test_memory_stays_over_ten_thousand_steps(record_property: Any) -> None:
    model = made()
    optimizer = FlixOptimizer(model, adamw(1e-3))

    @nnx.jit(donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, ids: Any) -> None:
        loss = lambda model, ids: (model(X, flix_features=ids) ** 2).sum()  # noqa: E731
        optimizer.update(model, value_and_grad(loss)(model, ids)[1])

    def steps(count: int) -> None:
        rng = np.random.default_rng(1)
        for _ in range(count):
            step(model, optimizer, rng.integers(0, FEATURES, (2, 1)))

    check_memory(record_property, lambda: steps(1000), lambda: steps(10_000))


@pytest.mark.slow
@needs_proc
def test_memory_stays_over_ten_thousand_calls_at_once(record_property: Any) -> None:
    model, rng = made(), np.random.default_rng(1)

    def calls(count: int) -> None:
        for _ in range(count):
            model(X, flix_features=rng.integers(0, FEATURES, (2, 1)))

    check_memory(record_property, lambda: calls(1000), lambda: calls(10_000))

"""Routing and disable belong to the call, the thread and the task; what caches cannot tell apart is refused."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import adapt, disable, route, scopes
from tests.backends.jax.patches.test_carrying import REQUESTS, Net, X, compiled, model_of
from tests.helpers.registry import config, registry
from tests.helpers.tolerance import assert_close, assert_far

IDS = REQUESTS[0]
HELD: list[Any] = []
"""The model whose layers the functions below close over."""


def held(x: Any) -> Any:
    return HELD[0].q(x)


@pytest.fixture(autouse=True)
def _nothing_held():
    yield
    HELD.clear()
    jax.clear_caches()


JITTED, CHECKPOINTED = jax.jit(held), jax.checkpoint(held)

CLOSURES: dict[str, Any] = {
    "jit of a module-level function": lambda m, x: JITTED(x),
    "checkpoint of a module-level function": lambda m, x: CHECKPOINTED(x),
    "checkpoint of a closure": lambda m, x: jax.checkpoint(m.q)(x),
    "jit of a method": lambda m, x: jax.jit(m.q)(x),
    "scan": lambda m, x: jnp.moveaxis(
        jax.lax.scan(lambda c, x: (c, m.q(x)), 0, jnp.moveaxis(x, 1, 0))[1], 0, 1
    ),
    "map of a module-level function": lambda m, x: jnp.moveaxis(
        jax.lax.map(held, jnp.moveaxis(x, 1, 0)), 0, 1
    ),
    "cond": lambda m, x: jax.lax.cond(x.sum() < 1e9, held, lambda x: x, x),
    "while": lambda m, x: jax.lax.while_loop(
        lambda c: c[0] < 1, lambda c: (c[0] + 1, held(c[1])), (0, x)
    )[1],
    "switch": lambda m, x: jax.lax.switch(0, [held, held], x),
    "nnx.remat of a closure": lambda m, x: nnx.remat(lambda x: m.q(x))(x),
    "nnx.jit of a closure": lambda m, x: nnx.jit(held)(x),
}


def closing(name: str) -> Any:
    model = model_of(CLOSURES[name])
    HELD[:] = [model]
    return model


@pytest.mark.parametrize("name", CLOSURES)
def test_functions_that_close_over_a_layer(name: str) -> None:
    """Compiled as a whole, right for every request; where values are computed at once, refused, or right."""
    reference = model_of()
    model = closing(name)
    wanted = [reference(X, flix_features=ids) for ids in REQUESTS]

    @jax.jit
    def twice(ids: Any, others: Any) -> Any:
        return model(X, flix_features=ids), model(X, flix_features=others)

    run = jax.jit(lambda ids: model(X, flix_features=ids))
    for k in (0, 1, 0):
        assert_close(run(REQUESTS[k]), wanted[k])
    for got, y in zip(twice(REQUESTS[1], REQUESTS[2]), wanted[1:], strict=True):
        assert_close(got, y)
    # Known ids in programs of the same shapes.
    for ids, y in zip(REQUESTS[:2], wanted, strict=False):
        assert_close(jax.jit(lambda x, ids=ids: model(x, flix_features=ids))(X), y)
        try:
            assert_close(model(X, flix_features=ids), y)
        except flix.RoutingError as error:
            assert "'q' runs inside a function that is compiled by itself" in str(error)
            assert "nnx.remat" in str(error)
    with disable(model):
        assert_close(model(X), Net()(X))
        assert_close(jax.jit(lambda ids: model(X, flix_features=ids))(REQUESTS[0]), Net()(X))
    assert_close(jax.jit(lambda ids: model(X, flix_features=ids))(REQUESTS[0]), wanted[0])


def test_the_way_out_that_the_error_names_works() -> None:
    model = model_of(
        lambda m, x: jax.checkpoint(lambda x, ids: m.q(x, flix_features=ids))(x, m.ids)
    )
    for ids in REQUESTS:
        object.__setattr__(model, "ids", jnp.asarray(ids))
        assert_close(model(X, flix_features=ids), model_of()(X, flix_features=ids))


def test_compiled_functions_that_close_over_a_disabled_model() -> None:
    model, base = model_of(), Net()
    run = jax.jit(lambda x, ids: model(x, flix_features=ids))
    inner = jax.jit(lambda x, ids: model.q(x, flix_features=ids))
    wanted = run(X, REQUESTS[0])
    for _ in range(2):
        with disable(model):
            assert_close(run(X, REQUESTS[0]), base(X))
            assert_close(inner(X, REQUESTS[0]), base.q(X))
            with disable(model_of()):
                assert_close(run(X, REQUESTS[0]), base(X))
        assert_close(run(X, REQUESTS[0]), wanted)
        with disable(model_of()):
            assert_close(run(X, REQUESTS[0]), wanted)
        assert_far(inner(X, REQUESTS[0]), base.q(X))


def test_cached_partial_of_a_disabled_model_is_refused() -> None:
    model = model_of()
    run = nnx.cached_partial(nnx.jit(lambda m, ids: m(X, flix_features=ids)), model)
    wanted = run(REQUESTS[0])
    with disable(model):
        with pytest.raises(flix.RoutingError, match=r"nnx\.cached_partial"):
            run(REQUESTS[0])
        own = nnx.cached_partial(nnx.jit(lambda m, ids: m(X, flix_features=ids)), model)
        assert_close(own(REQUESTS[0]), Net()(X))
    assert_close(run(REQUESTS[0]), wanted)


def test_cached_partial_of_a_layer_is_refused_inside_of_a_forward() -> None:
    run = nnx.cached_partial(nnx.jit(lambda q, x: q(x)), (model := model_of()).q)
    with pytest.raises(flix.RoutingError, match="compiled by itself"), route(registry(), IDS):
        run(X)
    assert_far(model(X, flix_features=IDS), Net()(X))


def answers(model: Any) -> list[Any]:
    return [model(X, flix_features=ids) for ids in REQUESTS]


@pytest.mark.parametrize("name", ["remat", "jit"])
def test_threads(name: str) -> None:
    """Eager and compiled calls of one model, some of them disabled, in eight threads."""
    wrap = {
        "remat": lambda m, x: nnx.remat(lambda q, x: q(x), graph_updates=False)(m.q, x),
        "jit": lambda m, x: nnx.jit(lambda q, x: q(x), graph_updates=False)(m.q, x),
    }[name]
    model = model_of(wrap)
    wanted, base = answers(model_of()), Net()(X)
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graph, state)(X, flix_features=ids))

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).integers(0, 4, 3)
        for k in order:
            if k < 3:
                assert_close(model(X, flix_features=REQUESTS[k]), wanted[k])
                assert_close(run(state, REQUESTS[k]), wanted[k])
            else:
                with disable(model):
                    assert_close(model(X, flix_features=REQUESTS[0]), base)
                with pytest.raises(flix.RoutingError, match="without routing"):
                    model(X)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.parametrize("compile", [False, True])
def test_tasks(compile: bool) -> None:
    """Tasks of one thread, and what they hand to other threads."""
    model = model_of()
    wanted, base = answers(model), Net()(X)
    call = compiled if compile else (lambda m, x, ids: m(x, flix_features=ids))

    async def work(seed: int) -> None:
        for k in np.random.default_rng(seed).integers(0, 4, 4):
            await asyncio.sleep(0)
            if k < 3:
                with route(registry(), REQUESTS[k]):
                    await asyncio.sleep(0)
                    assert_close(model(X), wanted[k])
                assert_close(call(model, X, REQUESTS[k]), wanted[k])
            else:
                with disable(model):
                    await asyncio.sleep(0)
                    assert_close(call(model, X, REQUESTS[0]), base)
                    y = await asyncio.to_thread(lambda: np.asarray(model(X)))
                    assert_close(y, base)
            with pytest.raises(flix.RoutingError, match="without routing"):
                model(X)

    async def run() -> None:
        await asyncio.gather(*map(work, range(8)))

    asyncio.run(run())
    assert_close(call(model, X, REQUESTS[0]), wanted[0])


def test_tasks_and_functions_that_close_over_the_model() -> None:
    """Their cache cannot tell tasks apart: refused while one of them has a block open, right otherwise."""
    model = model_of()
    run = jax.jit(lambda ids: model(X, flix_features=ids))
    wanted = run(REQUESTS[0])
    assert_close(jax.jit(lambda ids: _reference(model, ids))(REQUESTS[0]), Net()(X))

    async def inside(entered: asyncio.Event, tried: asyncio.Event) -> None:
        with disable(model):
            entered.set()
            await tried.wait()
            for _ in range(2):
                with pytest.raises(flix.RoutingError, match="cannot tell tasks apart"):
                    run(REQUESTS[0])
        assert_close(run(REQUESTS[0]), wanted)

    async def outside(entered: asyncio.Event, tried: asyncio.Event) -> None:
        await entered.wait()
        with pytest.raises(flix.RoutingError, match="cannot tell tasks apart"):
            run(REQUESTS[0])
        tried.set()

    async def main() -> None:
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(inside(*events), outside(*events))

    asyncio.run(main())
    assert_close(run(REQUESTS[0]), wanted)


def _reference(model: Any, ids: Any) -> Any:
    with disable(model):
        return model(X, flix_features=ids)


def test_a_block_closed_in_another_thread_leaves_nothing() -> None:
    model = model_of()
    block = disable(model)
    block.__enter__()
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    # It was this thread's to close: it holds until this thread does.
    assert_close(model(X), Net()(X))
    with disable(model):
        pass
    assert_close(model(X), Net()(X))
    scopes.leave(model)
    with pytest.raises(flix.RoutingError, match="without routing"):
        model(X)


def test_layers_of_another_registry_are_refused() -> None:
    other = flix.FeatureRegistry({"language": ["a", "b"]})
    model = model_of()
    inner = adapt(Net(), flix.FlixConfig(registry=other, ranks=2, target_modules=["q", "o"]))
    with route(other, [[0], [1]]):
        inner(X)
        with pytest.raises(flix.RoutingError, match=r"'q' belongs to FeatureRegistry\(language: 4"):
            model.q(X)
    assert config().registry == registry()

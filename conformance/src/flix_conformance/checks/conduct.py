"""Which layers are heads, when a model is its base, and what is refused, where the formula does not say it.

Each rule is checked on every backend alone, and once more between backends, so that they cannot drift apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from flix_conformance.backend import Backend
from flix_conformance.checks._registry import check
from flix_conformance.harness import Array, Batch, Stack
from flix_conformance.strategies import Draw

HEADS = (
    "classifier", "cls", "embed_out", "head", "lm_head", "logits", "predictions", "qa_outputs", "score",
)  # fmt: skip
_ALIKE = ("heads", "lm_head_q", "head_proj", "score_dense", "sub_classifier", "output")
_ORDINARY = ("q", "k", "up", "down")
FIRST, SECOND = "q", "k"


# Heads.


def _headed(draw: Draw) -> tuple[Stack, list[str]]:
    """A model for "all-linear", with heads among its layers in any place; and the paths that are none."""
    chosen = {draw.one_of(HEADS), draw.one_of(HEADS), draw.one_of(_ALIKE), draw.one_of(_ORDINARY)}
    order = np.argsort([draw.integer(0, 99) for _ in chosen], kind="stable")
    paths = [sorted(chosen)[i] for i in order]
    return draw.stack(paths, "all-linear"), [path for path in paths if path not in HEADS]


def _adapted_layers(backend: Backend, stack: Stack) -> list[str]:
    """In the order of their names: frameworks order a model's layers in ways of their own."""
    return sorted(backend.verb("summary")(backend.stacked(stack)).layers)


@check(
    '"all-linear" adapts every linear layer but the heads, by their names alone: '
    f"{', '.join(HEADS)}; a head that is named is adapted, and what is excluded is not",
    examples=10,
)
def heads(draw: Draw, backend: Backend) -> None:
    stack, others = _headed(draw)
    found = _adapted_layers(backend, stack)
    paths = [layer.path for layer in stack.layers]
    assert found == sorted(others), f"of {paths}, {found} were adapted, not {others}"
    named = replace(stack, config=replace(stack.config, target_modules=tuple(paths)))
    found = _adapted_layers(backend, named)
    assert found == sorted(paths), f"of {paths}, all of them named, {found} were adapted"
    left = draw.one_of(paths)
    told = replace(named.config, exclude_modules=(left,))
    found = _adapted_layers(backend, replace(named, config=told))
    wanted = sorted(path for path in paths if path != left)
    assert found == wanted, f"of {paths}, all but {left!r} named, {found} were adapted"


@check("two backends see the same layers and the same heads", examples=6, pair=True)
def cross_heads(draw: Draw, first: Backend, second: Backend) -> None:
    stack, _ = _headed(draw)
    found = []
    for backend in (first, second):
        plain = backend.harness.plain(stack.layers, stack.batch.x)
        seen = {layer.path for layer in stack.layers}
        infos = [info for info in backend.primitives.layers(plain) if info.path in seen]
        sizes = [(i.path, i.kind, int(i.d_in), int(i.d_out), bool(i.head)) for i in infos]
        found.append((sorted(sizes), _adapted_layers(backend, stack)))
    assert found[0] == found[1], f"{first.name}: {found[0]}, {second.name}: {found[1]}"


# The base alone.


def two_layers(draw: Draw, **settings: Any) -> Stack:
    """Two adapted layers before a head."""
    return draw.stack([FIRST, SECOND, "lm_head"], [FIRST, SECOND], **settings)


def _calls(stack: Stack) -> Iterator[tuple[str, Batch, str | None]]:
    """(what, batch, path) of calls of a model and of a layer inside, that all give the base under disable."""
    batch = stack.batch
    unknown = np.full_like(batch.ids, len(stack.config.registry))
    for path in (None, SECOND):
        where = "the model" if path is None else f"layer {path!r} by hand"
        yield f"{where} with explicit features", batch, path
        yield f"{where} without routing", replace(batch, ids=None, weights=None), path
        yield f"{where} with an id of no feature", replace(batch, ids=unknown), path
        yield f"{where} with weights and no features", replace(batch, ids=None), path


def _base(stack: Stack, path: str | None) -> Array:
    x = stack.batch.x.astype(np.float64)
    for layer in stack.layers:
        if path in (None, layer.path):
            x = x @ layer.kernel + (0.0 if layer.bias is None else layer.bias)
    return x


def _off(backend: Backend, model: Any, stack: Stack) -> dict[str, Array]:
    found = {}
    for what, batch, path in _calls(stack):
        try:
            y, _ = backend.harness.call(model, batch, path)
        except Exception as error:
            raise AssertionError(f"inside disable, {what} is refused: {error}") from error
        found[what] = np.asarray(y, np.float64)
    return found


def _near(actual: Array, expected: Array, what: str) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=what)


@check(
    "inside disable a model and its layers answer as the base, whatever routing a call gives; contexts nest and overlap",
    examples=3,
)
def disabled(draw: Draw, backend: Backend) -> None:
    stack = two_layers(draw)
    model, disable = backend.stacked(stack), backend.verb("disable")
    routed = [backend.harness.call(model, stack.batch, path)[0] for path in (None, SECOND)]

    def check_base(when: str) -> None:
        for (what, y), (_, _, path) in zip(
            _off(backend, model, stack).items(), _calls(stack), strict=True
        ):
            _near(y, _base(stack, path), f"{when}: {what}")

    def check_routed(when: str) -> None:
        for path, before in zip((None, SECOND), routed, strict=True):
            y = backend.harness.call(model, stack.batch, path)[0]
            _near(np.asarray(y), np.asarray(before), f"the output {when}")

    with disable(model):
        check_base("inside")
        with disable(model):
            check_base("inside twice")
        check_base("after the inner of two contexts")
    check_routed("after disable")
    with ExitStack() as later:
        with ExitStack() as earlier:
            earlier.enter_context(disable(model))
            later.enter_context(disable(model))
        check_base("after the first of two contexts that overlap")
    check_routed("after both")
    try:
        with disable(model):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        check_routed("after an exception inside disable")


@check("disable holds for the thread or asyncio task that entered it, and for no other", examples=2)
def disabled_here(draw: Draw, backend: Backend) -> None:
    stack = two_layers(draw)
    model, disable = backend.stacked(stack), backend.verb("disable")
    before, base = np.asarray(backend.harness.call(model, stack.batch)[0]), _base(stack, None)

    def answer() -> Array:
        return np.asarray(backend.harness.call(model, stack.batch)[0])

    with disable(model), ThreadPoolExecutor(1) as pool:
        _near(pool.submit(answer).result(), before, "the output in another thread than disable's")
        _near(answer(), base, "the output inside disable, after another thread's")

    async def tasks() -> None:
        opened, asked = asyncio.Event(), asyncio.Event()

        async def off() -> None:
            with disable(model):
                opened.set()
                await asked.wait()
                _near(answer(), base, "the output inside disable, after another task's")

        async def on() -> None:
            await opened.wait()
            _near(answer(), before, "the output in another task than disable's")
            asked.set()

        await asyncio.gather(off(), on())

    asyncio.run(tasks())


@check("two backends give the same base inside disable", examples=2, pair=True)
def cross_disabled(draw: Draw, first: Backend, second: Backend) -> None:
    stack, found = two_layers(draw), []
    for backend in (first, second):
        model = backend.stacked(stack)
        with backend.verb("disable")(model):
            found.append(_off(backend, model, stack))
    for what, y in found[0].items():
        _near(found[1][what], y, what)


def _refusals(backend: Backend, stack: Stack) -> list[str]:
    """What a model and a layer inside say to weights without features."""
    model, said = backend.stacked(stack), []
    for path in (None, SECOND):
        where = "the model" if path is None else "a layer by hand"
        try:
            backend.harness.call(model, replace(stack.batch, ids=None), path)
        except ValueError as error:
            said.append(str(error))
        else:
            raise AssertionError(f"{where} served weights without features")
    return said


@check("weights without features are refused, by a model and by a layer inside", examples=2)
def weights_alone(draw: Draw, backend: Backend) -> None:
    for message in _refusals(backend, two_layers(draw)):
        assert "flix_weights" in message and "flix_features" in message, (
            f"the message does not name flix_weights and flix_features: {message}"
        )


@check("two backends refuse weights without features in the same words", examples=1, pair=True)
def cross_refusals(draw: Draw, first: Backend, second: Backend) -> None:
    stack = two_layers(draw)
    for mine, theirs in zip(_refusals(first, stack), _refusals(second, stack), strict=True):
        # Frameworks may add words of their own around (Keras does).
        assert mine in theirs or theirs in mine, (
            f"{first.name} says {mine!r}, {second.name} says {theirs!r}"
        )

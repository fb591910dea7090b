"""Models become adapted: targets, structure, errors, and their base while they are disabled."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import (
    FlixParam,
    RoutedModel,
    adapt,
    disable,
    merge,
    named_pairs,
    route,
    trainable_parameters,
)
from flix.backends.jax.adapt import flix_layers
from flix.core.adapter.initial import initial_a
from tests.helpers.jax import TARGETS, TOKENS, Net, adapted, randomize
from tests.helpers.registry import IDS, WEIGHTS, config, registry
from tests.helpers.tolerance import assert_close, assert_far, same_bits

PATHS = ["embed", *(f"layers.0.{name}" for name in ("back", "e", "o", "q"))]


@nnx.jit
def forward(model: Any, tokens: Any, ids: Any, weights: Any = None) -> Any:
    return model(tokens, flix_features=ids, flix_weights=weights)


@nnx.jit
def plain(model: Any, tokens: Any) -> Any:
    return model(tokens)


def test_adapted_starts_equal_to_the_base() -> None:
    model = adapt(Net(), config(target_modules=TARGETS, seed=3))
    assert isinstance(model, Net)
    assert isinstance(model, RoutedModel)
    assert type(model).__name__ == "Net"
    assert [path for path, _ in flix_layers(model)] == PATHS
    assert_close(forward(model, TOKENS, IDS, WEIGHTS), plain(Net(), TOKENS))
    pairs = named_pairs(model)
    wanted = initial_a(seed=3, layer="layers.0.o", group="task", feature="pos", rank=4, d_in=8)
    assert same_bits(pairs["layers.0.o.A.task.pos"], wanted)
    assert same_bits(pairs["embed.B.task.pos"], np.zeros((6, 4), np.float32))


def test_strategies_agree_and_one_cache_entry() -> None:
    model = adapted()
    traces = []

    @nnx.jit
    def run(model: Any, ids: Any, weights: Any) -> Any:
        traces.append(1)
        return model(TOKENS, flix_features=ids, flix_weights=weights)

    first = run(model, IDS, WEIGHTS)
    run(model, IDS[::-1].copy(), WEIGHTS)
    run(adapted(seed=0), np.full_like(IDS, 5), WEIGHTS)
    assert len(traces) == 1
    for strategy in ("gather", "masked"):
        for _, layer in flix_layers(model):
            layer.flix_strategy = strategy
        assert_close(run(model, IDS, WEIGHTS), first)


@pytest.mark.covers("nnx", "gradients", backend="jax")
def test_only_adapters_get_gradients() -> None:
    model = adapted()

    @nnx.jit
    def grads(model: Any) -> Any:
        def loss(model: Any) -> Any:
            return (model(TOKENS, flix_features=IDS) ** 2).mean()

        return nnx.grad(loss, argnums=nnx.DiffState(0, FlixParam))(model)

    paths = [path for path, _ in nnx.to_flat_state(grads(model))]
    assert {path[-1] for path in paths} == {"flix_A", "flix_B"}
    assert len(paths) == 2 * len(PATHS)
    state = trainable_parameters(model)
    assert len(jax.tree.leaves(state)) == 2 * len(PATHS)


def test_a_call_without_routing_is_an_error_whichever_module_it_enters() -> None:
    model = adapted()
    x = jnp.ones((5, 2, 6))
    for mode in (model.train, model.eval):
        mode()
        for call in (model, lambda tokens: plain(model, tokens)):
            with pytest.raises(flix.RoutingError, match="called without routing; call it as"):
                call(TOKENS)
        with pytest.raises(flix.RoutingError, match="without flix_features"):
            model(TOKENS, flix_weights=WEIGHTS)
        for inner, given, path in (
            (model.layers[0], x, r"layers\.0\.q"),
            (model.layers[0].back, x, r"layers\.0\.back"),
            (model.embed, TOKENS, "embed"),
        ):
            with pytest.raises(flix.RoutingError, match=f"'{path}' is adapted, but no routing is"):
                inner(given)
            with pytest.raises(flix.RoutingError, match=f"'{path}' is adapted, but no routing is"):
                plain(inner, given)
    assert_close(forward(model, TOKENS, np.full_like(IDS, -1)), plain(Net(), TOKENS))
    with route(registry(), IDS):
        x = model.layers[0].back(jnp.ones((5, 2, 6)))
    assert x.shape == (5, 2, 6)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.full((5, 2), 6), "id 6 in row 0"),
        (IDS[:3], r"leading shape \[5, 4\]"),
        (IDS[:, 0], r"\[batch, width\]"),
        (IDS.astype(np.float32), "integer ids"),
    ],
)
def test_bad_routing_is_named(ids: Any, match: str) -> None:
    with pytest.raises(flix.RoutingError, match=match):
        adapted()(TOKENS, flix_features=ids)


def test_targets() -> None:
    model = adapt(Net(), config())
    assert [path for path, _ in flix_layers(model)] == PATHS[1:]  # no embedding, no head
    with pytest.raises(flix.TargetError, match="adapted already"):
        adapt(model, config())
    with pytest.raises(flix.TargetError, match="'qq' matches no layer"):
        adapt(Net(), config(target_modules=["qq"]))
    with pytest.raises(flix.TargetError, match=r"flax\.nnx Module"):
        adapt(object(), config())  # type: ignore[type-var]

    class Odd(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.heads = nnx.Einsum("bthd,hde->bthe", (2, 3, 4), rngs=rngs)
            self.late = nnx.Einsum("ab,bc->ac", (2, 3), rngs=rngs)
            self.batched = nnx.LinearGeneral(2, 3, batch_axis={0: 4}, rngs=rngs)
            self.fine = nnx.Linear(2, 3, rngs=rngs)

    for name, reason in (("heads", "a kernel of its own"), ("batched", "batch_axis")):
        with pytest.raises(flix.TargetError, match=reason):
            adapt(Odd(), config(target_modules=[name]))
    with pytest.warns(UserWarning, match=r"leaves out 'batched' \(.*batch_axis.*; 'heads' \("):
        model = adapt(Odd(), config())
    assert [p for p, _ in flix_layers(model)] == ["fine", "late"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(Odd(), config(exclude_modules=["batched", "heads"]))


def test_layers_stacked_along_another_axis_than_the_first_are_named() -> None:
    class Stacked(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layers, self.out = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
            self.layers.kernel = nnx.Param(jnp.zeros((4, 3, 5)))

    with pytest.warns(
        UserWarning, match=r"leaves out 'layers' \(.*\[4, 3, 5\], not \[\.\.\., 4, 5\]"
    ):
        adapt(Stacked(), config())
    with pytest.raises(flix.TargetError, match=r"\[4, 3, 5\]"):
        adapt(Stacked(), config(target_modules=["layers"]))


class Two(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.relu(self.up(x)))


def two(**changes: Any) -> tuple[Any, Any]:
    """An adapted model, and its base."""
    base, model = Two(), adapt(Two(), config(**changes))
    randomize(model)
    return model, base


FLOATS = np.random.default_rng(0).normal(size=(5, 4)).astype("f")


@pytest.mark.covers("nnx", "disable", backend="jax")
def test_disabled_models_are_their_base_also_when_compiled() -> None:
    model, base = two()
    traces = []

    @nnx.jit
    def run(model: Any, ids: Any) -> Any:
        traces.append(1)
        return model(FLOATS, flix_features=ids)

    wanted, plain = run(model, IDS), base(FLOATS)
    graph = nnx.graphdef(model)
    assert_far(wanted, plain)
    with disable(model):
        assert_close(model(FLOATS), plain)  # in training, without routing
        assert_close(run(model, IDS), plain)
        assert_close(model(FLOATS, flix_features=np.full((99, 1), 99)), plain)  # not looked at
        with disable(model):
            assert_close(model.up(FLOATS), base.up(FLOATS))
        assert_close(run(model, IDS), plain)
        assert_close(nnx.clone(model)(FLOATS), plain)
        merged = merge(model, {"language": "hau"})
    assert not any("flix" in name for name in vars(merged))
    assert same_bits(run(model, IDS), wanted)
    assert len(traces) == 2
    assert nnx.graphdef(model) == graph
    with pytest.raises(flix.RoutingError, match="called without routing"):
        model(FLOATS)
    with pytest.raises(ValueError, match="stop"), disable(model):
        raise ValueError("stop")
    assert same_bits(run(model, IDS), wanted)
    with pytest.raises(flix.TargetError, match="disable needs an adapted model"), disable(base):
        pass


def test_disabled_inside_a_compiled_function() -> None:
    """As distillation or a preference loss needs it: both answers in one step."""
    model, base = two()

    @nnx.jit
    def both(model: Any, ids: Any) -> Any:
        with disable(model):
            reference = model(FLOATS)
        return reference, model(FLOATS, flix_features=ids)

    reference, y = both(model, IDS)
    assert_close(reference, base(FLOATS))
    assert_close(y, model(FLOATS, flix_features=IDS))


def test_disable_counts_and_wins_over_explicit_features() -> None:
    """Contexts may overlap; layers inside the model follow it."""
    model, base = two()
    first, second = disable(model), disable(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_close(model(FLOATS, flix_features=IDS), base(FLOATS))
    assert_close(model.up(FLOATS, flix_features=IDS), base.up(FLOATS))
    second.__exit__(None, None, None)
    assert_far(model(FLOATS, flix_features=IDS), base(FLOATS))
    assert_far(model.up(FLOATS, flix_features=IDS), base.up(FLOATS))


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
def test_quantised_kernels_are_left_out_by_name(dtype: str) -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.q, self.o = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
            self.q.kernel = nnx.Param(self.q.kernel[...].astype(dtype))

    with pytest.warns(
        UserWarning, match=rf"leaves out 'q' \(its kernel is quantised \({dtype}\)\)"
    ):
        model = adapt(Two(), config())
    assert [path for path, _ in flix_layers(model)] == ["o"]
    with pytest.raises(flix.TargetError, match=r"its kernel is quantised"):
        adapt(Two(), config(target_modules=["q"]))

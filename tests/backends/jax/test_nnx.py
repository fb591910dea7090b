"""Adapted nnx models: forward, structure, targets, errors."""

from __future__ import annotations

import copy
import pickle
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
    add_feature,
    merge,
    named_pairs,
    route,
    summary,
    thaw,
    trainable_parameters,
)
from flix.backends.jax.model import flix_layers
from flix.core.adapter.initial import initial_a
from tests.helpers.dense import dense
from tests.helpers.jax import TARGETS, TOKENS, Block, Net, adapted, pairs_of, randomize
from tests.helpers.registry import IDS, WEIGHTS, config, registry
from tests.helpers.tolerance import assert_all_same_bits, assert_close, assert_far, same_bits

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


@pytest.mark.covers("nnx", "mixed batch", backend="jax")
@pytest.mark.covers("nnx", "per-token routing", backend="jax")
@pytest.mark.parametrize(
    "name", ["embed", "layers.0.q", "layers.0.o", "layers.0.e", "layers.0.back"]
)
@pytest.mark.parametrize("per_token", [False, True])
def test_each_layer_against_the_oracle(name: str, per_token: bool) -> None:
    model = adapted()
    layer = dict(flix_layers(model))[name]
    rng = np.random.default_rng(0)
    ids, weights = IDS, WEIGHTS
    if per_token:
        ids, weights = np.stack([IDS, IDS[::-1]]), np.stack([WEIGHTS, WEIGHTS[::-1]])
    lead = ids.shape[:-1] if per_token else (5, 4)
    if name == "embed":
        x = rng.integers(0, 11, lead)
        flat = np.eye(11)[x]
    else:
        inner = (2, 4) if name.endswith("o") else (6,)
        x = rng.normal(size=(*lead, *inner)).astype(np.float32)
        flat = x.reshape(*lead, -1)

    @nnx.jit
    def call(layer: Any, x: Any, ids: Any, weights: Any) -> Any:
        return layer(x, flix_features=ids, flix_weights=weights)

    y = call(layer, x, ids, weights)
    base = call(layer, x, np.full_like(ids, -1), weights)
    if name.endswith(".e"):  # output [B, T, h, c], kernel [h, a, c]: d_out is (h, c)
        assert y.shape == (*lead, 3, 2)
    d_out = layer.flix_spec.shape.d_out
    if not per_token:
        flat = flat.reshape(5, 4, -1)
    else:
        flat = flat[..., None, :]
    wanted = dense(flat, ids, pairs_of(layer.bank, config(target_modules=TARGETS)), weights).y
    assert wanted.shape[-1] == d_out
    assert_close(y - base, wanted.reshape(y.shape), times=2)


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


def test_copies_split_merge_clone_pickle() -> None:
    model = adapted()
    wanted = forward(model, TOKENS, IDS, WEIGHTS)
    for other in (
        copy.deepcopy(model),
        nnx.clone(model),
        nnx.merge(*nnx.split(model), copy=True),
        pickle.loads(pickle.dumps(model)),
    ):
        assert isinstance(other, Net)
        assert_all_same_bits(named_pairs(other), named_pairs(model))
        assert_close(forward(other, TOKENS, IDS, WEIGHTS), wanted)
        randomize(other, seed=9)
        assert_far(forward(other, TOKENS, IDS, WEIGHTS), wanted)
    assert_close(forward(model, TOKENS, IDS, WEIGHTS), wanted)
    assert nnx.split(model)[0] == nnx.split(copy.deepcopy(model))[0]


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


def test_training_without_routing_is_an_error() -> None:
    model = adapted()
    with pytest.raises(flix.RoutingError, match=r"'embed' is adapted and in training"):
        model(TOKENS)
    with pytest.raises(flix.RoutingError, match="without flix_features"):
        model(TOKENS, flix_weights=WEIGHTS)
    model.eval()
    with pytest.warns(UserWarning, match="base model answers alone"):
        y = plain(model, TOKENS)
    assert_close(y, plain(Net(), TOKENS))
    model.train()
    with pytest.raises(flix.RoutingError, match="in training"):
        model(TOKENS)
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
    assert [p for p, _ in flix_layers(adapt(Odd(), config()))] == ["fine", "late"]


def test_ellipsis_einsum_and_attention() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.att = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
            self.mix = nnx.Einsum("...a,ba->b...", (3, 8), rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.mix(self.att(x))

    model = adapt(Model(), config())
    assert "att.query" in dict(flix_layers(model))
    randomize(model)
    row = {"language": "swa", "task": {"pos": 0.5}}
    routing = registry().encode([row] * 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    y = forward(model, x, routing.ids, routing.weights)
    assert y.shape == (3, 2, 3)
    assert_close(plain(merge(model, row), x), y, times=2)


@pytest.mark.covers("nnx", "merge", backend="jax")
def test_merge_equals_forward_and_leaves_nothing() -> None:
    model = adapted()
    row = {"language": {"hau": 0.5, "zul": -1.0}, "task": "pos"}
    before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model, nnx.Param)))
    with pytest.warns(UserWarning, match=r"attend\(\)"):
        merged = merge(model, row)
    routing = registry().encode([row] * 5)
    assert_close(
        plain(merged, TOKENS), forward(model, TOKENS, routing.ids, routing.weights), times=2
    )
    assert type(merged) is Net
    assert nnx.split(merged)[0] == nnx.split(Net())[0]  # no flix state left, nor its traces
    assert not isinstance(merged, RoutedModel)
    after = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model, nnx.Param)))
    assert all(map(same_bits, jax.tree.leaves(before), jax.tree.leaves(after)))
    with pytest.raises(flix.RoutingError, match="activates none"):
        merge(model, {})
    with pytest.raises(flix.TargetError, match="merge needs an adapted model"):
        merge(Net(), row)


def test_merge_unties_shared_kernels() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(6, 6, rngs=nnx.Rngs(1))
            self.b.kernel = self.a.kernel

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))

    model = adapt(Tied(), config(target_modules=["a"]))
    randomize(model)
    routing = registry().encode([{"task": "ner"}] * 2)
    merged = merge(model, {"task": "ner"})
    assert same_bits(merged.b.kernel, model.b.kernel)
    x = np.ones((2, 6), np.float32)
    assert_close(merged(x), forward(model, x, routing.ids), times=2)


@pytest.mark.covers("nnx", "add a feature", backend="jax")
def test_add_feature() -> None:
    model = adapted()
    pairs = named_pairs(model)
    y = forward(model, TOKENS, IDS, WEIGHTS)
    add_feature(model, "language", "fra", rank=3)
    add_feature(model, "language", "kin", init_from="swa", freeze_others=False)
    assert model.flix_config.registry.id("language", "kin") == 7
    grown = named_pairs(model)
    assert all(same_bits(grown[name], value) for name, value in pairs.items())
    assert_close(forward(model, TOKENS, IDS, WEIGHTS), y)
    swa = {"language": "swa"}
    fra, kin = {"language": "fra"}, {"language": "kin"}
    routing = model.flix_config.registry.encode([swa, kin, fra, {}, {}], width=3)
    y = forward(model, np.tile(TOKENS[:1], (5, 1)), routing.ids)
    assert_close(y[1], y[0])
    assert_close(y[2], y[3])  # a fresh feature starts at zero
    assert_far(y[0], y[3])
    with pytest.raises(flix.RankError, match="needs a rank"):
        add_feature(model, "language", "zzz")
    with pytest.raises(flix.FeatureError, match="no feature 'nope'"):
        add_feature(model, "language", "zzz", init_from="nope")


def test_summary() -> None:
    model = adapt(Net(), config(target_modules=["back"]))
    found = summary(model)
    assert found.layers == ("layers.0.back",)
    assert found.features["language", "swa"] == 3 * 12
    assert found.trainable == 12 * 12
    assert found.total == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert "1 adapted layers; 144 trainable" in str(found)
    add_feature(model, "task", "sum", rank=1)
    assert summary(model).trainable == 12
    thaw(model)
    assert summary(model).trainable == 12 * 13


def test_half_precision_base() -> None:
    model = Block(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    adapt(model, config(target_modules=["back"]))
    assert model.back.flix_A.dtype == jnp.float32
    y = model.back(jnp.ones((5, 2, 6), jnp.bfloat16), flix_features=IDS)
    assert y.dtype == jnp.bfloat16

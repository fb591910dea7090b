"""What holds on every backend of Keras but TensorFlow; ``test_backends.py`` runs this file, and
checks_training.py, once for each.

Keras chooses its backend when it is imported, so these run in a process of their own:
``KERAS_BACKEND=jax pytest tests/backends/keras/checks.py``.
"""

import asyncio
import os
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import flix
from flix.backends.keras import (
    FlixDense,
    FlixEmbedding,
    adapt,
    add_feature,
    disable,
    load,
    load_features,
    merge,
    named_pairs,
    remove_feature,
    rename_feature,
    route,
    save,
    search_weights,
    summary,
    thaw,
)
from flix.backends.keras.parameters import values_of
from flix.backends.keras.paths import flix_layers
from tests.backends.keras.models import (
    D_IN,
    D_OUT,
    FLOATS,
    IDS,
    JAX,
    SMALL,
    X,
    Y,
    adapted,
    functional,
    numpy_of,
    randomize,
    small,
)
from tests.helpers.dense import by_id, dense
from tests.helpers.registry import config
from tests.helpers.searching import GOAL, assert_goal_found
from tests.helpers.tolerance import assert_close

ROUTINGS = {
    "plain": [[0, 4], [1, 5], [3, 5]],
    "padding": [[0, -1], [-1, -1], [-1, 5]],
    "duplicates": [[1, 1], [4, 4], [0, 4]],
    "rank 0 alone": [[2, -1], [2, 4], [2, 2]],
    "nothing": [[-1, -1], [-1, -1], [-1, -1]],
    "wide": [[0, 1, 2, 3, 4, 5], [-1] * 6, [5, 4, -1, -1, 0, 0]],
}


def gradients(layer, x, ids, weights, dy):
    """y and the gradients to x, A, B, ``flix_use`` and the weights."""
    tables = [layer.flix_A, layer.flix_B, layer.flix_use]
    free = [] if np.issubdtype(x.dtype, np.integer) else [x]
    free += [] if weights is None else [weights]

    def run(tables_, *given):
        given = [*given]
        x_ = given.pop(0) if not np.issubdtype(x.dtype, np.integer) else ops.convert_to_tensor(x)
        with keras.StatelessScope(state_mapping=[*zip(tables, tables_, strict=True)]):
            return layer(x_, flix_features=ids, flix_weights=given[0] if given else None)

    values = [t.value for t in tables]
    if JAX:
        import jax

        y, back = jax.vjp(run, values, *map(ops.convert_to_tensor, free))
        found = back(ops.convert_to_tensor(dy, dtype=y.dtype))
    else:
        import torch

        values = [v.detach().clone().requires_grad_() for v in values]
        given = [torch.tensor(v, requires_grad=True) for v in free]
        y = run(values, *given)
        grads = torch.autograd.grad(y, [*values, *given], torch.tensor(dy).to(y.dtype))
        found = [list(grads[:3]), *grads[3:]]
    return numpy_of(y), [numpy_of(g) for g in found[0]], [numpy_of(g) for g in found[1:]]


def acting(ids, weights):
    ids = np.asarray(ids)
    alive = np.ones_like(ids, bool) if weights is None else np.not_equal(weights, 0)
    return {int(i) for i in ids[alive & (ids >= 0)]}


def check(layer, kernel, x, ids, weights):
    """Forward and every gradient, as the oracle has them; ``flix_use`` speaks of features in use alone."""
    tokens = np.issubdtype(x.dtype, np.integer)
    dy = np.random.default_rng(3).normal(
        size=(*x.shape, kernel.shape[1]) if tokens else (*x.shape[:-1], kernel.shape[1])
    )
    hot = np.eye(len(kernel))[x] if tokens else x
    wanted = dense(
        hot, ids, by_id(layer.flix_config, layer.pairs()), weights, kernel=kernel.T, dy=dy
    )
    y, (da, db, use), others = gradients(layer, x, np.asarray(ids, np.int32), weights, dy)
    assert_close(y, wanted.y, dtype="float32")
    if not tokens:
        assert_close(others.pop(0), wanted.x, dtype="float32")
    if weights is not None:
        assert_close(others.pop(0), wanted.weights, dtype="float32")
    for i, rank in enumerate(layer.flix_layout.ranks):
        span = layer.span(i)
        if rank:
            assert_close(da[span], wanted.A[i], dtype="float32")
            assert_close(db[span].T, wanted.B[i], dtype="float32")
            assert ((use[span] > 0) == (i in acting(ids, weights))).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
def test_every_strategy_is_the_formula_forward_and_backward(strategy, weighted):
    rng = np.random.default_rng(0)
    linear = FlixDense(D_OUT, config=config(), name="q", strategy=strategy)
    linear.build((None, D_IN))
    table = FlixEmbedding(7, D_OUT, config=config(), name="q", strategy=strategy)
    table.build()
    randomize([linear, table])
    for ids in ROUTINGS.values():
        weights = rng.normal(size=np.shape(ids)).astype("f") if weighted else None
        if weighted:
            weights[0, 0] = 0
        x = rng.normal(size=(3, 2, D_IN)).astype("f")
        check(linear, numpy_of(linear.kernel), x, ids, weights)
        tokens = rng.integers(0, 7, (3, 4)).astype("int32")
        check(table, numpy_of(table.embeddings), tokens, ids, weights)


def test_single_serves_equal_rows_and_refuses_others():
    layer = FlixDense(D_OUT, config=config(), name="q", strategy="single")
    layer.build((None, D_IN))
    randomize([layer])
    x = np.random.default_rng(0).normal(size=(3, 2, D_IN)).astype("f")
    check(layer, numpy_of(layer.kernel), x, [[0, 4]] * 3, None)
    with pytest.raises(flix.ConfigError, match=r"row 1 differs from row 0"):
        layer(x, flix_features=[[0, 4], [1, 4], [0, 4]])


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_a_broken_feature_reaches_its_own_rows_alone(strategy):
    layer = FlixDense(D_OUT, config=config(), name="q", strategy=strategy)
    layer.build((None, D_IN))
    randomize([layer])
    for table in (layer.flix_A, layer.flix_B):
        value = values_of(table).copy()
        value[layer.span(1)] = np.nan
        table.assign(value)
    x = np.random.default_rng(0).normal(size=(4, 1, D_IN)).astype("f")
    ids = np.array([[0, 4], [1, 4], [3, 5], [3, 1]], np.int32)
    weights = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], "f")  # the last row lists it with 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, (da, db, _), (dx, _) = gradients(layer, x, ids, weights, np.ones((4, 1, D_OUT)))
    assert (np.isfinite(y).all((1, 2)) == [True, False, True, True]).all()
    assert (np.isfinite(dx).all((1, 2)) == [True, False, True, True]).all()
    for feature in (0, 3, 5):
        assert (
            np.isfinite(da[layer.span(feature)]).all()
            and np.isfinite(db[layer.span(feature)]).all()
        )


def test_a_model_is_each_rows_merged_model():
    model, given = adapted(whole=True)
    y = ops.convert_to_numpy(model(given))
    names = [f"{g}.{n}" for g, n in model.flix_config.registry.features]
    for row, ids in enumerate(IDS[:3]):
        chosen = {names[i].split(".")[0]: names[i].split(".")[1] for i in ids if i >= 0}
        merged = ops.convert_to_numpy(merge(model, chosen)(X[row : row + 1])) if chosen else None
        if merged is not None:
            assert_close(y[row : row + 1], merged, dtype="float32")
    with disable(model):
        alone = ops.convert_to_numpy(model.predict(X, verbose=0))
    none = ops.convert_to_numpy(model({"inputs": X, "flix_features": np.full_like(IDS, -1)}))
    assert_close(alone, none, dtype="float32")
    assert_close(model.predict(given, verbose=0), y, dtype="float32")
    assert np.abs(alone - y).max() > 1e-3


def test_files_and_features_over_a_models_life(tmp_path):
    model, given = adapted()
    save(model, tmp_path / "a")
    y = ops.convert_to_numpy(model(given))
    again = load(small(), tmp_path / "a")
    assert_close(ops.convert_to_numpy(again(given)), y, dtype="float32")
    before = named_pairs(model)
    add_feature(model, "language", "xho", 2, init_from=["zul"])
    remove_feature(model, "language", "hau")
    rename_feature(model, "task", "ner", "names")
    after = named_pairs(model)
    for name, value in before.items():
        new = name.replace("task.ner", "task.names")
        assert (new in after) != name.endswith("language.hau")
        assert new not in after or value.tobytes() == after[new].tobytes()
    with pytest.raises(flix.RoutingError, match="hau"):
        model(given | {"flix_features": np.zeros_like(IDS)})
    thaw(model, {"language": ["swa", "yor", "zul"], "task": ["names", "pos"]})
    model.compile(keras.optimizers.AdamW(1e-2), "mse")
    model.fit(
        {**given, "flix_features": np.where(IDS == 0, 6, IDS)}, np.zeros((6, 3), "f"), verbose=0
    )
    plain = small()
    joined = adapt(plain, config(target_modules=SMALL))
    load_features(joined, tmp_path / "a", conflicts="replace")
    assert_close(
        named_pairs(joined)["q.A.language.hau"], before["q.A.language.hau"], dtype="float32"
    )
    assert "language" in str(summary(joined))


def test_routing_that_breaks_a_rule_is_refused_or_nan():
    model, given = adapted()
    with pytest.raises(flix.RoutingError, match="row 2"):
        bad = IDS.copy()
        bad[2, 0] = 9
        model({**given, "flix_features": bad})
    with pytest.raises(flix.RoutingError, match="without routing"):
        model(FLOATS)
    with pytest.raises(flix.RoutingError, match="flix_weights was given without"):
        model({"inputs": FLOATS, "flix_weights": np.ones(IDS.shape, "f")})
    with pytest.raises(flix.RoutingError, match="6 rows"):
        model({**given, "flix_features": IDS[:4]})
    if JAX:  # a compiled function cannot refuse
        y = model.predict({**given, "flix_features": bad}, verbose=0)
        assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, 0)).all()
    else:
        with pytest.raises(flix.RoutingError, match="row 2"):
            model.predict({**given, "flix_features": bad}, verbose=0)


def test_routing_from_around():
    model, given = adapted()
    y = ops.convert_to_numpy(model(given))
    with route(model.flix_config.registry, IDS):
        assert_close(ops.convert_to_numpy(model(FLOATS)), y, dtype="float32")
        if JAX:
            with pytest.raises(flix.RoutingError, match="make routing an input"):
                model.predict(FLOATS, verbose=0)
        else:
            assert_close(model.predict(FLOATS, verbose=0), y, dtype="float32")


@pytest.mark.skipif(not JAX, reason="JAX compiles")
def test_compiled_functions_tell_disable_and_changes_apart():
    import jax

    model, given = adapted()
    values = [
        [v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)
    ]
    given = {k: ops.convert_to_tensor(v) for k, v in given.items()}
    run = jax.jit(lambda given: model.stateless_call(*values, given)[0])
    on = numpy_of(run(given))
    with disable(model):
        off = numpy_of(run(given))
        assert np.abs(on - off).max() > 1e-3
    assert_close(numpy_of(run(given)), on, dtype="float32")

    async def enters():
        with disable(model):
            pass

    with pytest.raises(flix.RoutingError, match="tasks of a thread"):
        asyncio.run(enters())


def test_what_is_tensorflows_is_refused_by_name(tmp_path):
    model, _ = adapted()
    with pytest.raises(flix.TargetError, match="KERAS_BACKEND=tensorflow"):
        model.export(tmp_path / "m")
    with pytest.raises(flix.ConfigError, match="'fused' is compiled by TensorFlow"):
        adapt(small(), config(target_modules=["q"]), strategy="fused")
    if not JAX:
        with pytest.raises(flix.ConfigError, match=r"torch\.compile"):
            model.compile("adam", "mse", jit_compile=True)


@keras.saving.register_keras_serializable(package="tests")
class Reads(keras.Model):
    """Uses a layer's kernel without calling it, or looks at its dtype alone."""

    def __init__(self, reads):
        super().__init__()
        self.reads, self.q, self.out = (
            reads,
            keras.layers.Dense(4, name="q"),
            keras.layers.Dense(2, name="out"),
        )

    def build(self, shape):
        self.q.build(shape)
        self.out.build((None, 4))

    def call(self, x):
        kernel = self.q.kernel
        return self.out(ops.matmul(x, kernel) if self.reads else ops.cast(x[:, :4], kernel.dtype))


@pytest.mark.parametrize("reads", [True, False])
def test_a_kernel_that_is_read_past_its_layer_is_refused(reads):
    plain = Reads(reads)
    x = np.ones((3, 5), "f")
    plain(x)
    model = adapt(plain, config(target_modules=SMALL))
    given = {"inputs": x, "flix_features": IDS[:3]}
    if reads:
        with pytest.raises(flix.TargetError, match="q: adapted, but the model uses the kernel"):
            model(given)
        with pytest.raises(flix.TargetError, match="q"):
            model.predict(given, verbose=0)
    else:
        model(given)
        model.predict(given, verbose=0)


def test_a_base_that_keras_quantised():
    plain = functional()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.get_layer("q").quantize("int8")
    before = ops.convert_to_numpy(plain(X))
    model = adapt(plain, config(target_modules=["q"]))
    given = {"inputs": X, "flix_features": IDS}
    assert_close(ops.convert_to_numpy(model(given)), before, dtype="float32")  # B is 0
    randomize(layer for _, layer in flix_layers(model.base))
    y = ops.convert_to_numpy(model(given))
    assert np.isfinite(y).all() and np.abs(y - before).max() > 1e-3
    model.compile(keras.optimizers.AdamW(1e-2), "mse")
    start = named_pairs(model)
    model.fit(given, np.zeros((6, 3), "f"), verbose=0)
    assert [n for n, v in named_pairs(model).items() if v.tobytes() != start[n].tobytes()]


@pytest.mark.parametrize("method", ["gradient", "evolution"])
def test_the_weights_that_made_the_examples_are_found(method):
    model, _ = adapted()
    rows = {"inputs": np.random.default_rng(3).normal(size=(32, 5)).astype(np.float32)}
    routing = config().registry.encode([GOAL] * 32)
    batch = {**rows, "labels": numpy_of(model({**rows, "flix_features": routing}, training=False))}
    before = [numpy_of(v) for v in model.variables]
    found = search_weights(
        model,
        batch,
        {"task": "ner"},
        groups=["language"],
        loss=lambda y, given: ops.mean((y - ops.cast(given["labels"], y.dtype)) ** 2),
        method=method,
        steps=80,
        l1=0.0,
    )
    assert_goal_found(found)
    for variable, value in zip(model.variables, before, strict=True):
        assert np.array_equal(numpy_of(variable), value), variable.path


@pytest.mark.skipif(
    "FLIX_EXCHANGED" not in os.environ, reason="test_backends.py gives what TensorFlow made"
)
def test_files_and_numbers_of_keras_on_tensorflow():
    folder = Path(os.environ["FLIX_EXCHANGED"])
    numbers = np.load(folder / "numbers.npz")
    given = {"inputs": X, "flix_features": IDS}
    for model in (
        load(functional(), folder / "adapter"),
        keras.saving.load_model(folder / "whole.keras"),
    ):
        assert_close(ops.convert_to_numpy(model(given)), numbers["y"], dtype="float32")
    model, given = adapted(randomized=False)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    model.fit(given, Y, epochs=3, batch_size=3, shuffle=False, verbose=0)
    for name, value in named_pairs(model).items():
        assert_close(value, numbers[name], dtype="float32", times=10)

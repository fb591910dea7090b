"""A layer's tables: read and written by feature."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import FlixDense, primitives
from flix.core.adapter.initial import initial_a
from tests.helpers.dense import dense
from tests.helpers.registry import config
from tests.helpers.tensorflow import D_IN, D_OUT, ROUTINGS, adapted, flix_dense, pairs_of, randomize
from tests.helpers.tolerance import assert_close


def test_a_whole_model_is_read_with_one_read_a_table(monkeypatch):
    model, _ = adapted()
    randomize(layer for _, layer in flix_layers(model.base))
    reads, own = [], keras.Variable.numpy
    monkeypatch.setattr(keras.Variable, "numpy", lambda self: reads.append(self.path) or own(self))
    everything = primitives.read(model)
    assert len(reads) == len(set(reads)) == 2 * len(everything) == 10
    monkeypatch.undo()
    some = [("task", "pos"), ("language", "yor"), ("language", "swa")]  # yor has no rank
    for path, pairs in primitives.read(model, some).items():
        assert list(pairs) == [some[0], some[2]]
        for feature, pair in pairs.items():
            for found, wanted in zip(pair, everything[path][feature], strict=True):
                np.testing.assert_array_equal(found, wanted)
    assert all(pairs == {} for pairs in primitives.read(model, []).values())


def test_pairs_are_set_without_moving_others():
    layer = FlixDense(4, config=config(), name="q")
    layer.build((None, 5))
    randomize([layer])
    before, variables = layer.values(), [layer.flix_A, layer.flix_B]
    layer.set_values({5: (np.ones((4, 5)), np.full((4, 4), 2.0))})
    after = layer.values()
    assert (after[5][0] == 1).all() and (after[5][1] == 2).all()
    for i in set(before) - {5}:
        for found, wanted in zip(after[i], before[i], strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert variables[0] is layer.flix_A and variables[1] is layer.flix_B
    assert not layer.flix_A.numpy()[0].any()


def test_initial_values_are_the_cores_bytes():
    layer = FlixDense(D_OUT, config=config(seed=7), name="q")
    layer.build((None, D_IN))
    for (group, feature), a, b in layer.pairs():
        wanted = initial_a(seed=7, layer="q", group=group, feature=feature, rank=len(a), d_in=D_IN)
        assert a.dtype == np.float32 and a.tobytes() == wanted.tobytes() and not b.any()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float32"])
def test_half_precision_keeps_pairs_in_float32(policy):
    layer = flix_dense("gather", dtype=policy)
    assert layer.flix_A.dtype == layer.flix_B.dtype == "float32"
    x, ids = (
        np.random.default_rng(0).normal(size=(3, 9, D_IN)),
        np.array(ROUTINGS["plain"], np.int32),
    )
    y = layer(x, flix_features=ids)
    assert y.dtype == layer.compute_dtype
    assert_close(y, dense(x, ids, pairs_of(layer), kernel=tf.transpose(layer.kernel)).y, times=2)

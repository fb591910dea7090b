"""A layer's tables: read and written by feature."""

import keras
import numpy as np

from flix.backends.tensorflow import FlixDense, primitives
from flix.backends.tensorflow.parameters import places_of
from flix.backends.tensorflow.paths import flix_layers
from tests.helpers.registry import config
from tests.helpers.tensorflow import adapted, randomize


def test_features_stand_in_the_table_by_id():
    places = places_of(config().layout("q"))  # ranks 1, 3, 0, 2 and 2, 4
    assert places.starts.tolist() == [1, 2, 0, 5, 7, 9, 0]
    assert (places.rows, places.widest) == (13, 4)
    assert places.most.tolist() == [0, 4, 7, 9, 11, 12, 12]


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

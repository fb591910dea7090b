"""What is put on an optimizer comes off again."""

import keras
import numpy as np

from flix.backends.keras.patches import optimizers as patches
from flix.backends.tensorflow import keep_absent
from flix.backends.tensorflow.optimizers import RowOptimizer

METHODS = RowOptimizer.METHODS


def test_an_optimizer_gets_its_own_methods_back():
    optimizer = keras.optimizers.SGD(0.5)
    keep_absent(optimizer)
    assert all(name in vars(optimizer) for name in METHODS)
    held = getattr(optimizer, "flix_rows", None)
    assert keep_absent(optimizer) is optimizer and getattr(optimizer, "flix_rows", None) is held
    patches.take_off(optimizer)
    assert getattr(optimizer, "flix_rows", None) is None
    assert not any(name in vars(optimizer) for name in METHODS)
    value = keras.Variable(np.ones(3, "f"))
    optimizer.build([value])
    optimizer.apply([np.ones(3, "f")])
    np.testing.assert_array_equal(value.numpy(), np.full(3, 0.5))

"""The same code gives the same paths, in every process."""

import numpy as np
import pytest

from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import named_pairs
from flix.core.adapter.initial import initial_a
from tests.helpers.tensorflow import KINDS, adapted


@pytest.mark.parametrize("kind", KINDS)
def test_paths_and_initial_values_are_the_same_in_every_instance(kind):
    first, second = adapted(kind)[0], adapted(kind)[0]
    one, two = named_pairs(first), named_pairs(second)
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.tobytes() == two[name].tobytes()
    path, layer = next(flix_layers(first.base))
    wanted = initial_a(seed=0, layer=path, group="task", feature="pos", rank=4, d_in=layer.d_in)
    np.testing.assert_array_equal(one[f"{path}.A.task.pos"], wanted)

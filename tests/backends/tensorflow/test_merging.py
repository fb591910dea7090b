"""One composition folded into a plain copy."""

import pytest

import flix
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import merge
from tests.helpers.claims import over
from tests.helpers.registry import registry
from tests.helpers.tensorflow import KINDS, adapted, made, randomize
from tests.helpers.tolerance import assert_close


@over(KINDS, "merge", backend="tensorflow", argument="kind")
def test_merge_is_the_forward_and_leaves_no_flix_layer(kind):
    model, given = adapted(kind)
    randomize(layer for _, layer in flix_layers(model.base))
    row = {"language": {"swa": 0.5, "zul": -1.0}, "task": "pos"}
    merged = merge(model, row)
    routing = registry().encode([row] * 6)
    wanted = model({**given, "flix_features": routing.ids, "flix_weights": routing.weights})
    assert_close(merged(given["inputs"]), wanted)
    assert not list(flix_layers(merged)) and list(flix_layers(model.base))
    assert type(merged) is type(model.base)
    assert len(merged.trainable_variables) == len(made(kind)[0].trainable_variables)
    with pytest.raises(flix.RoutingError, match="activates none"):
        merge(model, {})
    with pytest.raises(flix.TargetError, match="needs an adapted model"):
        merge(merged, row)

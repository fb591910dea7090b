"""What adapted models are by their class survives copies, splits and pickles."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from flax import nnx

from flix.backends.jax import named_pairs
from tests.helpers.jax import TOKENS, Net, adapted, randomize
from tests.helpers.registry import IDS, WEIGHTS
from tests.helpers.tolerance import assert_all_same_bits, assert_close, assert_far


@nnx.jit
def forward(model: Any, tokens: Any, ids: Any, weights: Any = None) -> Any:
    return model(tokens, flix_features=ids, flix_weights=weights)


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

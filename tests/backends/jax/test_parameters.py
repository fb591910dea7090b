"""A bank's tables as they start."""

from __future__ import annotations

import numpy as np

from flix.backends.jax import init, remove_feature
from flix.core.adapter.initial import initial_a
from tests.helpers.jax import D_IN, D_OUT
from tests.helpers.registry import config
from tests.helpers.tolerance import same_bits


def test_initial_bytes() -> None:
    cfg = config(seed=7)
    bank = init(cfg, {"layers.0.q": (D_IN, D_OUT), "e": (9, D_OUT, "embedding")})
    for path, d_in in (("layers.0.q", D_IN), ("e", 9)):
        for (group, name), a, b in bank[path].pairs():
            rank = cfg.rank(path, (group, name))
            wanted = initial_a(seed=7, layer=path, group=group, feature=name, rank=rank, d_in=d_in)
            assert same_bits(a, wanted)
            assert same_bits(b, np.zeros((D_OUT, rank), np.float32))


def test_pairs_of_a_bank_leave_out_what_was_removed() -> None:
    cfg = config(seed=7)
    gone, *others = cfg.registry.features
    after = (cfg, init(cfg, {"q": (D_IN, D_OUT)}))
    after = remove_feature(after, *gone)
    found = [feature for feature, _, _ in after[1]["q"].pairs()]
    assert found == [f for f in others if cfg.rank("q", f)]

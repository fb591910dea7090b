"""Which strategy runs."""

from __future__ import annotations

from typing import Any

import flix
from flix.backends.jax import (
    sums,
)
from flix.backends.jax.parameters import make_specs
from flix.core.adapter.adapter import LayerShape


def test_what_auto_picks() -> None:
    def pick(length: int, accelerated: bool, count: int = 8, rank: int = 8, **sizes: Any) -> str:
        registry = flix.FeatureRegistry({"g": [f"f{i}" for i in range(sizes.pop("features", 25))]})
        shape = LayerShape(768, 768, sizes.pop("kind", "linear"))
        config = flix.FlixConfig(registry=registry, ranks=rank)
        spec = make_specs(config, {"q": shape})["q"]
        return sums.strategy_for("auto", spec, count, length, 2, accelerated)

    assert [pick(s, False) for s in (1, 7, 8, 512)] == ["masked", "gather", "gather", "gather"]
    # Kernels that nobody measured on a device are chosen by name alone.
    assert [pick(s, True) for s in (1, 7, 8, 512)] == [pick(s, False) for s in (1, 7, 8, 512)]
    assert pick(1, True, count=4096, features=2000) == "gather"
    assert pick(64, True, count=1) == "single"
    assert pick(64, True, rank=300) == "gather"
    assert pick(64, True, kind="embedding") == "gather"

"""Ranks and scales of a layer."""

from __future__ import annotations

from flix import FeatureRegistry, FlixConfig


def test_layouts_hash_by_value():
    registry = FeatureRegistry({"g": ["a", "b"]})
    config = FlixConfig(registry=registry, ranks=2, rank_pattern={"q": 3})
    assert len({config.layout("x"), config.layout("y"), config.layout("q")}) == 2

"""Ranks of some layers: which patterns count, and what would take too long is refused."""

from __future__ import annotations

import time

import pytest

from flix import ConfigError, FeatureRegistry, FlixConfig
from flix.core.config import overrides
from flix.core.config.overrides import Overrides

A, B = ("g", "a"), ("g", "b")


def test_the_first_pattern_that_names_a_feature_counts():
    found = Overrides([("q", {A: 1}), ("x.q", {A: 2, B: 3}), ("k", {B: 4})])
    assert found.numbers("x.q") == {A: 1, B: 3} and found.numbers("q") == {A: 1}
    assert found.numbers("x.k") == {B: 4} and found.numbers("v") == {}
    assert found.numbers("y.q") is found.numbers(
        "q"
    )  # layers that the same patterns match share it


def test_updates_are_the_ranks_above_nothing():
    registry = FeatureRegistry({"g": ["a", "b", "c"]})
    config = FlixConfig(registry=registry, ranks={A: 1, B: 0, ("g", "c"): 2}, rank_pattern={"q": {"g": {"b": 3, "c": 0}}})  # fmt: skip
    assert config.updates("k") == ((0, 1), (2, 2)) and config.updates("q") == ((0, 1), (1, 3))


def config(patterns, features=1):
    registry = FeatureRegistry({"g": [str(i) for i in range(features)]})
    return FlixConfig(registry=registry, ranks=0, rank_pattern=patterns)


@pytest.mark.timed
def test_what_would_take_too_long_is_refused_soon():
    began = time.process_time()
    with pytest.raises(ConfigError, match="more than 2,000 patterns"):
        config({f"x{i}": 1 for i in range(3000)})
    with pytest.raises(ConfigError, match="gives more than 4,000,000 ranks"):
        config({f"x{i}": 1 for i in range(1500)}, 5000)
    many = config({f"x.*{i}": 1 for i in range(1500)})
    with pytest.raises(ConfigError, match="too many, or too involved"):
        many.check_size(f"{i}y" for i in range(10_000))
    involved = config({rf".*a.{{{i}}}": 1 for i in range(60, 100)})
    with pytest.raises(ConfigError, match="too many, or too involved"):
        involved.check_size(f"{i:b}".replace("1", "a") * 10 for i in range(2000))
    apart = config({f"x{i}": {"g": {"0": 1}} for i in range(1500)}, 5000)
    with pytest.raises(ConfigError, match="gives more than 4,000,000 ranks"):
        apart.check_size(f"x{i}" for i in range(1500))
    assert time.process_time() - began < 25  # 11 s on a slow, shared processor


@pytest.mark.timed
def test_what_people_have_is_not_refused():
    layers = [f"model.layers.{i}.{part}" for i in range(48) for part in ("q", "k", "v", "o", "up", "down", "gate")]  # fmt: skip
    config({f"layers.{i}.q": i + 1 for i in range(48)}, 1000).check_size(layers)
    # Every layer by its name, as AdaLoRA writes them.
    paths = [
        f"base_model.model.model.layers.{i}.{part}_proj" for i in range(200) for part in "qkvo"
    ]
    each = config({path: 1 + i % 7 for i, path in enumerate(paths)}, 20)
    began = time.process_time()
    each.check_size(paths)
    assert time.process_time() - began < 5
    assert [each.rank(p, ("g", "3")) for p in paths] == [1 + i % 7 for i in range(800)]


def test_what_takes_too_long_is_refused_by_counting(monkeypatch):
    """The bounds themselves: the limits of seconds above are not held where lines are traced."""
    monkeypatch.setattr(overrides, "_MOST_RANKS", 5)
    with pytest.raises(ConfigError, match="rank_pattern gives more than 5 ranks"):
        config({"x.*": 1, "y": 2}, 3)
    config({"x": 1}, 5)
    apart = config({"x.*1": {"g": {"0": 1}}, "y": {"g": {"0": 2}}}, 2)
    apart.check_size(["x1", "y"])
    with pytest.raises(ConfigError, match="rank_pattern gives more than 5 ranks"):
        apart.check_size(["x1", "y", "z"])
    monkeypatch.setattr(overrides, "_MOST_TRIED", 2)
    with pytest.raises(
        ConfigError, match=r"rank_pattern has [12] patterns, which are too many, or too involved"
    ):
        apart.check_size(["x1"] * 3)


def test_a_pattern_keeps_the_form_it_was_given_in():
    registry = FeatureRegistry({"g": ["a", "b"], "h": ["c"]})
    for given, kept in (
        ({"g": 1, "g=a": 2}, {"g": {"a": 2, "b": 1}}),
        ({"g": 1, ("g", "b"): 3, "h": 4}, {"g": {"a": 1, "b": 3}, "h": 4}),
        ({"g": 1}, {"g": 1}),
        (5, 5),
    ):
        made = FlixConfig(registry=registry, ranks=0, rank_pattern={"q": given})
        assert made.rank_pattern == {"q": kept}
        assert FlixConfig.from_dict(made.to_dict()) == made

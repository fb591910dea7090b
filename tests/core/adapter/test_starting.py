"""An adapter that goes on from another: what stays, what joins, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flix
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.changes import fresh_pairs
from flix.core.adapter.starting import grown, started
from flix.core.errors import AdapterError, ConfigError

LAYERS = {"a": LayerShape(4, 6), "b": LayerShape(5, 3)}
IMPLIES = {("task", "*"): [("shared", "all")]}


def config(languages: list[str], tasks: list[str], **more: Any) -> flix.FlixConfig:
    registry = flix.FeatureRegistry({"language": languages, "task": tasks, "shared": ["all"]}, more.pop("implies", IMPLIES))  # fmt: skip
    ranks = more.pop("ranks", flix.ranks.by_group(language=1, task=2, shared=3))
    return flix.FlixConfig(registry=registry, ranks=ranks, **more)


def adapter(made: flix.FlixConfig, layers: dict[str, LayerShape] = LAYERS, fill: float = 0.0) -> flix.Adapter:  # fmt: skip
    tensors = {}
    for path, shape in layers.items():
        for (group, name), (a, b) in fresh_pairs(made, path, shape).items():
            tensors[f"{path}.A.{group}.{name}"] = a
            tensors[f"{path}.B.{group}.{name}"] = b + np.float32(fill)
    return flix.Adapter(made, layers, tensors)


def test_what_was_there_keeps_ids_ranks_and_alphas_and_what_is_new_follows() -> None:
    start = config(["hau", "swa"], ["ner"], alpha=8.0)
    asked = config(["yor", "swa"], ["ner", "pos"], alpha=4.0, ranks=flix.ranks.uniform(5), seed=9, lora_dropout=0.25)  # fmt: skip
    found = grown(start, asked)
    assert found.registry.features[: len(start.registry.features)] == start.registry.features
    assert found.registry.features[len(start.registry.features) :] == (("language", "yor"), ("task", "pos"))  # fmt: skip
    assert found.ranks == {
        ("language", "hau"): 1, ("language", "swa"): 1, ("task", "ner"): 2, ("shared", "all"): 3, ("language", "yor"): 5,
        ("task", "pos"): 5,
    }  # fmt: skip
    for feature in start.registry.features:
        assert found.scale("a", feature) == start.scale("a", feature)
    assert found.scale("a", ("task", "pos")) == 4.0 / 5
    assert (found.seed, found.lora_dropout) == (9, 0.25)
    row = {"language": "yor", "task": "pos"}
    active = {found.registry.features[i] for i in found.registry.encode([row]).ids[0].tolist() if i >= 0}  # fmt: skip
    assert active == {("language", "yor"), ("task", "pos"), ("shared", "all")}


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_one_alpha_stays_one(alpha: float | None) -> None:
    assert grown(config(["hau"], ["ner"], alpha=alpha), config(["yor"], ["ner"], alpha=alpha)).alpha == alpha  # fmt: skip


def test_a_feature_without_alpha_keeps_the_scale_of_its_rank() -> None:
    found = grown(config(["hau"], ["ner"]), config(["yor"], ["ner"], alpha=2.0))
    assert found.scale("a", ("task", "ner")) == 1.0 and found.scale("a", ("language", "yor")) == 2.0


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"scaling": "rslora"}, "scaling is 'lora' in the adapter to start from, and 'rslora' here"),
        ({"target_modules": ["query"]}, "target_modules is 'all-linear' in the adapter"),
        ({"rank_pattern": {"a": 3}}, "rank_pattern is "),
        ({"implies": {("task", "*"): [("shared", "all"), ("language", "hau")]}}, "implies shared=all in the adapter to start"),
    ],
)  # fmt: skip
def test_what_values_depend_on_must_be_the_same(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why.replace("*", r"\*")):
        grown(config(["hau"], ["ner"]), config(["hau"], ["ner"], **more))


@pytest.mark.parametrize("source", [("task", "*"), ("task", "ner")])
def test_what_was_implied_by_nothing_is_implied_by_nothing(source: Any) -> None:
    start = config(["hau"], ["ner"], implies={})
    asked = config(["hau"], ["ner"], implies={source: [("shared", "all")]})
    with pytest.raises(ConfigError, match=r"implies nothing in the adapter to start from"):
        grown(start, asked)


def test_a_new_feature_may_imply_what_it_likes() -> None:
    asked = config(["hau"], ["pos"], implies={("task", "pos"): [("shared", "all")]})
    found = grown(config(["hau"], ["ner"], implies={}), asked)
    ids = found.registry.encode([{"task": "pos"}, {"task": "ner"}]).ids
    names = [{found.registry.features[i] for i in row if i >= 0} for row in ids.tolist()]
    assert names == [{("task", "pos"), ("shared", "all")}, {("task", "ner")}]


def test_values_are_the_earlier_ones_and_fresh_where_there_are_none() -> None:
    start = adapter(config(["hau", "swa"], ["ner"]), fill=0.5)
    fresh = adapter(grown(start.config, config(["yor"], ["ner"])))
    found = started(fresh, start)
    for path in LAYERS:
        for feature in fresh.config.registry.live:
            source = start if feature in start.config.registry.live else fresh
            for mine, wanted in zip(found.pair(path, feature), source.pair(path, feature), strict=True):  # fmt: skip
                assert np.array_equal(mine, wanted)
    assert not found.pair("a", ("language", "yor"))[1].any()


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ({"a": LAYERS["a"]}, "layer 'b' of the adapter to start from is linear 5 -> 3, and here it is not adapted"),
        ({**LAYERS, "a": LayerShape(4, 7)}, "layer 'a' .* is linear 4 -> 6, and here it is linear 4 -> 7"),
        ({**LAYERS, "c": LayerShape(2, 2)}, "the adapter to start from does not adapt c"),
    ],
)  # fmt: skip
def test_other_layers_are_refused(layers: dict[str, LayerShape], why: str) -> None:
    made = config(["hau"], ["ner"])
    with pytest.raises(AdapterError, match=why):
        started(adapter(made, layers), adapter(made))

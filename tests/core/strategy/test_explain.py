"""What each layer of a model would run, grouped where layers are alike."""

from __future__ import annotations

import json

import flix
from flix.core.adapter.adapter import LayerShape
from flix.core.costs import Layers
from flix.core.strategy.explain import Batch, explain


def test_explain_groups_layers_that_are_alike():
    registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos", "mt"]})
    config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=4, task=8))
    layers: Layers = {
        "q": LayerShape(64, 64, "linear"),
        "v": LayerShape(64, 64, "linear"),
        "up": LayerShape(64, 256, "linear"),
        "embed": LayerShape(1000, 64, "embedding"),
    }
    choices = explain(config, layers, None, Batch(16, 64, "torch-cpu"))
    assert [choice.layers for choice in choices] == [("q", "v"), ("up",)]
    assert {(c.decision.facts.rows, c.decision.facts.union) for c in choices} == {(12, 32)}
    assert json.loads(json.dumps(choices[0].to_dict()))["strategy"] in ("gather", "masked")
    # Fewer examples than compositions: the union is bounded by what they use.
    assert explain(config, layers, None, Batch(1, 64, "torch-cpu"))[0].decision.facts.union == 12

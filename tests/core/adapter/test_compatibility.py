"""Whether an adapter fits a model: the first thing that does not is named."""

from __future__ import annotations

import pytest

from flix import Adapter, AdapterError, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape, checked_pairs
from flix.core.adapter.changes import fresh_pairs
from flix.core.adapter.compatibility import check_fits, check_same

REGISTRY = FeatureRegistry({"language": ["hau", "swa"], "task": ["ner"]})
LAYERS = {"a.q": LayerShape(5, 3), "emb": LayerShape(7, 4, "embedding")}


def config(registry=REGISTRY, **changes) -> FlixConfig:
    return FlixConfig(registry=registry, **{"ranks": 2, **changes})


def adapter(layers=LAYERS, **changes) -> Adapter:
    made = config(**changes)
    pairs = {path: fresh_pairs(made, path, shape) for path, shape in layers.items()}
    return Adapter(made, layers, dict(checked_pairs(made, layers, pairs)))


def layouts(made: FlixConfig, paths=LAYERS):
    return {path: made.layout(path) for path in paths}


def test_an_adapter_fits_a_model_with_more_layers():
    check_fits(adapter(), {**LAYERS, "b.q": LayerShape(9, 9)})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"b.q": LayerShape(5, 3), "emb": LAYERS["emb"]},
            r"another architecture: this Model has no layer 'a\.q' \(did you mean 'b\.q'\?\) that can be adapted; rename= "
            "translates layer paths",
        ),
        (
            {**LAYERS, "a.q": LayerShape(5, 4)},
            r"another architecture: layer 'a\.q' is linear 5 -> 3 in the adapter and linear 5 -> 4 in this Model",
        ),
        (
            {**LAYERS, "emb": LayerShape(7, 4)},
            "layer 'emb' is embedding 7 -> 4 in the adapter and linear 7 -> 4 in this Model",
        ),
    ],
)
def test_layers_that_the_model_lacks_or_has_in_other_sizes(layers, message):
    with pytest.raises(AdapterError, match=message):
        check_fits(adapter(), layers, "this Model")


def test_an_adapter_of_the_same_features_ranks_and_scales_is_the_models():
    for changes in ({}, {"alpha": 3.0}, {"rank_pattern": {"q": {"task": 0}}}):
        check_same(adapter(**changes), config(**changes), layouts(config(**changes)))
    gone = adapter(registry=REGISTRY.without_feature("language", "hau"))
    check_same(gone, gone.config, layouts(gone.config))


OTHER = FeatureRegistry({"language": ["swa", "hau"], "task": ["ner"]})


@pytest.mark.parametrize(
    ("changes", "paths", "message"),
    [
        ({}, (*LAYERS, "b"), "layer 'b' of the model is adapted, but not in the adapter"),
        ({}, ("a.q",), "layer 'emb' of the adapter is not adapted in the model"),
        ({"registry": OTHER}, LAYERS, "other features than the model: .*load_features takes over"),
        (
            {"registry": REGISTRY.without_feature("language", "hau")},
            LAYERS,
            "the adapter has other features than the model",
        ),
        (
            {"rank_pattern": {"emb": {"language": {"swa": 3}}}},
            LAYERS,
            "layer 'emb': language=swa has rank 3 in the model and 2 in the adapter",
        ),
        (
            {"alpha": {"task": 5.0}},
            LAYERS,
            r"layer 'a\.q': task=ner has another scale in the model than in the adapter \(alpha or scaling differ\)",
        ),
    ],
)
def test_what_differs_is_named(changes, paths, message):
    with pytest.raises(AdapterError, match=message):
        check_same(adapter(), config(**changes), layouts(config(**changes), paths))

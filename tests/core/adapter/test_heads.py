"""Trained heads: their names, whether a model has a place for them, and which modules hold them."""

from __future__ import annotations

import numpy as np
import pytest

from flix import Adapter, AdapterError, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.described import Head
from flix.core.adapter.heads import Place, check_heads, chosen_heads, modules_of_heads

# One entry for each name; equal numbers are one parameter.
MODEL = {
    "scale": 0,
    "body.embed.weight": 1,
    "body.layer.weight": 2,
    "classifier.dense.weight": 3,
    "classifier.out.weight": 4,
    "classifier.out.bias": 5,
    "decoder.weight": 1,
}


def adapter(**heads):
    config = FlixConfig(registry=FeatureRegistry({"task": ["ner"]}), ranks=0)
    held = {name.replace("_", "."): Head("F32", value) for name, value in heads.items()}
    return Adapter(config, {"body.layer": LayerShape(2, 2)}, {}, held)


def test_heads_are_renamed_by_their_module():
    model = adapter(a_b_weight=np.zeros(1), scale=np.zeros(1))
    assert set(model.renamed(None).heads) == {"a.b.weight", "scale"}
    assert set(model.renamed({"a.b": "c"}).heads) == {"c.weight", "scale"}
    assert set(model.renamed(str.upper).heads) == {"A.B.weight", "scale"}
    with pytest.raises(AdapterError, match="the layer 'a', which is not adapted"):
        model.renamed({"a": "c"})
    with pytest.raises(AdapterError, match=r"gives the name 'x\.w' to two heads"):
        adapter(a_w=np.zeros(1), b_w=np.zeros(1)).renamed({"a": "x", "b": "x"})


def test_heads_need_a_place_in_the_model():
    places = {
        "classifier.bias": Place((3,)),
        "body.weight": Place((2, 2), ["body.other", "body.layer"]),
    }
    places["body.scale"] = Place((2,), takes=False)
    check_heads(adapter(classifier_bias=np.ones(3)), places, "Model")
    for heads, message in (
        ({"classifier_bia": np.ones(3)}, r"'classifier.bia', which this Model does not have.*heads=False"),
        ({"classifier_bias": np.ones(4)}, r"has the shape \[4\] in the adapter, but this Model's has \[3\]"),
        ({"body_weight": np.ones((2, 2))}, r"'body.weight' is the kernel of the adapted layer 'body.layer'"),
        ({"body_scale": np.ones(2)}, "'body.scale' is not float16, bfloat16"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=message):
            check_heads(adapter(**heads), places, "Model")


def test_heads_are_chosen_by_parameter_or_module():
    places = {name: Place((1,)) for name in ("head.weight", "head.bias", "header.weight", "scale")}
    places["q.weight"] = Place((1,), ["q"])
    assert chosen_heads(places, ["head"], ["q"]) == ["head.weight", "head.bias"]
    assert chosen_heads(places, "scale", ["q"]) == ["scale"]
    assert chosen_heads(places, ["head.bias", "head", "q"], []) == ["head.bias", "head.weight", "q.weight"]  # fmt: skip
    with pytest.raises(AdapterError, match=r"no parameter or module 'heads' \(did you mean"):
        chosen_heads(places, ["heads"], [])
    with pytest.raises(AdapterError, match="kernel of the adapted layer 'q'"):
        chosen_heads(places, ["q"], ["q"])


@pytest.mark.parametrize(
    ("heads", "modules"),
    [
        (["classifier.out.weight", "classifier.out.bias"], ["classifier.out"]),
        (["classifier.out.bias"], ["classifier.out"]),
        ([n for n in MODEL if n.startswith("classifier")], ["classifier"]),
        ([], []),
    ],
)
def test_the_highest_module_that_is_trained_as_a_whole(heads, modules):
    assert modules_of_heads(heads, MODEL, ["body.layer"]) == modules


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ("scale", "it belongs to the model itself, not to a module"),
        ("body.layer.weight", "its module 'body.layer' is adapted"),
        ("body.embed.weight", "other modules share it"),
    ],
)
def test_heads_that_no_module_holds(head, why):
    with pytest.raises(AdapterError, match=f"trained parameter '{head}': {why}; merge"):
        modules_of_heads([head], MODEL, ["body.layer"])

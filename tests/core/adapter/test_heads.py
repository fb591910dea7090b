"""Trained heads: their names, whether a model has a place for them, and which modules hold them."""

from __future__ import annotations

import numpy as np
import pytest

from flix import AdapterError
from flix.core.adapter.heads import check_heads, modules_of_heads, renamed

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


def test_names_are_renamed_by_their_module():
    assert renamed("a.b.weight", None) == "a.b.weight"
    assert renamed("a.b.weight", {"a.b": "c"}) == "c.weight"
    assert renamed("a.b.weight", {"a": "c"}) == "a.b.weight"
    assert renamed("a.b.weight", str.upper) == "A.B.weight"
    assert renamed("scale", str.upper) == "scale"


def test_heads_need_a_place_in_the_model():
    parameters = {"classifier.bias": np.zeros(3)}
    check_heads("file", {"classifier.bias": np.ones(3)}, parameters, "Model")
    with pytest.raises(
        AdapterError, match=r"'file' holds .*'classifier.bia', which this Model does not have"
    ):
        check_heads("file", {"classifier.bia": np.ones(3)}, parameters, "Model")
    with pytest.raises(AdapterError, match=r"has the shape \[4\], but this Model's has \[3\]"):
        check_heads("file", {"classifier.bias": np.ones(4)}, parameters, "Model")


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
        ("scale", "it belongs to no module but the model"),
        ("body.layer.weight", "its module 'body.layer' is adapted"),
        ("body.embed.weight", "other modules share it"),
    ],
)
def test_heads_that_no_module_holds(head, why):
    with pytest.raises(AdapterError, match=f"trained parameter '{head}': {why}; merge"):
        modules_of_heads([head], MODEL, ["body.layer"])

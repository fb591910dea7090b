"""Which layers are adapted."""

from __future__ import annotations

import pytest

from flix import TargetError
from flix.core.config.targets import LayerInfo, is_head, left_out, select

LAYERS = [
    LayerInfo("model", ""),
    LayerInfo("model.emb", "embedding", 10, 4),
    LayerInfo("model.0.q", "linear", 4, 4),
    LayerInfo("model.0.seq", "linear", 4, 4),
    LayerInfo("model.0.norm", ""),
    LayerInfo("model.0.odd", "", reason="its class has a forward of its own"),
    LayerInfo("head", "linear", 4, 10, head=True),
]


def paths(*arguments):
    return [info.path for info in select(LAYERS, *arguments)]


def test_targets_have_pefts_meaning():
    assert paths("all-linear") == ["model.0.q", "model.0.seq"]
    assert paths(["q"]) == ["model.0.q"]
    assert paths(["0.q", "emb"]) == ["model.emb", "model.0.q"]
    assert paths(r".*\.(q|emb)") == ["model.emb", "model.0.q"]
    assert paths(["head"]) == ["head"]
    assert paths("all-linear", ["seq"]) == ["model.0.q"]


def test_heads_are_told_by_the_first_or_last_part_of_a_path():
    for path in ("lm_head", "cls.predictions.decoder", "classifier.out", "model.score", "a.logits"):
        assert is_head(path), path
    for path in ("model.lm_head.q", "model.scores", "heads.0", "encoder.q"):
        assert not is_head(path), path


def test_target_errors():
    for arguments, message in [
        ((["qq"],), "'qq' matches no layer"),
        ((["norm"],), "'model.0.norm', which cannot be adapted: it is neither"),
        ((["odd"],), "has a forward of its own"),
        ((r".*\.odd",), "has a forward of its own"),
        (("all-linear", r".*"), "leaves no layer to adapt"),
    ]:
        with pytest.raises(TargetError, match=message):
            select(LAYERS, *arguments)


def test_what_all_linear_leaves_out_is_grouped_by_its_reason():
    from flix.core.config.targets import ALL_LINEAR, left_out

    layers = [
        LayerInfo("a", "linear", 2, 2),
        LayerInfo("b", "", reason="quantised"),
        LayerInfo("c", "", reason="stacked"),
        LayerInfo("d", "", reason="quantised"),
        LayerInfo("norm", ""),
        LayerInfo("head", "", head=True, reason="quantised"),
        LayerInfo("emb", "", reason="quantised", lookup=True),
    ]
    said = "'b' and 1 more (quantised); 'c' (stacked)"
    assert left_out(layers, ALL_LINEAR) == said
    assert left_out(layers, ALL_LINEAR, ["b", "d"]) == "'c' (stacked)"
    with pytest.raises(TargetError, match=r"leaves no layer to adapt.*left out: 'c' \(stacked\)"):
        select(layers, ALL_LINEAR, ["a", "b", "d"])
    assert left_out(layers, ALL_LINEAR, "b|c|d") == left_out(layers, ["a"]) == ""


def test_layers_that_must_be_named_are_none_of_all_linear():
    layers = [
        LayerInfo("q", "linear", 4, 4),
        LayerInfo("conv", "linear", 9, 4, named=True),
        LayerInfo("deep", "", reason="it has groups", named=True),
    ]
    assert [info.path for info in select(layers, "all-linear")] == ["q"]
    assert left_out(layers, "all-linear") == ""
    assert [info.path for info in select(layers, ["conv"])] == ["conv"]
    assert [info.path for info in select(layers, "q|conv")] == ["q", "conv"]
    for named in (["deep"], ".*"):
        with pytest.raises(TargetError, match="it has groups"):
            select(layers, named)


def test_a_regular_expression_that_matches_nothing_and_names_that_cannot_be_adapted():
    with pytest.raises(TargetError, match=r"target_modules: '\.\*zz' matches no layer; layers that can be adapted: "):  # fmt: skip
        paths(".*zz")
    layers = [LayerInfo("a.q", "linear", 2, 2), LayerInfo("a.norm", "", reason="it has no matrix"), LayerInfo("a.act", "")]  # fmt: skip
    for names, message in (
        (["q", "norm"], r"target_modules=\['q', 'norm'\] names 'a\.norm', which cannot be adapted: it has no matrix"),
        (["q", "act"], r"names 'a\.act', which cannot be adapted: it is neither linear nor an embedding"),
        (["act"], r"names 'a\.act', which cannot be adapted: it is neither linear nor an embedding"),
        ("a\\..*", r"target_modules='a\\\\\.\.\*' matches 'a\.norm', which cannot be adapted: it has no matrix"),
    ):  # fmt: skip
        with pytest.raises(TargetError, match=message):
            select(layers, names)
    # A regular expression may also catch containers.
    assert [info.path for info in select(layers, r"a\.(q|act)")] == ["a.q"]

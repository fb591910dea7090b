"""Adapters as data: features removed, renamed, shared one by one, and adapters that come together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import flix
from flix import Adapter, AdapterError, ConfigError, FeatureError, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.composition import composition, delta
from flix.core.adapter.described import Base

LAYERS = {"a.q": LayerShape(5, 3), "a.b.q": LayerShape(4, 2), "emb": LayerShape(7, 4, "embedding")}
RULES = {("task", "*"): [("shared", "all")]}


GROUPS = {"language": ["hau", "swa"], "task": ["ner", "pos"], "shared": ["all"]}


def registry() -> FeatureRegistry:
    return FeatureRegistry(GROUPS, implies=RULES)


def adapter(seed: int = 0, groups=None, layers=LAYERS, implies=RULES, **changes) -> Adapter:
    features = FeatureRegistry(groups or GROUPS, implies)
    config = FlixConfig(registry=features, **{"ranks": 2, **changes})
    rng = np.random.default_rng(seed)
    tensors = {
        n: rng.normal(size=s).astype(np.float32) for n, s in expected_tensors(config, layers)
    }
    return Adapter(config, layers, tensors)


def same_pairs(first: Adapter, second: Adapter, feature, other=None) -> bool:
    return all(
        np.array_equal(x, y)
        for path in first.layers
        for x, y in zip(first.pair(path, feature), second.pair(path, other or feature), strict=True)
    )


def test_files_keep_removed_features_removed(tmp_path):
    whole = adapter()
    flix.save_adapter(flix.remove_feature(whole, "language", "hau"), tmp_path)
    again = flix.load_adapter(tmp_path)
    assert not any(".hau" in name for name in again.tensors)
    assert again.config.registry.removed == {("language", "hau")}
    assert same_pairs(again, whole, ("language", "swa"))


def test_renaming_keeps_ids_and_values(tmp_path):
    whole = adapter()
    flix.save_adapter(flix.rename_feature(whole, "language", "swa", "swh"), tmp_path)
    again = flix.load_adapter(tmp_path)
    assert again.config.registry.id("language", "swh") == 1
    assert same_pairs(whole, again, ("language", "swa"), ("language", "swh"))
    for new, message in (("hau", "exists"), ("", "non-empty"), ("*", "non-empty")):
        with pytest.raises(FeatureError, match=message):
            flix.rename_feature(whole, "language", "swa", new)
    gone = flix.remove_feature(whole, "language", "hau")
    with pytest.raises(FeatureError, match="was removed, and its id stays reserved"):
        flix.rename_feature(gone, "language", "swa", "hau")


# One feature without the rest


def test_a_share_holds_what_was_chosen_and_what_it_implies(tmp_path):
    whole = adapter(rank_pattern={"q": {"task": {"ner": 5}}}, alpha={"task": 3.0})
    flix.save_adapter(flix.select_features(whole, {"task": "ner"}), tmp_path)
    share = flix.load_adapter(tmp_path)
    assert share.config.registry.features == (("task", "ner"), ("shared", "all"))
    row = {"task": "ner"}
    for path in LAYERS:
        found = delta(share, path, composition(share.config, row))
        assert np.array_equal(found, delta(whole, path, composition(whole.config, row)))
    with pytest.raises(FeatureError, match="features are chosen as"):
        flix.select_features(whole, [])
    with pytest.raises(FeatureError, match="did you mean 'ner'"):
        flix.select_features(whole, [("task", "nre")])


# Several files as one


def test_shares_come_together_to_the_whole():
    whole = adapter(rank_pattern={"q": {"language": {"swa": 3}}}, alpha={"language": {"hau": 5.0}})
    parts = [flix.select_features(whole, [f]) for f in whole.config.registry.features]
    again = flix.combine_adapters(parts)
    assert set(again.config.registry.features) == set(whole.config.registry.features)
    assert again.config.registry.implies == whole.config.registry.implies
    for path in LAYERS:
        for f in whole.config.registry.features:
            assert again.config.rank(path, f) == whole.config.rank(path, f)
            assert again.config.scale(path, f) == whole.config.scale(path, f)
    assert all(np.array_equal(again.tensors[n], t) for n, t in whole.tensors.items())
    assert again.tensors.keys() == whole.tensors.keys()
    assert FlixConfig.from_dict(again.config.to_dict()) == again.config


def test_adapters_of_other_layers_and_ranks_keep_their_own_outputs():
    first = adapter(0, {"language": ["hau"]}, {"a.q": LAYERS["a.q"]}, None, ranks=4, alpha=2.0)
    layers = {"a.b.q": LAYERS["a.b.q"], "a.q": LAYERS["a.q"]}
    second = adapter(1, {"task": ["ner"]}, layers, None, rank_pattern={"a.q": 1}, ranks=3)
    both = flix.combine_adapters({"ann": first, "ben": second})
    assert list(both.layers) == ["a.q", "a.b.q"]
    assert both.config.rank("a.b.q", ("language", "hau")) == 0
    assert both.config.rank("a.q", ("task", "ner")) == 1
    for one, row in ((first, {"language": "hau"}), (second, {"task": "ner"})):
        for path in one.layers:
            found = delta(both, path, composition(both.config, row))
            assert np.array_equal(found, delta(one, path, composition(one.config, row)))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"seed": 1}, "other values in A of layer 'a.q'"),
        ({"alpha": 7.0}, "scales 1 and 3.5 in layer 'a.q'"),
        ({"rank_pattern": {"b.q": 1}}, "ranks 2 and 1 in layer 'a.b.q'"),
        ({"layers": {"a.q": LAYERS["a.q"]}}, "ranks 2 and 0 in layer 'a.b.q'"),
        ({"implies": None}, "task=ner .*it implies other features"),
    ],
)
def test_what_differs_is_named(change, message):
    if "seed" not in change:  # the same values wherever they overlap
        rng = np.random.default_rng
        first, second = adapter(), adapter(**change)
        tensors = {
            n: first.tensors[n]
            if first.tensors[n].shape == t.shape
            else rng(0).normal(size=t.shape)
            for n, t in second.tensors.items()
        }
        second = Adapter(second.config, second.layers, tensors)
    else:
        first, second = adapter(), adapter(**change)
    with pytest.raises(AdapterError, match=message) as caught:
        flix.combine_adapters({"ann's": first, "ben's": second})
    assert "ann's and ben's" in str(caught.value) and "conflicts='keep'" in str(caught.value)


def test_conflicts_are_settled_as_asked():
    first, second = adapter(0), adapter(1, {"task": ["pos", "topic"]}, LAYERS, None, ranks=3)
    feature = ("task", "pos")
    kept = flix.combine_adapters([first, second], conflicts="keep")
    replaced = flix.combine_adapters([first, second], conflicts="replace")
    assert same_pairs(kept, first, feature) and same_pairs(replaced, second, feature)
    for found in (kept, replaced):
        assert found.config.registry.features == (*registry().features, ("task", "topic"))
        assert same_pairs(found, first, ("language", "hau"))
        assert same_pairs(found, second, ("task", "topic"))
    # What a feature implies comes with its values, so that every row does what it did.
    implied = {
        f: kept.config.registry.implied(i) for i, f in enumerate(kept.config.registry.features)
    }
    assert implied["task", "ner"] == implied["task", "pos"] == (4,) and not implied["task", "topic"]
    assert not replaced.config.registry.implied(3)
    assert flix.combine_adapters([first, first]).tensors.keys() == first.tensors.keys()
    with pytest.raises(ConfigError, match="error, keep, replace; got 'first'"):
        flix.combine_adapters([first, second], conflicts="first")


def test_adapters_of_different_models_are_refused():
    other = {**LAYERS, "emb": LayerShape(8, 4, "embedding")}
    second = adapter(1, {"domain": ["news"]}, other, None)
    with pytest.raises(
        AdapterError, match=r"'emb' is embedding 7 -> 4 in ann and .* 8 -> 4 in ben"
    ):
        flix.combine_adapters({"ann": adapter(), "ben": second})


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_scales_survive_another_scaling(scaling):
    other = "rslora" if scaling == "lora" else "lora"
    first = adapter(0, {"language": ["hau"]}, LAYERS, None, scaling=scaling)
    second = adapter(1, {"task": ["ner"]}, LAYERS, None, scaling=other, ranks=3, alpha=7.0)
    both = flix.combine_adapters([first, second])
    for path in LAYERS:
        assert both.config.scale(path, ("language", "hau")) == first.config.scale(
            path, ("language", "hau")
        )
        wanted = second.config.scale(path, ("task", "ner"))
        assert both.config.scale(path, ("task", "ner")) == pytest.approx(wanted, rel=1e-14)
    more = {"rank_pattern": {"b.q": 1}, "alpha_pattern": {"a.q": 5.0, "emb": {"task": 2}}}
    for given in ({}, {"alpha": 3.0}):
        uneven = adapter(1, {"task": ["ner"]}, LAYERS, None, scaling=other, **more, **given)
        both = flix.combine_adapters([first, uneven])
        for path in LAYERS:
            wanted = uneven.config.scale(path, ("task", "ner"))
            assert both.config.scale(path, ("task", "ner")) == pytest.approx(wanted, rel=1e-14)
            mine = first.config.scale(path, ("language", "hau"))
            assert both.config.scale(path, ("language", "hau")) == mine
    assert both.config.rank("a.b.q", ("task", "ner")) == 1


def test_alphas_by_layer_come_along():
    """Also where a layer has another alpha than the rank, and the feature none of its own."""
    first = adapter(0, {"language": ["hau"]}, LAYERS, None, alpha_pattern={"a.q": 5.0})
    second = adapter(
        1, {"task": ["ner"]}, LAYERS, None, alpha=3, alpha_pattern={"emb": {"task": 7}}
    )
    both = flix.combine_adapters([first, second])
    hau, ner = ("language", "hau"), ("task", "ner")
    assert [both.config.scale(p, hau) for p in LAYERS] == [2.5, 1.0, 1.0]
    assert [both.config.scale(p, ner) for p in LAYERS] == [1.5, 1.5, 3.5]
    renamed = second.renamed({"a.q": "x.emb", "emb": "y"})
    assert [renamed.config.scale(p, ner) for p in ("x.emb", "a.b.q", "y")] == [1.5, 1.5, 3.5]
    bare = first.renamed({"a.q": "z"})
    assert [bare.config.scale(p, hau) for p in ("z", "a.b.q", "emb")] == [2.5, 1.0, 1.0]


def test_renamed_layers_keep_their_own_ranks_even_where_paths_end_alike():
    layers = {"one": LayerShape(3, 3), "x.two": LayerShape(3, 3)}
    given = adapter(0, {"task": ["ner"]}, layers, None, rank_pattern={"one": 1})
    renamed = given.renamed({"one": "q", "x.two": "x.q"})
    assert renamed.config.rank("q", ("task", "ner")) == 1
    assert renamed.config.rank("x.q", ("task", "ner")) == 2


@pytest.mark.parametrize("features", [5, None, "task", [], {}, {"task": 5}, {"task": "ner", "language": 5}])  # fmt: skip
def test_choices_in_no_form_there_is_are_refused(features):
    with pytest.raises(FeatureError, match=r"features are chosen as \[\(group, name\), ...\] or"):
        flix.select_features(adapter(), features)


@pytest.mark.parametrize("given", [5, None, [], {}, [1], {"a": 1}, "ab"])
def test_what_is_no_adapters_is_not_combined(given):
    with pytest.raises(AdapterError, match=r"adapters to combine are \[adapter, ...\] or .*, got"):
        flix.combine_adapters(given)
    with pytest.raises(AdapterError, match="at least one, got Adapter"):
        flix.combine_adapters(adapter())


def test_adapters_of_two_bases_are_not_combined():
    first, second = (replace(adapter(), base=Base(name, None, name)) for name in ("one", "two"))
    with pytest.raises(AdapterError, match=r"adapters are combined on one base: adapter 0 was trained on 'one' .*, adapter 1 on 'two'"):  # fmt: skip
        flix.combine_adapters([first, second])


def test_what_is_said_in_other_words_and_means_the_same_is_no_difference():
    """One says by the group what the other says by each feature."""
    spelled = {("task", name): [("shared", "all")] for name in GROUPS["task"]}
    both = flix.combine_adapters([adapter(), adapter(implies=spelled)])
    assert both.config.registry.implied(both.config.registry.id("task", "ner"))
    ranks = {"language": 2, "task": 0, "shared": 2}
    without = flix.combine_adapters([adapter(ranks=ranks), adapter(ranks=ranks, implies=spelled)])
    assert without.config.rank("a.q", ("task", "ner")) == 0

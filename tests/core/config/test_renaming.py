"""What a configuration says of features that leave, join or are renamed."""

from __future__ import annotations

import pytest

import flix
from flix import FeatureRegistry, FlixConfig

RULES = {("task", "*"): [("shared", "all")]}


GROUPS = {"language": ["hau", "swa"], "task": ["ner", "pos"], "shared": ["all"]}


def registry() -> FeatureRegistry:
    return FeatureRegistry(GROUPS, implies=RULES)


def test_a_configuration_without_a_feature_round_trips():
    config = FlixConfig(
        registry=registry(),
        ranks=flix.ranks.by_group(language=2, task=3, shared=1),
        alpha={"language": 4.0},
        rank_pattern={"q": {"language": {"hau": 5, "swa": 6}, "task": 1}, "emb": 4},
        unknown={"hausa": ["hau", "swa"], "h": "hau"},
        feature_dropout=flix.FeatureDropout(per_group={"task": 0.0}),
    )
    after = config.without_feature("language", "hau")
    assert after.rank("a.q", ("language", "hau")) == 0 == after.rank("emb", ("language", "hau"))
    assert after.rank("a.q", ("language", "swa")) == 6 and after.rank("a.q", ("task", "ner")) == 1
    assert after.unknown == {"hausa": ["swa"]}
    assert after.layout("a.q").ranks[1:] == config.layout("a.q").ranks[1:]
    assert FlixConfig.from_dict(after.to_dict()) == after
    renamed = config.with_renamed("language", "hau", "ha")
    assert renamed.layout("a.q") == config.layout("a.q")
    assert renamed.unknown == {"hausa": ["ha", "swa"], "h": ["ha"]}
    assert FlixConfig.from_dict(renamed.to_dict()) == renamed


def test_a_new_feature_takes_the_alpha_of_its_group():
    config = FlixConfig(registry=registry(), ranks=2, alpha={"language": 8.0, "task": {"ner": 3.0}})
    grown = config.with_feature("language", "yor", rank=4).with_feature("task", "topic", rank=4)
    assert grown.scale("x", ("language", "yor")) == 2.0
    assert grown.scale("x", ("task", "topic")) == 1.0  # its group has no one alpha: its rank
    assert (
        grown.with_feature("language", "ibo", rank=4, alpha=4.0).scale("x", ("language", "ibo"))
        == 1.0
    )


@pytest.mark.parametrize(
    "rule",
    [
        flix.ranks.uniform(3),
        flix.ranks.by_group(language=1, task=2, shared=3),
        flix.ranks.proportional(budget=9, sizes={"language": 5, "task": 9, "shared": 1}),
        flix.ranks.parameter_matched(lora_rank=9),
        flix.ranks.compute_matched(lora_rank=9, datasets=[{"language": "swa", "task": "ner"}]),
    ],
)
def test_rank_rules_pass_over_removed_features(rule):
    after = registry().without_feature("language", "hau")
    assert set(rule(after)) == set(after.live)
    assert FlixConfig(registry=after, ranks=rule).ranks["language", "hau"] == 0


def test_a_part_of_a_configuration_keeps_no_numbers_of_groups_that_are_gone():
    config = FlixConfig(
        registry=registry(),
        ranks=2,
        rank_pattern={"q": {"language": 5, "task": {"ner": 4, "pos": 3}}, "emb": 1},
        feature_dropout=flix.FeatureDropout(0.1, per_group={"language": 0.5, "task": 0.25}),
    )
    part = config.subset([("task", "ner")])
    assert part.registry.features == (("task", "ner"), ("shared", "all"))
    assert part.rank_pattern == {"q": {"task": {"ner": 4}}, "emb": 1}
    assert part.feature_dropout == flix.FeatureDropout(0.1, per_group={"task": 0.25})
    assert FlixConfig.from_dict(part.to_dict()) == part


def test_one_feature_has_an_alpha_of_its_own_where_the_others_have_none():
    config = FlixConfig(registry=registry(), ranks=2)
    grown = config.with_feature("language", "yor", rank=4, alpha=2.0)
    assert grown.scale("x", ("language", "yor")) == 0.5
    assert all(grown.scale("x", feature) == 1.0 for feature in config.registry.features)

"""Configuration: checks, ranks and scales by layer, JSON."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest

from flix import ConfigError, FeatureDropout, FeatureRegistry, FlixConfig, FlixError, ranks

REGISTRY = FeatureRegistry({"language": ["hau", "swa"], "task": ["ner"]})


def config(**changes):
    return FlixConfig(**{"registry": REGISTRY, "ranks": 4, **changes})


def test_scales_and_ranks_by_layer():
    c = config(
        ranks=ranks.by_group(language=2, task=8),
        alpha={"task": 4.0, ("language", "swa"): 3},
        rank_pattern={"q": {"language": 6}, ".*mlp.*": 0},
    )
    assert c.rank("a.k", ("language", "hau")) == 2
    assert c.rank("a.q", ("language", "hau")) == 6 and c.rank("a.q", ("task", "ner")) == 8
    assert c.rank("a.seq", ("language", "hau")) == 2
    assert c.rank("b.mlp.up", ("task", "ner")) == 0 and c.scale("b.mlp.up", ("task", "ner")) == 0
    assert c.scale("a.k", ("task", "ner")) == 0.5 and c.scale("a.k", ("language", "hau")) == 1.0
    assert c.scale("a.q", ("language", "swa")) == 0.5
    r = config(ranks=9, alpha=3.0, scaling="rslora")
    assert r.scale("x", ("task", "ner")) == 1.0
    assert config(ranks=9, scaling="rslora").scale("x", ("task", "ner")) == math.sqrt(9)
    assert c.layout("a.k").ranks == (2, 2, 8)


def test_json_round_trip_of_everything():
    c = config(
        ranks=ranks.explicit({"language": {"hau": 0, "swa": 3}, "task": 5}),
        alpha={"task": 4.0},
        scaling="rslora",
        target_modules=["q", "v"],
        exclude_modules=r".*\.0\..*",
        rank_pattern={"q": {("language", "swa"): 2}, "v": 1},
        feature_dropout=FeatureDropout(0.3, per_group={"task": 0.0}, keep_one=True),
        unknown={"zul": ["hau", "swa"]},
        seed=11,
    )
    again = FlixConfig.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again.to_dict() == c.to_dict()
    for layer in ("q", "v", "k"):
        assert again.layout(layer) == c.layout(layer)
    assert again.feature_dropout == c.feature_dropout


def test_rank_patterns_take_the_form_that_files_have():
    """A group given as a whole speaks for features to come; beside one of its features it is spelled out."""
    mixed = {"language": 4, ("language", "hau"): 8, "task": 2}
    c = config(rank_pattern={"q": mixed, "v": {"language": {"swa": 1}}, "k": np.int64(3)})
    assert c.rank_pattern == {
        "q": {"language": {"hau": 8, "swa": 4}, "task": 2}, "v": {"language": {"swa": 1}}, "k": 3,
    }  # fmt: skip
    again = FlixConfig.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again == c
    renamed = c.with_renamed("language", "hau", "hausa")
    assert renamed.rank_pattern["q"] == {"language": {"hausa": 8, "swa": 4}, "task": 2}
    assert c.without_feature("language", "swa").rank_pattern["v"] == {}
    assert c.with_feature("task", "pos", rank=5).rank("q", ("task", "pos")) == 2


def test_alphas_by_layer():
    """The first pattern that matches the layer and names the feature counts, as for ranks."""
    c = config(
        ranks=4,
        alpha={"task": 2.0},
        scaling="rslora",
        alpha_pattern={"a.q": {"language": 6, ("language", "hau"): 8}, "q": 3, "mlp.*": {"task": np.float32(0.5)}},
        rank_pattern={"mlp.*": 9},
    )  # fmt: skip
    hau, swa, ner = c.registry.features
    assert [c.scale("a.q", f) for f in (hau, swa, ner)] == [4.0, 3.0, 1.5]
    assert [c.scale("b.q", f) for f in (hau, swa, ner)] == [1.5, 1.5, 1.5]
    assert [c.scale("x.mlp.up", f) for f in (hau, swa, ner)] == [3.0, 3.0, 0.5 / 3]
    assert [c.scale("seq", f) for f in (hau, swa, ner)] == [2.0, 2.0, 1.0]
    assert c.layout("b.q").scales == (1.5, 1.5, 1.5)
    again = FlixConfig.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again == c and again.layout("a.q") == c.layout("a.q")
    renamed = c.with_renamed("language", "swa", "swh")
    assert renamed.layout("a.q") == c.layout("a.q")
    assert c.without_feature("language", "hau").layout("a.q").scales == (0.0, 3.0, 1.5)
    assert c.subset([ner]).layout("x.mlp.up").scales == (0.5 / 3,)
    grown = c.with_feature("task", "pos", rank=4, alpha=10.0)
    assert grown.scale("k", ("task", "pos")) == 5.0 and grown.scale("q", ("task", "pos")) == 1.5


def test_what_is_not_said_is_not_written():
    assert not {"alpha_pattern", "lora_dropout", "init"} & {*config(alpha=2.0).to_dict()}
    again = FlixConfig.from_dict(config().to_dict())
    assert again.alpha_pattern == {} and again.lora_dropout == 0.0
    assert FlixConfig.from_dict(config(init="orthogonal").to_dict()).init == "orthogonal"
    told = config(lora_dropout=0.25).to_dict()
    assert FlixConfig.from_dict(told).lora_dropout == told["lora_dropout"] == 0.25


def test_fallbacks_follow_the_names():
    c = config(unknown={"zul": ["hau", "swa"], "fra": "hau"})
    assert c.with_renamed("language", "hau", "ha").unknown == {"zul": ["ha", "swa"], "fra": ["ha"]}
    assert c.without_feature("language", "hau").unknown == {"zul": ["swa"]}
    left = config(unknown={"fra": "hau"}).without_feature("language", "hau")
    assert left.unknown == "error"


def test_with_feature_keeps_everything_else():
    c = config(alpha=8.0)
    grown = c.with_feature("language", "yor", rank=3, alpha=1.5)
    assert grown.layout("x").ranks == (4, 4, 4, 3)
    assert grown.layout("x").scales == (2.0, 2.0, 2.0, 0.5)
    assert len(c.registry) == 3


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"registry": {"language": ["hau"]}}, "registry must be a FeatureRegistry"),
        ({"ranks": "8"}, "ranks must be a rule"),
        ({"ranks": {"language": 4}}, "task=ner has none"),
        ({"ranks": -1}, "whole number of 0 or more"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": {"tsk": 1}}, "no feature group 'tsk'"),
        ({"scaling": "log"}, "scaling must be 'lora' or 'rslora', got 'log'"),
        ({"target_modules": []}, "at least one layer"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": 3}, "string or a list of suffixes"),
        ({"rank_pattern": {"(": 1}}, "not a regular expression"),
        ({"rank_pattern": {"q": {"tsk": 1}}}, "no feature group 'tsk'"),
        ({"rank_pattern": {"q": -1}}, "whole number of 0 or more"),
        ({"rank_pattern": 3}, "rank_pattern must be {pattern: rank or ranks}, got 3"),
        ({"alpha_pattern": [3]}, r"alpha_pattern must be {pattern: alpha or alphas}, got \[3\]"),
        ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\] must be a positive number"),
        ({"alpha_pattern": {"q": {"tsk": 1}}}, "no feature group 'tsk'"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '.' is not a regular expression"),
        (
            {"alpha_pattern": {f"x{i}": 1 for i in range(3000)}},
            "alpha_pattern has more than 2,000 patterns",
        ),
        ({"feature_dropout": 0.2}, "must be a FeatureDropout"),
        ({"feature_dropout": FeatureDropout(0.1, per_group={"x": 0.1})}, "no feature group 'x'"),
        (
            {"lora_dropout": 1.0},
            "rate lora_dropout must be a number from 0 up to, not including, 1, got 1.0",
        ),
        ({"lora_dropout": True}, "rate lora_dropout must be a number"),
        ({"lora_dropout": float("nan")}, "rate lora_dropout must be a number"),
        ({"init": "gaussian"}, "init must be 'uniform' or 'orthogonal', got 'gaussian'$"),
        (
            {"init": "pissa_niter_4"},
            "got 'pissa_niter_4': such a start moves a part of the base's kernels",
        ),
        ({"init": None}, "init must be 'uniform' or 'orthogonal', got None"),
        ({"unknown": "ignore"}, "unknown must be"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(FlixError, match=message):
        config(**changes)


def test_from_dict_refuses_what_it_does_not_know():
    data = config().to_dict()
    with pytest.raises(FlixError, match=r"no setting 'rnaks' .did you mean 'ranks'"):
        FlixConfig.from_dict({**data, "rnaks": 3})
    with pytest.raises(FlixError, match="needs the field 'ranks'"):
        FlixConfig.from_dict({"registry": data["registry"]})


def test_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        config().seed = 3
    with pytest.raises(TypeError):
        FlixConfig(REGISTRY, 4)


@pytest.mark.parametrize("value", [None, 3, True, [], "config"])
def test_a_configuration_is_read_from_a_mapping(value):
    with pytest.raises(ConfigError, match="a configuration is a mapping of its fields, got"):
        FlixConfig.from_dict(value)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"use_rslora": True}, 'which is PEFT\'s: say scaling="rslora"'),
        ({"r": 8}, "say ranks=8 for every feature, or a rule, ranks=flix.ranks.by_group"),
        ({"lora_alpha": 16}, "say alpha"),
        ({"modules_to_save": ["classifier"]}, "unfreeze what else should train after adapt"),
        ({"use_dora": True}, "no such variant"),
        ({"rank": 8}, r"no setting 'rank' \(did you mean 'ranks'\?\); its settings: registry, ranks"),
    ],
)  # fmt: skip
def test_settings_that_there_are_not_say_what_to_type(given, message):
    with pytest.raises(ConfigError, match=message):
        config(**given)
    with pytest.raises(ConfigError, match=message):
        replace(config(), **given)
    with pytest.raises(ConfigError, match=message):
        FlixConfig.from_dict({**config().to_dict(), **given})


def test_the_signature_is_that_of_the_settings():
    names = list(inspect.signature(FlixConfig).parameters)
    assert names == [f.name for f in fields(FlixConfig)]

"""Rank rules: their promises, as properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flix
from flix import FeatureError, FeatureRegistry, RankError, ranks

REGISTRY = FeatureRegistry({"language": ["hau", "swa", "yor"], "task": ["ner", "pos"]})
SIZES = st.lists(st.integers(0, 10**7), min_size=5, max_size=5)


def _sized(values):
    return dict(zip(REGISTRY.features, values, strict=True))


def test_simple_rules():
    assert set(ranks.uniform(8)(REGISTRY).values()) == {8}
    grouped = ranks.by_group(language=4, task=16)(REGISTRY)
    assert grouped[("language", "yor")] == 4 and grouped[("task", "pos")] == 16
    table = {"language": {"hau": 1, "swa": 0, "yor": 3}, "task": {"ner": 2, "pos": 2}}
    assert ranks.explicit(table)(REGISTRY)[("language", "swa")] == 0
    with pytest.raises(RankError, match="must cover every feature; missing: task=ner, task=pos"):
        ranks.by_group(language=4)(REGISTRY)
    with pytest.raises(FeatureError, match="no feature group 'domain'"):
        ranks.by_group(language=4, task=2, domain=1)(REGISTRY)
    with pytest.raises(FeatureError, match="no feature 'zul'"):
        ranks.explicit({("language", "zul"): 1})(REGISTRY)
    for bad in (-1, 1.5, True, "8"):
        with pytest.raises(RankError, match="whole number of 0 or more"):
            ranks.uniform(bad)


def test_a_rule_of_ones_own_is_a_function_of_the_registry():
    def halved(first):
        return lambda registry: {f: first >> registry.groups.index(f[0]) for f in registry.live}

    config = flix.FlixConfig(registry=REGISTRY, ranks=halved(8))
    assert config.ranks["language", "yor"] == 8 and config.ranks["task", "pos"] == 4
    with pytest.raises(RankError, match=r"halved returned <function .*call it first: ranks=halved"):
        flix.FlixConfig(registry=REGISTRY, ranks=halved)
    for wrong in (ranks.by_group, dict):
        with pytest.raises(RankError, match=r"called with the registry.*does not accept that"):
            flix.FlixConfig(registry=REGISTRY, ranks=wrong)
    with pytest.raises(RankError, match="returned None"):
        flix.FlixConfig(registry=REGISTRY, ranks=lambda registry: None)


@settings(max_examples=200, deadline=None)
@given(
    sizes=SIZES,
    budget=st.integers(5, 320),
    temperature=st.floats(0.5, 10),
    bounds=st.tuples(st.integers(0, 1), st.integers(64, 80)),
)
def test_proportional_sums_exactly_within_bounds_and_is_monotone(
    sizes, budget, temperature, bounds
):
    low, high = bounds

    def rule(sizes, budget):
        return ranks.proportional(
            budget=budget, sizes=_sized(sizes), temperature=temperature, minimum=low, maximum=high
        )(REGISTRY)

    found = rule(sizes, budget)
    values = list(found.values())
    assert sum(values) == budget and all(low <= v <= high for v in values)
    for i, n in enumerate(sizes):
        for j, m in enumerate(sizes):
            assert not (n > m and values[i] < values[j])
    more = [*sizes[:2], sizes[2] * 2 + 1, *sizes[3:]]
    assert list(rule(more, budget).values())[2] >= values[2]
    if budget < 5 * high:
        larger = list(rule(sizes, budget + 1).values())
        assert all(after >= before for after, before in zip(larger, values, strict=True))


def test_infeasible_budgets_say_what_is_feasible():
    sizes = {"language": 10, "task": 5}
    with pytest.raises(RankError, match="at least 10, the smallest feasible budget"):
        ranks.proportional(budget=9, sizes=sizes, minimum=2)(REGISTRY)
    with pytest.raises(RankError, match="at most 20, the largest feasible budget"):
        ranks.proportional(budget=21, sizes=sizes, maximum=4)(REGISTRY)
    with pytest.raises(RankError, match="sizes must name every feature; missing: task=ner"):
        ranks.proportional(budget=50, sizes={"language": 10})(REGISTRY)
    with pytest.raises(RankError, match="at least 5, the smallest feasible lora_rank"):
        ranks.parameter_matched(lora_rank=4)(REGISTRY)
    with pytest.raises(RankError, match=r"dataset 1 .*; the smallest feasible lora_rank is 3"):
        ranks.compute_matched(
            lora_rank=2, datasets=[{"task": "ner"}, {"language": ["hau", "swa"], "task": "ner"}]
        )(REGISTRY)
    with pytest.raises(RankError, match="at least one dataset"):
        ranks.compute_matched(lora_rank=2, datasets=[])


DATASET = st.fixed_dictionaries(
    {},
    optional={
        "language": st.lists(st.sampled_from(["hau", "swa", "yor"]), unique=True, max_size=3),
        "task": st.sampled_from(["ner", "pos"]),
    },
)


@settings(max_examples=100, deadline=None)
@given(datasets=st.lists(DATASET, min_size=1, max_size=6), lora_rank=st.integers(4, 40))
def test_compute_matched_never_exceeds_and_wastes_nothing(datasets, lora_rank):
    found = ranks.compute_matched(lora_rank=lora_rank, datasets=datasets)(REGISTRY)
    sums = []
    used = set()
    for ids in REGISTRY.encode(datasets).ids:
        active = [REGISTRY.features[i] for i in ids if i >= 0]
        used.update(active)
        sums.append((sum(found[f] for f in active), active))
    assert all(total <= lora_rank for total, _ in sums)
    for feature in used:  # no feature could have one rank more
        assert any(total == lora_rank for total, active in sums if feature in active)


def _raised_one_by_one(registry, datasets, lora_rank):
    """The rule as it is promised: ranks rise in turn, group after group, while every dataset has room."""
    active = [{int(i) for i in ids if i >= 0} for ids in registry.encode(datasets).ids]
    room, found = [lora_rank] * len(active), [0] * len(registry)
    order = [i for group in registry.groups for i in registry.ids_of(group)]
    rising = True
    while rising:
        rising = False
        for i in order:
            mine = [n for n, ids in enumerate(active) if i in ids]
            if mine and all(room[n] for n in mine):
                found[i], rising = found[i] + 1, True
                for n in mine:
                    room[n] -= 1
    return {registry.features[i]: rank for i, rank in enumerate(found) if rank}


WIDE = FeatureRegistry({g: [f"{g}{i}" for i in range(4)] for g in "abc"})
ROWS = st.fixed_dictionaries(
    {}, optional={g: st.lists(st.sampled_from(WIDE.names(g)), min_size=1, unique=True) for g in "abc"}
).filter(bool)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(datasets=st.lists(ROWS, min_size=1, max_size=8), lora_rank=st.integers(12, 90))
def test_compute_matched_raises_ranks_in_turn(datasets, lora_rank):
    found = ranks.compute_matched(lora_rank=lora_rank, datasets=datasets)(WIDE)
    wanted = _raised_one_by_one(WIDE, datasets, lora_rank)
    assert {feature: found[feature] for feature in wanted} == wanted


def test_compute_matched_takes_no_longer_for_large_ranks():
    datasets = [{"language": "hau", "task": "ner"}, {"language": ["swa", "yor"], "task": "ner"}]
    found = ranks.compute_matched(lora_rank=10**9, datasets=datasets)(REGISTRY)
    assert found["language", "swa"] == 333_333_334
    assert found["task", "ner"] == found["language", "yor"] == 333_333_333
    assert found["language", "hau"] == 666_666_667


@given(lora_rank=st.integers(5, 500))
def test_parameter_matched_spends_the_whole_budget(lora_rank):
    found = ranks.parameter_matched(lora_rank=lora_rank)(REGISTRY)
    assert sum(found.values()) == lora_rank
    assert max(found.values()) - min(found.values()) <= 1


def test_rules_count_implied_features():
    registry = FeatureRegistry(
        {"task": ["ner"], "shared": ["all"]}, implies={("task", "ner"): [("shared", "all")]}
    )
    rule = flix.ranks.compute_matched(lora_rank=9, datasets=[{"task": "ner"}])
    assert rule(registry) == {("task", "ner"): 5, ("shared", "all"): 4}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks.proportional(budget=9, sizes={}, minimum=3, maximum=2), "minimum must not exceed maximum, got 3 and 2"),
        (lambda: ranks.proportional(budget=9, sizes={"language": -1, "task": 2})(REGISTRY), "the size of language=hau must be 0 or more, got -1"),
        (lambda: ranks.proportional(budget=9, sizes=5)(REGISTRY), "sizes must be a mapping by feature or by group, got 5"),
        (lambda: ranks.proportional(budget=9, sizes={"task": 5})(REGISTRY), "sizes must name every feature; missing: language=hau, "),
        (lambda: ranks.explicit({("task", "ner"): 1, "task=ner": 2})(REGISTRY), "explicit ranks give task=ner twice"),
    ],
)  # fmt: skip
def test_numbers_by_feature_that_are_refused(call, message):
    with pytest.raises(RankError, match=message):
        call()


def test_a_group_that_is_given_twice_is_refused():
    registry = FeatureRegistry({"t\u00e9": ["x"]})
    with pytest.raises(RankError, match="give the group 't\u00e9' twice, in two Unicode forms"):
        ranks.explicit({"t\u00e9": 1, "te\u0301": 2})(registry)


class Unreadable:
    """A rule as those written in C are: nobody can read how it is called."""

    def __init__(self, found):
        self.found = found

    @property
    def __signature__(self):
        raise ValueError("no signature found")

    def __call__(self, registry):
        if self.found is None:
            raise TypeError("this takes nothing")
        return self.found


def test_a_rule_without_a_readable_signature_is_simply_called():
    assert set(flix.FlixConfig(registry=REGISTRY, ranks=Unreadable(3)).ranks.values()) == {3}
    for found, message in (
        (None, r"does not accept that \(this takes nothing\)"),
        ("x", "returned 'x'"),
    ):
        with pytest.raises(RankError, match=message):
            flix.FlixConfig(registry=REGISTRY, ranks=Unreadable(found))

"""Losses and clipping, feature by feature."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from flix import ConfigError, FeatureError, RoutingError, TargetError  # noqa: E402
from flix.backends.torch import clip_grad_norm_by_feature_, losses_by_feature  # noqa: E402
from tests.helpers.registry import registry  # noqa: E402
from tests.helpers.torch import adapted, parameters_of  # noqa: E402

ROWS = [{"task": "pos"}, {"task": "ner", "language": "hau"}, {"language": "swa"}, {"task": "pos"}]


def test_each_feature_gets_the_mean_over_its_own_rows():
    routing = registry().encode(ROWS)
    losses = torch.arange(1.0, 5.0).requires_grad_()
    found = losses_by_feature(losses, routing, "task")
    assert {name: value.item() for name, value in found.items()} == {"ner": 2.0, "pos": 2.5}
    sum(found.values()).backward()
    assert losses.grad.tolist() == [0.5, 1.0, 0.0, 0.5]
    assert list(losses_by_feature(losses, routing, "language")) == ["hau", "swa"]
    ids = torch.from_numpy(routing.ids)
    again = losses_by_feature(losses, ids, "task", registry=registry())
    assert [v.item() for v in again.values()] == [2.0, 2.5]


def test_counts_weigh_tokens_and_what_counts_for_nothing_is_left_out():
    routing = registry().encode(ROWS)
    losses = torch.arange(1.0, 9.0).view(4, 2)
    counts = torch.tensor([[1, 0], [0, 0], [1, 1], [2, 1]])
    losses[1] = math.nan  # where nothing counts nothing is looked at
    found = losses_by_feature(losses.requires_grad_(), routing, "task", counts=counts)
    assert list(found) == ["pos"]
    assert found["pos"].item() == pytest.approx((1 + 2 * 7 + 8) / 4)
    found["pos"].backward()
    assert losses.grad.tolist() == [[0.25, 0], [0, 0], [0, 0], [0.5, 0.25]]


def test_a_loss_that_is_not_finite_stays_with_its_feature():
    losses = torch.tensor([1.0, math.inf, 3.0, 4.0], requires_grad=True)
    found = losses_by_feature(losses, registry().encode(ROWS), "task")
    assert (found["ner"].item(), found["pos"].item()) == (math.inf, 2.5)


def test_losses_that_do_not_fit_are_refused():
    routing = registry().encode(ROWS)
    with pytest.raises(RoutingError, match=r"an entry for each row, \[4\] or \[4, length\], got \[\]"):  # fmt: skip
        losses_by_feature(torch.tensor(1.0), routing, "task")
    with pytest.raises(RoutingError, match=r"got \[3\]; take them before any mean"):
        losses_by_feature(torch.ones(3), routing, "task")
    with pytest.raises(RoutingError, match=r"counts must have the shape of losses, \[4\], got"):
        losses_by_feature(torch.ones(4), routing, "task", counts=torch.ones(4, 1))
    with pytest.raises(
        RoutingError, match="ids alone do not say to which registry they belong: give registry="
    ):
        losses_by_feature(torch.ones(4), torch.from_numpy(routing.ids), "task")


def with_gradients():
    model = adapted()
    for parameter in parameters_of(model).values():
        parameter.grad = torch.randn_like(parameter)
    return model, parameters_of(model)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_each_gradient_is_clipped_by_its_own_norm_as_torch_clips_one(norm_type):
    model, own = with_gradients()
    own["language", "zul"].grad = None
    own["task", "pos"].grad[3] = math.nan
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 9.0)
    twins = {f: torch.nn.Parameter(p.detach().clone()) for f, p in own.items()}
    expected = {}
    limits = {"language": 0.5, "task": 1e6, ("language", "swa"): 0.25}
    for feature, twin in twins.items():
        if own[feature].grad is not None:
            twin.grad = own[feature].grad.clone()
            limit = limits.get(feature, limits[feature[0]])
            expected[feature] = torch.nn.utils.clip_grad_norm_([twin], limit, norm_type)
    norms = clip_grad_norm_by_feature_(model, limits, norm_type)
    assert list(norms) == list(expected)
    for feature, norm in norms.items():
        assert torch.allclose(norm, expected[feature], rtol=1e-14, atol=0, equal_nan=True)
        found, wanted = own[feature].grad, twins[feature].grad
        assert torch.allclose(found, wanted, rtol=1e-14, atol=0, equal_nan=True)
        assert bool(found.isfinite().all()) == (feature != ("task", "pos"))
    assert bool((model.lm_head.weight.grad == 9.0).all())


def test_features_that_are_not_named_are_not_clipped():
    model, own = with_gradients()
    before = {f: p.grad.clone() for f, p in own.items()}
    norms = clip_grad_norm_by_feature_(model, {("task", "ner"): 1e-3})
    assert set(norms) == set(before)
    assert [f for f, p in own.items() if not torch.equal(p.grad, before[f])] == [("task", "ner")]


def test_mistakes_in_clipping_are_named():
    model, own = with_gradients()
    before = own["task", "pos"].grad.clone()
    own["task", "ner"].grad[0] = math.inf
    with pytest.raises(RuntimeError, match="the gradients of task=ner are not finite"):
        clip_grad_norm_by_feature_(model, 0.1, error_if_nonfinite=True)
    assert torch.equal(own["task", "pos"].grad, before)
    with pytest.raises(FeatureError, match="no feature group 'tsak'"):
        clip_grad_norm_by_feature_(model, {"tsak": 1.0})
    with pytest.raises(FeatureError, match="has no feature 'pso'"):
        clip_grad_norm_by_feature_(model, {("task", "pso"): 1.0})
    with pytest.raises(ConfigError, match=r"max_norm names features as \(group, name\), or groups, got 3"):  # fmt: skip
        clip_grad_norm_by_feature_(model, {3: 1.0})
    with pytest.raises(ConfigError, match="max_norm must be a positive number, got 0"):
        clip_grad_norm_by_feature_(model, 0)
    with pytest.raises(TargetError, match="needs an adapted model"):
        clip_grad_norm_by_feature_(torch.nn.Linear(2, 2), 1.0)

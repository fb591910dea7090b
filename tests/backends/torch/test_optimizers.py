"""Groups for an optimizer."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flix import ConfigError, TargetError  # noqa: E402
from flix.backends.torch import adapt, freeze, parameter_groups, trainable_parameters  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.torch import parameters_of, routing  # noqa: E402


def model(head=True):
    made = adapt(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2)), config(target_modules=["0"]))  # fmt: skip
    made[1].requires_grad_(head)
    return made


def test_groups_follow_the_features_groups():
    made = model()
    found = parameter_groups(
        made, lr={"language": 2e-3, "task": 5e-3, "heads": 1e-4}, weight_decay={"task": 0.1}
    )
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in found] == [
        ("language", 2e-3, 0.0), ("task", 5e-3, 0.1), ("heads", 1e-4, 0.0)
    ]  # fmt: skip
    own = parameters_of(made)
    assert found[0]["params"] == [own["language", name] for name in ("hau", "swa", "zul")]
    assert found[1]["params"] == [own["task", name] for name in ("ner", "pos")]
    assert found[2]["params"] == list(made[1].parameters())
    given = {id(p) for group in found for p in group["params"]}
    assert given == {id(p) for p in trainable_parameters(made)}


def test_an_optimizer_takes_them_and_moves_each_group_at_its_rate():
    made = model(head=False)
    optimizer = torch.optim.SGD(parameter_groups(made, lr={"language": 0.0, "task": 1.0}))
    before = {f: p.detach().clone() for f, p in parameters_of(made).items()}
    made(torch.ones(4, 6), flix_features=routing()[0]).sum().backward()
    optimizer.step()
    moved = {f[0] for f, p in parameters_of(made).items() if not torch.equal(p, before[f])}
    assert moved == {"task"}


def test_one_rate_serves_all_and_what_is_frozen_is_left_out():
    made = model(head=False)
    freeze(made, {"language": ["hau", "swa", "zul"], "task": "ner"})
    (group,) = parameter_groups(made, 0.01, weight_decay=0.2)
    assert (group["name"], group["lr"], group["weight_decay"]) == ("task", 0.01, 0.2)
    assert group["params"] == [parameters_of(made)["task", "pos"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": {"language": 1e-3, "tsak": 1e-3}}, r"lr names the group 'tsak' \(did you mean 'task'\?\); valid groups: language, task, heads"),
        ({"lr": {"language": 1e-3, "heads": 1e-3}}, r"lr must name every group that trains, but 'task' is missing"),
        ({"lr": 1e-3, "weight_decay": {"head": 0.1}}, r"weight_decay names the group 'head'"),
        ({"lr": -1.0}, r"lr of 'language' must be a finite number of at least 0, got -1.0"),
        ({"lr": {"language": True, "task": 1, "heads": 1}}, r"lr of 'language' must be .* got True"),
        ({"lr": 1e-3, "weight_decay": float("nan")}, r"weight_decay of 'language' must be"),
    ],
)  # fmt: skip
def test_mistakes_name_the_group_and_the_valid_ones(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parameter_groups(model(), **arguments)


def test_a_plain_model_has_no_groups():
    with pytest.raises(TargetError, match="parameter_groups needs an adapted model"):
        parameter_groups(torch.nn.Linear(2, 2), 1e-3)

"""Weights of a new combination, found from a model's examples."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix import ConfigError, TargetError  # noqa: E402
from flix.backends.torch import adapt, search_weights  # noqa: E402
from tests.helpers.registry import config, registry  # noqa: E402
from tests.helpers.searching import GOAL, assert_goal_found  # noqa: E402
from tests.helpers.torch import randomize  # noqa: E402

X = torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.drop, self.down = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x, labels=None):
        y = self.down(self.drop(torch.tanh(self.up(x))))
        return {"logits": y, "loss": None if labels is None else (y - labels).square().mean()}


def made():
    model = adapt(Net(), config(target_modules=["up", "down"]))
    randomize(model, std=0.5)
    return model


def examples(model):
    model.eval()
    with torch.no_grad():
        routing = registry().encode([GOAL] * len(X))
        y = model(X, flix_features=routing)["logits"]
    model.train()
    return {"x": X, "labels": y}


@pytest.mark.parametrize("method", ["gradient", "evolution"])
def test_the_weights_that_made_the_examples_are_found(method):
    model = made()
    batch = examples(model)
    found = search_weights(
        model, batch, {"task": "ner"}, groups=["language"], method=method, steps=80, l1=0.0
    )
    assert_goal_found(found)


def test_batches_count_by_their_rows():
    model = made()
    batch = examples(model)
    parts = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 5), slice(5, 32))]
    whole = search_weights(model, batch, {"task": "ner"}, steps=5)
    split = search_weights(model, parts, {"task": "ner"}, steps=5)
    assert split.loss == pytest.approx(whole.loss, rel=1e-4)
    assert split.before == pytest.approx(whole.before, rel=1e-4)


def test_the_model_is_as_before():
    model = made()
    batch = examples(model)
    model.down.eval()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    search_weights(model, batch, {"task": "ner"}, steps=3)
    with pytest.raises(ZeroDivisionError):
        search_weights(model, batch, {"task": "ner"}, loss=lambda *_: 1 / 0)
    for name, parameter in model.named_parameters():
        value, trains = before[name]
        assert (
            torch.equal(parameter, value)
            and parameter.requires_grad is trains
            and parameter.grad is None
        )
    assert model.training and model.drop.training and not model.down.training


def test_losses_of_ones_own():
    model = made()
    batch = examples(model)
    labels = batch.pop("labels")
    found = search_weights(
        model,
        batch,
        {"task": "ner"},
        loss=lambda outputs, _: (outputs["logits"] - labels).abs().mean(),
        steps=5,
    )
    assert found.loss < found.before
    wrong = search_weights(
        model,
        batch,
        {"task": "ner"},
        method="evolution",
        steps=3,
        loss=lambda outputs, _: (outputs["logits"] > 0).ne(labels > 0).float().mean(),
    )
    assert 0 <= wrong.loss <= wrong.before


@pytest.mark.parametrize(
    "given,message",
    [
        ({"examples": {"x": X}}, "hold no loss"),
        ({"examples": {}}, "hold no rows"),
        ({"examples": [X]}, "batches of the model's inputs by name"),
        ({"examples": {"x": X, "flix_features": [[0]]}}, "leave 'flix_features' out"),
        ({"method": "guess"}, "'gradient' or 'evolution'"),
    ],
)
def test_mistakes_are_named(given, message):
    model = made()
    settings = {"examples": examples(model), "row": {"task": "ner"}, **given}
    with pytest.raises(ConfigError, match=message):
        search_weights(model, **settings)
    with pytest.raises(TargetError, match="search_weights"):
        search_weights(Net(), {"x": X}, {"task": "ner"})


@pytest.mark.parametrize("length", range(5, 15))
def test_slots_as_many_as_tokens_are_not_taken_for_tokens(length):
    # The first forward of a model is watched: a lookup among its features' slots is no choice among its tokens.
    model = made()
    batch = {"x": torch.randn(1, length, 8), "labels": torch.zeros(1, length, 4)}
    search_weights(model, batch, {"task": "ner"}, groups=["language"], steps=1)
    assert model.flix_state.marks == {}

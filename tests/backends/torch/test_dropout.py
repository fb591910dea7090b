"""Dropout on the low-rank path (docs/specification.md §1.8): the base sees its input whole, the features do not."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn  # noqa: E402

from flix import ConfigError  # noqa: E402
from flix.backends.torch import FlixLinear, adapt, load, save  # noqa: E402
from tests.helpers.mixtures import make  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.torch import layer_pairs, llama, parameters_of, randomize, routing  # noqa: E402

RATE = 0.4


class Doubled(nn.Linear):
    """With a forward of its own, which is called."""

    def forward(self, x):
        return super().forward(x) * 2


class Two(nn.Module):
    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.a, self.b = kind(6, 8), kind(8, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def adapted(kind=nn.Linear, strategy="auto", model=Two, **changes):
    torch.manual_seed(0)
    model = adapt(
        model(kind) if model is Two else model(),
        config(lora_dropout=RATE, **changes),
        strategy=strategy,
    )
    randomize(model, std=0.5)
    return model


def dense(layer, base, x, dropped, ids, weights):
    """By the formula: the base of x plus the features' sum over what is left of it."""
    y = base(x)
    scale = layer.flix_config.scale
    pairs, features = layer_pairs(layer), layer.flix_config.registry.features
    for row in range(len(ids)):
        for i, w in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            if i >= 0 and features[i] in pairs:
                a, b = pairs[features[i]]
                update = w * scale(layer.flix_name, features[i]) * dropped[row] @ a.T @ b.T
                y = torch.cat([y[:row], (y[row] + update)[None], y[row + 1 :]])
    return y


@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
@pytest.mark.parametrize("kind", [nn.Linear, Doubled])
def test_the_features_alone_see_less(kind, strategy):
    """One mask for all features of a row, drawn by torch's generator as nn.Dropout draws it; gradients follow it."""
    model, (ids, weights) = adapted(kind, strategy).double(), routing()
    x = torch.randn(len(ids), 3, 6, dtype=torch.float64)
    given, wanted_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain = {name: _plain(getattr(model, name), kind) for name in "ab"}
    torch.manual_seed(7)
    y = model(given, flix_features=ids, flix_weights=weights)
    torch.manual_seed(7)
    h = wanted_x
    for name in "ab":
        layer = getattr(model, name)
        h = dense(layer, plain[name], h, nn.functional.dropout(h, RATE), ids, weights)
        h = torch.tanh(h) if name == "a" else h
    torch.testing.assert_close(y, h)
    found = torch.autograd.grad(
        y.square().sum(), [given, *parameters_of(model).values()], allow_unused=True
    )
    (other,) = torch.autograd.grad(h.square().sum(), [wanted_x])
    torch.testing.assert_close(found[0], other)
    assert not torch.equal(y, model(x, flix_features=ids, flix_weights=weights))


def _plain(layer, kind):
    made = kind(layer.in_features, layer.out_features, dtype=torch.float64)
    made.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return made


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_gradients_of_the_pairs_are_those_of_the_masked_input(strategy):
    """Through differences: with the generator at one place, the loss is a smooth function of the pairs."""
    model, (ids, weights) = adapted(strategy=strategy).double(), routing()
    x = torch.randn(len(ids), 3, 6, dtype=torch.float64)

    def loss():
        torch.manual_seed(3)
        return model(x, flix_features=ids, flix_weights=weights.double()).square().sum()

    loss().backward()
    for parameter in parameters_of(model).values():
        if parameter.grad is None:  # of a feature that no row has
            continue
        grad, direction = parameter.grad, torch.randn_like(parameter)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(loss())
                parameter.add_(direction, alpha=-step)
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)


def test_evaluation_and_a_rate_of_nothing_are_as_ever():
    model, (ids, weights) = adapted().eval(), routing()
    plain = copy.deepcopy(model)
    plain.flix_state.config = config()
    x = torch.randn(len(ids), 3, 6)
    before = torch.get_rng_state()
    given = {"flix_features": ids, "flix_weights": weights}
    for train in (False, True):
        plain.train(train)
        assert torch.equal(model(x, **given), plain(x, **given))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn


def test_generation_in_training_mode_drops_and_keeps_nothing():
    """A layer that prepared a token in evaluation does not serve it in training."""
    model, (ids, weights) = adapted(), routing()
    with torch.no_grad():
        x = torch.randn(len(ids), 1, 6)
        outputs = [model(x, flix_features=ids, flix_weights=weights) for _ in range(3)]
        assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
        model.eval()
        outputs = [model(x, flix_features=ids, flix_weights=weights) for _ in range(3)]
        assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_has_the_same_mask(reentrant):
    grads = []
    for again in (False, True):
        model, (ids, weights) = adapted(model=llama), routing()
        model.train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tokens = torch.randint(0, 20, (len(ids), 5), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(5)
        out = model(input_ids=tokens, flix_features=ids, flix_weights=weights).logits
        out.square().sum().backward()
        grads.append({f: p.grad for f, p in parameters_of(model).items()})
    for feature, grad in grads[0].items():
        torch.testing.assert_close(grads[1][feature], grad)


def test_compiled_models_drop_in_training_alone():
    model, (ids, weights) = adapted(), routing()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x, given = torch.randn(len(ids), 3, 6), {"flix_features": ids, "flix_weights": weights}
    torch.manual_seed(2)
    y = model(x, **given)
    torch.manual_seed(2)
    torch.testing.assert_close(compiled(x, **given), y)
    assert not torch.allclose(compiled(x, **given), y)
    model.eval()
    torch.testing.assert_close(compiled(x, **given), model(x, **given))


def test_autocast_and_a_layer_by_hand():
    layer = FlixLinear(6, 5, config=config(lora_dropout=RATE), name="q")
    with torch.no_grad():
        for _, _, b in layer.pairs():
            b.normal_()
    ids, weights = routing()
    x = torch.randn(len(ids), 6)
    torch.manual_seed(1)
    y = layer(x, ids, weights)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x, ids, weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.1)
    assert not torch.equal(layer(x, ids, weights), y)


def test_it_is_saved_and_goes_on_acting(tmp_path):
    model = adapted()
    save(model, tmp_path / "a")
    again = load(Two(), tmp_path / "a")
    assert again.flix_config.lora_dropout == RATE
    ids, weights = routing()
    x = torch.randn(len(ids), 6)
    outputs = [again(x, flix_features=ids, flix_weights=weights) for _ in range(2)]
    assert not torch.equal(*outputs)


def test_experts_are_refused_by_name(tmp_path):
    """PEFT refuses them, too. A file that says so is read, for evaluation."""
    settings = {"target_modules": r".*experts\..*", "ranks": 1}
    with pytest.raises(
        ConfigError, match=r"lora_dropout=0\.4.* is not possible: .*experts.*exclude_modules"
    ):
        adapt(make("mixtral"), config(lora_dropout=RATE, **settings))
    model = adapt(make("mixtral"), config(**settings))
    model.flix_state.config = config(lora_dropout=RATE, **settings)
    save(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"cannot be trained further as it was: lora_dropout=0\.4"):
        again = load(make("mixtral"), tmp_path / "a").eval()
    ids, weights = routing()
    tokens = torch.randint(0, 20, (len(ids), 5))
    again(input_ids=tokens, flix_features=ids, flix_weights=weights)
    with pytest.raises(ConfigError, match=r"lora_dropout=0\.4.* is not possible"):
        again.train()(input_ids=tokens, flix_features=ids, flix_weights=weights)


def test_convolutions_drop_their_image():
    torch.manual_seed(0)
    model = adapt(
        nn.Sequential(nn.Conv2d(3, 4, 3)), config(lora_dropout=RATE, target_modules=["0"])
    )
    randomize(model, std=0.5)
    plain = copy.deepcopy(model)
    plain.flix_state.config = config()
    ids, weights = routing()
    x, given = torch.randn(len(ids), 3, 6, 6), {"flix_features": ids, "flix_weights": weights}
    base = nn.Conv2d(3, 4, 3)
    base.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
    torch.manual_seed(4)
    y = model(x, **given)
    torch.manual_seed(4)
    less = nn.functional.dropout(x, RATE)
    torch.testing.assert_close(y, base(x) + plain(less, **given) - base(less), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.eval()(x, **given), plain.eval()(x, **given))

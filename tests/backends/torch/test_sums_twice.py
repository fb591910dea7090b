"""Gradients of gradients, and torch.func: the numbers of the merged models, or an error that says why not."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch.func import functional_call, grad, hessian, vmap  # noqa: E402

import flix  # noqa: E402
from flix.backends.torch import adapt, merge  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import parameters_of, randomize  # noqa: E402

ROWS = [{"language": "hau", "task": "ner"}, {"language": {"swa": 0.5}, "task": "pos"}]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 5)
        self.q = torch.nn.Linear(5, 6)
        self.k = torch.nn.Linear(6, 4)

    def forward(self, tokens, x):
        return self.k(torch.tanh(self.q(self.embed(tokens) + x)))


def _model(strategy="auto"):
    torch.manual_seed(0)
    model = adapt(Net().double(), config(target_modules=["embed", "q", "k"]), strategy=strategy)
    randomize(model, std=0.5)
    return model


def _inputs():
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.tensor([[1, 2, 3], [4, 5, 1]]), x


def _routing(model):
    encoded = model.flix_config.registry.encode(ROWS)
    return {
        "flix_features": torch.from_numpy(encoded.ids),
        "flix_weights": torch.from_numpy(encoded.weights).double(),
    }


def _penalty(model, x, **routing):
    """How much the outputs change with the input, and its gradient."""
    tokens, _ = _inputs()
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(tokens, x, **routing).square().sum(), x, create_graph=True)
    return slope.square().sum(), slope


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_a_gradient_penalty_trains_the_features(strategy):
    model, (tokens, x) = _model(strategy), _inputs()
    routing = _routing(model)
    loss, slope = _penalty(model, x, **routing)
    for i, row in enumerate(ROWS):
        own = x[i : i + 1].clone().requires_grad_()
        plain = merge(model, row)
        (wanted,) = torch.autograd.grad(plain(tokens[i : i + 1], own).square().sum(), own)
        assert_close(slope[i : i + 1], wanted)
    loss.backward()
    for feature, parameter in parameters_of(model).items():
        if feature[1] not in ("hau", "ner", "swa", "pos"):
            assert parameter.grad is None
            continue
        # The slope of the penalty along the gradient, by differences.
        direction = parameter.grad / parameter.grad.norm()
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
            ends.append(float(_penalty(model, x, **routing)[0].detach()))
            with torch.no_grad():
                parameter.add_(direction, alpha=-step)
        assert abs((ends[0] - ends[1]) / 2e-6 - float(parameter.grad.norm())) < 1e-4 * ends[0]


def test_first_gradients_under_create_graph_are_the_plain_ones():
    model, (tokens, x) = _model(), _inputs()
    weights = _routing(model)
    found = []
    for again in (False, True):
        w = weights["flix_weights"].clone().requires_grad_()
        chosen = [
            p for f, p in parameters_of(model).items() if f[1] in ("hau", "swa", "ner", "pos")
        ]
        y = model(tokens, x, flix_features=weights["flix_features"], flix_weights=w).square().sum()
        found.append(torch.autograd.grad(y, [w, *chosen], create_graph=again))
    for one, other in zip(*found, strict=True):
        assert_close(one, other.detach())


@pytest.mark.parametrize("given", ["batched", "one row", "list"])
def test_per_sample_gradients(given):
    model, (tokens, x) = _model(), _inputs()
    routing = _routing(model)
    if given != "batched":
        routing = {k: v[:1].expand(2, -1) for k, v in routing.items()}
    held = {n: p.detach() for n, p in model.named_parameters() if n.startswith("flix_bank.")}

    def loss(values, tokens, x, ids, weights):
        kept = {"flix_features": ids[None], "flix_weights": weights[None]}
        if given == "list":
            kept = {"flix_features": routing["flix_features"][:1].tolist()}
        return functional_call(model, values, (tokens[None], x[None]), kept).square().sum()

    batched = 0 if given == "batched" else None
    ids, weights = (v if batched == 0 else v[0] for v in routing.values())
    each = vmap(grad(loss), in_dims=(None, 0, 0, batched, batched))(held, tokens, x, ids, weights)
    for i in range(2):
        model.zero_grad()
        part = {k: v[i : i + 1] for k, v in routing.items()}
        model(tokens[i : i + 1], x[i : i + 1], **part).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in held:
                wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                assert_close(each[name][i], wanted, name=name)


def test_hessians_by_torch_func_are_those_of_the_merged_model():
    model, (tokens, x) = _model(), _inputs()
    ids = _routing(model)["flix_features"][:1]
    found = hessian(lambda v: model(tokens[:1], v, flix_features=ids).square().sum())(x[:1])
    plain = merge(model, ROWS[0])
    assert_close(found, hessian(lambda v: plain(tokens[:1], v).square().sum())(x[:1]))


def test_the_kernels_operator_refuses_with_the_cause():
    model, (tokens, x) = _model(), _inputs()
    compiled = torch.compile(model, backend="eager")
    x = x.requires_grad_()
    y = compiled(tokens, x, **_routing(model)).square().sum()
    with pytest.raises(flix.ConfigError, match=r"gradients of gradients .* use the eager model"):
        torch.autograd.grad(y, x, create_graph=True)

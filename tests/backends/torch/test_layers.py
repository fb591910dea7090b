"""Layers by hand: shapes, per-token routing, strategies, errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flix  # noqa: E402
from flix import ConfigError, RoutingError  # noqa: E402
from flix.backends.torch import FlixEmbedding, FlixLinear, adapt, merge, route  # noqa: E402
from tests.helpers.dense import by_id, dense  # noqa: E402
from tests.helpers.registry import ROWS, config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import randomize, routing  # noqa: E402


def _fill(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def _linear(strategy="auto", **changes):
    layer = FlixLinear(6, 5, config=config(**changes), name="layer", strategy=strategy)
    return _fill(layer.double())


def _expected(layer, x, ids, weights):
    pairs = by_id(layer.flix_config, layer.pairs())
    return dense(x, ids, pairs, weights, kernel=layer.weight, bias=layer.bias).y


@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 6), (4, 3, 6), (4, 2, 3, 6)])
def test_linear_equals_the_formula(shape, scaling, strategy):
    layer = _linear(strategy, scaling=scaling)
    ids, weights = routing()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = layer(x, flix_features=ids, flix_weights=weights)
    expected = _expected(layer, x, ids, weights)
    assert_close(found, expected)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_layers_of_two_precisions_in_one_model_keep_theirs(first):
    """One routing serves both; the factors of the one, thirds in float32, are too coarse for the other."""
    second = {torch.float32: torch.float64, torch.float64: torch.float32}[first]
    layers = [torch.nn.Linear(6, 6).to(dtype) for dtype in (first, second)]
    model = adapt(torch.nn.ModuleList(layers), config(ranks={"language": 3, "task": 3}))
    _fill(model)
    ids = registry().encode([{"language": "hau", "task": "pos"}, {"task": "ner"}]).ids
    with route(registry(), ids, torch.full(ids.shape, 1 / 3, dtype=torch.float64)):
        for layer, dtype in zip(model, (first, second), strict=True):
            x = torch.randn(2, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
            weights = np.full(ids.shape, 1 / 3)
            expected = _expected(layer, x, torch.from_numpy(ids), torch.from_numpy(weights))
            assert_close(layer(x), expected, dtype=dtype)
            if dtype == torch.float64:
                found = layer(x).detach().numpy()
                assert np.abs(found - np.asarray(expected)).max() < 1e-10


@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
def test_per_token_routing_equals_the_formula_forward_and_backward(strategy):
    layer = _linear(strategy)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(-1, len(registry()), (2, 5, 3)))
    weights = torch.from_numpy(rng.normal(size=(2, 5, 3))).requires_grad_()
    x = torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_()
    found = layer(x, flix_features=ids, flix_weights=weights)
    expected = _expected(layer, x, ids, weights)
    assert_close(found, expected)
    assert torch.autograd.gradcheck(
        lambda x, w: layer(x, flix_features=ids, flix_weights=w), (x, weights)
    )


@pytest.mark.parametrize("strategy", ["gather", "masked", "single"])
def test_gradcheck_of_every_input(strategy):
    rows = [ROWS[1]] * 3 if strategy == "single" else ROWS[:3]
    layer = _linear(strategy)
    ids, weights = routing(rows)
    weights = weights.double().requires_grad_()
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    layer.requires_grad_(True)
    used = [layer.flix_bank.parameter(("task", "pos")), layer.weight, layer.bias]

    def run(x, w, *params):
        return layer(x, flix_features=ids, flix_weights=w)

    if strategy == "single":  # a weight moved by itself would make the rows differ
        weights.requires_grad_(False)
    assert torch.autograd.gradcheck(run, (x, weights, *used))


@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
@pytest.mark.parametrize("shape", [(0, 3, 6), (4, 0, 6), (0, 0, 6)])
def test_empty_inputs(shape, strategy):
    layer = _linear(strategy)
    ids, weights = routing()
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x, flix_features=ids[: shape[0]], flix_weights=weights[: shape[0]])
    assert y.shape == (*shape[:2], 5)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_a_feature_listed_twice_adds_up_and_padding_changes_nothing():
    layer = _linear()
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    once = layer(x, flix_features=[[0]], flix_weights=[[2.0]])
    twice = layer(x, flix_features=[[0, -1, 0, -1]], flix_weights=[[0.5, 9.0, 1.5, 7.0]])
    assert_close(twice, once)


def test_names_with_colons_and_dots_keep_their_own_parameters():
    names = flix.FeatureRegistry({"a": ["b:c", "b.c", "b%2Ec"], "a:b": ["c"]})
    ranks = {("a", "b:c"): 1, ("a", "b.c"): 2, ("a", "b%2Ec"): 3, ("a:b", "c"): 4}
    layer = FlixLinear(4, 3, config=flix.FlixConfig(registry=names, ranks=ranks))
    assert {f: layer.flix_A[f].shape[0] for f in names.features} == ranks


def test_embedding_equals_the_formula():
    layer = _fill(FlixEmbedding(11, 5, config=config(), name="layer").double())
    ids, weights = routing()
    tokens = torch.randint(0, 11, (4, 7))
    found = layer(tokens, flix_features=ids, flix_weights=weights)
    expected = dense(
        torch.eye(11)[tokens],
        ids,
        by_id(layer.flix_config, layer.pairs()),
        weights,
        kernel=layer.weight.t(),
    )
    assert_close(found, expected.y)


def test_initial_values_are_the_cores_bytes():
    from flix.core.adapter.initial import initial_a

    layer = FlixLinear(6, 5, config=config(seed=7), name="a.b")
    expected = initial_a(seed=7, layer="a.b", group="task", feature="pos", rank=4, d_in=6)
    assert layer.flix_A[("task", "pos")].detach().numpy().tobytes() == expected.tobytes()
    assert not layer.flix_B[("task", "pos")].any()


def test_route_runs_layers_of_a_users_own_model():
    layer = _linear()
    ids, weights = routing()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    with route(registry(), registry().encode(ROWS)):
        inside = layer(x)
    assert_close(inside, layer(x, flix_features=ids, flix_weights=weights))
    with pytest.raises(RoutingError, match="no routing is in force"):
        layer(x)


def test_a_routing_object_is_routing():
    model = adapt(torch.nn.Sequential(torch.nn.Linear(6, 5)), config())
    encoded = registry().encode(ROWS)
    x = torch.randn(4, 6)
    ids, weights = routing()
    found = model(x, flix_features=encoded)
    assert_close(found, model(x, flix_features=ids, flix_weights=weights))
    other = flix.FeatureRegistry({"language": ["a"]}).encode([{"language": "a"}] * 4)
    with pytest.raises(RoutingError, match="another registry"):
        model(x, flix_features=other)


@pytest.mark.parametrize(
    "ids,weights,message",
    [
        (torch.zeros(4, 2), None, r"integer ids, got dtype float32"),
        (torch.zeros(4, 2, dtype=torch.bool), None, r"integer ids, got dtype bool"),
        (torch.zeros(4, dtype=torch.int64), None, r"\[batch, width\].*got \[4\]"),
        (torch.zeros(4, 1, 1, 1, dtype=torch.int64), None, r"got \[4, 1, 1, 1\]"),
        (torch.tensor([[0], [1], [6], [0]]), None, r"the id 6 in row 2.*valid ids are 0 to 5"),
        (torch.tensor([[0], [-2], [1], [0]]), None, r"the id -2 in row 1"),
        (torch.zeros(3, 2, dtype=torch.int64), None, r"leading shape \[4, 3\].*\[3\]"),
        (
            torch.zeros(4, 2, dtype=torch.int64),
            torch.ones(4, 1),
            r"shape of flix_features, \[4, 2\]",
        ),
        (torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1).long(), r"floating point, got"),
        (
            torch.zeros(4, 1, dtype=torch.int64),
            torch.tensor([[1.0], [float("nan")], [1.0], [1.0]]),
            r"finite, got nan in row 1 for language=hau",
        ),
        (
            torch.zeros(4, 1, dtype=torch.int64),
            torch.tensor([[1.0], [1.0], [float("inf")], [1.0]]),
            r"finite, got inf in row 2",
        ),
    ],
)
def test_malformed_routing_is_named(ids, weights, message):
    layer = _linear()
    with pytest.raises(RoutingError, match=message):
        layer(torch.zeros(4, 3, 6, dtype=torch.float64), flix_features=ids, flix_weights=weights)


def test_unknown_strategy_is_refused():
    with pytest.raises(ConfigError, match="strategy must be one of auto, gather, masked, single"):
        FlixLinear(6, 5, config=config(), strategy="gathered")


@pytest.mark.parametrize("ids", [[[0, 4], [1, 5]], [[0, 4], [0, 4]], [[-1, -1], [-1, -1]]])
@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
def test_the_output_may_be_changed_in_place(strategy, ids):
    """Activations with inplace=True, masks and residuals, also where no row activates anything."""
    layer, x = _linear(strategy).train(), torch.randn(2, 3, 6, dtype=torch.float64)
    ids, gradients = torch.tensor(ids), []
    for in_place in (True, False):
        layer.zero_grad()
        y = layer(x, flix_features=ids)
        if in_place:
            y *= 2
            y += x[..., :5]
            y[:, 0] = 0
            torch.relu_(y)
        else:
            y = torch.relu((2 * y + x[..., :5]) * torch.tensor([0.0, 1, 1]).double()[:, None])
        y.sum().backward()
        grads = [p.grad for p in layer.flix_state.bank.parameters() if p.grad is not None]
        assert bool(grads) == bool((ids >= 0).any())
        gradients.append([y.detach(), *grads])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


class _Mixed(torch.nn.Module):
    """One layer of every kind that can be adapted."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = torch.nn.Embedding(9, 6)
        self.q = torch.nn.Linear(6, 5)
        self.c = Conv1D(4, 5)

    def forward(self, tokens):
        return self.c(torch.tanh(self.q(self.embed(tokens))))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("auto", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_target_in_half_precision(base, auto, compiled):
    """Half bases and autocast, in training, evaluation and a token at a time, close to the numbers of float64."""
    pytest.importorskip("transformers")
    if compiled and auto is None and base == torch.float32:
        pytest.skip("full precision")
    torch.manual_seed(0)
    ids, weights = (
        torch.tensor([[0, 4], [1, 5], [-1, -1]]),
        torch.tensor([[1, 0.5], [2, 1], [0, 0]]),
    )
    runs, plain = [], _Mixed().to(base)
    for wide in (True, False):
        model = copy.deepcopy(plain).to(torch.float64 if wide else base)
        model = adapt(model, config(target_modules=["embed", "q", "c"]))
        randomize(model, std=0.5)
        half = auto if not wide else None
        call = torch.compile(model, backend="aot_eager") if compiled and not wide else model
        found = {}
        for length in (1, 3):
            tokens = torch.arange(3 * length).view(3, length)
            given = {
                "flix_features": ids,
                "flix_weights": weights.to(base).double() if wide else weights,
            }
            with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
                y = call(tokens, **given)
                y.square().sum().backward()
                with torch.no_grad():
                    found[f"eval {length}"] = [call.eval()(tokens, **given) for _ in range(2)][-1]
                model.train()
            found[f"train {length}"] = y.detach()
        found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        runs.append(found)
    coarsest = max(base, auto or base, key=lambda d: torch.finfo(d).eps)
    expected, found = runs
    assert {*expected} <= {*found}
    for name, value in expected.items():
        assert_close(found[name], value, dtype=coarsest, times=3, name=name)
    wanted = auto or base
    assert all(v.dtype == wanted for n, v in found.items() if n.startswith(("eval", "train")))


class _ByItsClass(torch.nn.Embedding):
    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


class _ByAProperty(torch.nn.Embedding):
    @property
    def embed_scale(self):
        return self.embedding_dim**0.5

    def forward(self, x):
        return super().forward(x) * self.embed_scale


@pytest.mark.parametrize("kind", [_ByItsClass, _ByAProperty])
def test_an_embedding_whose_class_says_its_scale_keeps_it(kind):
    model = torch.nn.Sequential(kind(7, 4))
    tokens = torch.arange(6).view(2, 3)
    wanted = model(tokens)
    model = adapt(model, config(target_modules=("0",)))
    idle = torch.full((2, 1), -1)
    torch.testing.assert_close(model(tokens, flix_features=idle), wanted)
    randomize(model)
    features = torch.tensor([[0], [4]])
    y = model(tokens, flix_features=features)
    rows = [{"language": "hau"}, {"task": "ner"}]
    for row, (own, composition) in enumerate(zip(y, rows, strict=True)):
        torch.testing.assert_close(merge(model, composition)(tokens[row]), own)

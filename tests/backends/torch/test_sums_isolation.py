"""NaN, Inf and overflow of one feature, or of one row, reach no row that has nothing to do with it."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")

import flix  # noqa: E402
from flix.backends.torch import FlixEmbedding, FlixLinear, adapt, merge  # noqa: E402
from flix.backends.torch import sums as sums_module  # noqa: E402
from tests.helpers.isolation import BROKEN, IDS, WAYS, WEIGHTS, check  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import layer_pairs, randomize  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:values of")


def _linear(strategy="auto", dtype=torch.float32):
    torch.manual_seed(0)
    layer = FlixLinear(8, 6, config=config(), name="q", strategy=strategy).to(torch.float32)
    randomize(layer, std=1.0)
    for parameter in (layer.weight, layer.bias):
        parameter.data = parameter.data.to(dtype)
    return layer


def _x(length=3, dtype=torch.float32):
    return torch.randn(len(IDS), length, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_a_linear_layer(strategy, way, learned):
    for length in (1, 3):
        check(_linear(strategy), _x(length), way, learned=learned)


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_of_many_pairs_whose_ranks_are_indexed(strategy, monkeypatch):
    monkeypatch.setattr(sums_module, "_MOST_BLOCKS", 0)
    for way in WAYS:
        check(_linear(strategy), _x(), way, learned=False)


@pytest.mark.parametrize("strategy", ["gather", "masked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_that_overflow_in_half_precision(dtype, strategy):
    layer, x = _linear(strategy, dtype), _x(dtype=dtype)
    for value in layer_pairs(layer)[BROKEN]:
        value.data.fill_(3e6)  # finite as it is kept, not in float16
    ids = torch.tensor(IDS)
    y = layer(x, flix_features=ids)
    assert y[[0, 2, 4]].isfinite().all()
    want = _linear("gather", dtype)(x[[0, 2, 4]], flix_features=ids[[0, 2, 4]])
    assert_close(y[[0, 2, 4]], want, dtype=dtype)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("way", ["nan in A", "nan in B", "inf", "overflow"])
def test_an_embedding(way, learned):
    layer = FlixEmbedding(11, 6, config=config(), name="e")
    randomize(layer, std=1.0)
    tokens = torch.arange(15).view(5, 3) % 11
    check(layer, tokens, way, learned=learned)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("kind", ["gather", "masked", "embedding"])
def test_compiled(kind, learned):
    ways = ["nan in A", "inf"] if kind == "embedding" else list(WAYS)
    torch._dynamo.reset()
    for way in ways:
        if kind == "embedding":
            model = adapt(
                torch.nn.Sequential(torch.nn.Embedding(11, 6)), config(target_modules=["0"])
            )
            x = torch.arange(15).view(5, 3) % 11
        else:
            model = adapt(
                torch.nn.Sequential(torch.nn.Linear(8, 6)),
                config(target_modules=["0"]),
                strategy=kind,
            )
            x = _x(2)
        randomize(model, std=1.0)
        call = torch.compile(model, backend="aot_eager")
        check(model[0], x, way, learned=learned, call=call)


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_the_kept_token_of_a_generation(strategy):
    model = adapt(
        torch.nn.Sequential(torch.nn.Linear(8, 6)), config(target_modules=["0"]), strategy=strategy
    )
    randomize(model, std=1.0)
    model.eval()
    ids, weights = torch.tensor(IDS), torch.tensor(WEIGHTS)
    rows = [0, 2, 3, 4]
    with torch.no_grad():
        for given in (None, weights):
            wanted = [model(_x(1), flix_features=ids, flix_weights=given)[rows] for _ in range(2)][
                -1
            ]
            rows = rows if given is not None else [0, 2, 4]
            wanted = model(_x(1), flix_features=ids, flix_weights=given)[rows]
            for value in (float("nan"), 3e38):
                kept = [v.clone() for v in layer_pairs(model[0])[BROKEN]]
                for v in layer_pairs(model[0])[BROKEN]:
                    v.fill_(value)
                for _ in range(2):
                    y = model(_x(1), flix_features=ids, flix_weights=given)
                    assert_close(y[rows], wanted)
                for v, old in zip(layer_pairs(model[0])[BROKEN], kept, strict=True):
                    v.copy_(old)


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_in_a_deep_model_rows_keep_the_merged_models_numbers(strategy):
    """A broken first layer breaks its rows' inputs of the second, whose gradients are of other features, too."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.ReLU(inplace=True), torch.nn.Linear(8, 6)
    )
    model = adapt(base, config(target_modules=["0", "2"]), strategy=strategy)
    randomize(model, std=0.5)
    layer_pairs(model[0])[BROKEN][0].data.fill_(float("nan"))
    ids = torch.tensor([[0, 4], [1, 5], [3, 4]])
    x = _x()[:3].requires_grad_()
    y = model(x, flix_features=ids)
    y[[0, 2]].sum().backward()
    assert x.grad[[0, 2]].isfinite().all() and not y[1].isfinite().any()
    for row, names in (
        (0, {"language": "hau", "task": "ner"}),
        (2, {"language": "zul", "task": "ner"}),
    ):
        assert_close(y[row], merge(model, names)(x[row]))
    for layer in (model[0], model[2]):
        for feature, pair in layer_pairs(layer).items():
            for value in pair:
                unused = feature in (BROKEN, ("task", "pos"))
                assert unused or value.grad is None or value.grad.isfinite().all(), feature


def test_a_broken_feature_is_named_once():
    layer = _linear()
    layer_pairs(layer)[BROKEN][1].data.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"values of language=swa are NaN or infinite"):
        layer(_x(), flix_features=torch.tensor(IDS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(_x(), flix_features=torch.tensor(IDS))
        layer(_x()[:1], flix_features=torch.tensor([[0, 4]]))


def test_weights_beyond_float32_are_refused():
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    weights[2, 0] = 1e300
    with pytest.raises(
        flix.RoutingError, match=r"got 1e\+300, beyond float32 in row 2 for language=zul"
    ):
        _linear()(_x(), flix_features=torch.tensor(IDS), flix_weights=weights)

"""The Triton kernels against the other strategies.

On a machine with a CUDA device the tests run there, natively. Elsewhere they run in Triton's interpreter, which must be
switched on before Triton is imported: ``test_triton_kernels.py`` runs this module so, in a process of its own.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from flix import ConfigError  # noqa: E402
from flix.backends.torch import FlixConv1D, adapt  # noqa: E402
from flix.core.strategy import blocks  # noqa: E402
from tests.helpers.isolation import WAYS, check  # noqa: E402
from tests.helpers.kernels import DEVICE, layer_of, needs_kernels, step_of  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_all_close  # noqa: E402
from tests.helpers.torch import layer_pairs, live_pairs, randomize, routing  # noqa: E402

pytestmark = needs_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _agree(found, expected, dtype=torch.float32):
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in expected.items()}
    assert_all_close(found, expected, dtype=dtype)


def _compare(shape, d_out, ids, weights, dtype=torch.float32, **changes):
    found, expected = (
        step_of(layer_of(s, shape[-1], d_out, dtype, **changes), shape, ids, weights, dtype)
        for s in ("fused", "gather")
    )
    _agree(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 24), (4, 1, 21), (4, 5, 24), (4, 69, 40), (4, 2, 3, 16)])
def test_every_shape_and_dtype_gives_gathers_numbers(shape, dtype):
    """ROWS has unequal ranks, a rank of 0, padding, weights below 0 and a row that activates nothing."""
    _compare(shape, 19, *routing(), dtype)


@pytest.mark.parametrize("length", [3, 130])
def test_several_chunks_of_columns_and_pieces_of_rows(length):
    ids, weights = routing(ROWS[:2])
    _compare((2, length, 530), 270, ids, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [3, 70])
def test_tokens_of_a_feature_that_programs_share(length, dtype, monkeypatch):
    """As in a large batch: each program sums its blocks of tokens, and some have none."""
    from flix.backends.torch.kernels import launch

    monkeypatch.setattr(blocks, "_SERIAL", 5)
    monkeypatch.setattr(launch, "partial", lambda *_: False)
    _compare((4, length, 40), 19, *routing(), dtype)
    ids, weights = torch.tensor([[0, 4]] * 4), torch.ones(4, 2)
    wide = config(ranks=70, alpha=None)  # two blocks of ranks
    _compare((4, length, 40), 150, ids, weights, dtype, settings=wide)


@pytest.mark.parametrize("length", [1, 7, 70])
@pytest.mark.parametrize("rank", [18, 35])
def test_many_slots(rank, length):
    """36 slots fit one block; 70 need two, where gradients take another way."""
    settings = config(ranks=rank, alpha=None)
    ids, weights = torch.tensor([[0, 4], [5, 0]]), torch.tensor([[1.0, -0.5], [0.0, 2.0]])
    _compare((2, length, 20), 33, ids, weights, settings=settings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_routing_per_token(dtype):
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(-1, 6, (2, 9, 3)))
    _compare((2, 9, 24), 19, ids, torch.from_numpy(rng.normal(size=ids.shape).astype("f4")), dtype)


@pytest.mark.parametrize("length", [1, 6, 64])
def test_a_feature_listed_twice_and_padding_between(length):
    ids = torch.tensor([[0, -1, 0, 5], [-1, 5, -1, 5]])
    weights = torch.tensor([[0.5, 9.0, -1.5, 1.0], [7.0, 0.0, 7.0, 2.0]])
    _compare((2, length, 12), 10, ids, weights)


def test_one_row_no_bias_and_half_precision_pairs():
    _compare((1, 17, 12), 9, torch.tensor([[3, 5]]), torch.ones(1, 2), bias=False)
    layers = [layer_of(s, 24, 16, torch.float16).half() for s in ("fused", "gather")]
    found, expected = (step_of(layer, (4, 8, 24), *routing(), torch.float16) for layer in layers)
    _agree(found, expected, torch.float16)


@pytest.mark.parametrize("shape", [(0, 3, 12), (4, 0, 12), (0, 0, 12)])
def test_empty_inputs(shape):
    layer = layer_of("fused", 12, 9)
    ids, weights = routing()
    found = step_of(layer, shape, ids[: shape[0]], weights[: shape[0]])
    assert found["y"].shape == (*shape[:2], 9) and found["x"].shape == shape


@pytest.mark.parametrize("length", [1, 40, 100])
def test_two_runs_give_the_same_bits(length):
    ids, weights = torch.tensor([[4, 0], [4, 1], [4, 0]]), torch.ones(3, 2)
    runs = [step_of(layer_of("fused", 48, 33), (3, length, 48), ids, weights) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_transposed_kernels_and_a_trained_base():
    results = []
    for strategy in ("fused", "gather"):
        layer = layer_of(strategy, 12, 9)
        layer.weight.data = layer.weight.data.t().contiguous()
        layer.__class__ = FlixConv1D
        layer.weight.requires_grad_(True)
        layer.bias.requires_grad_(True)
        results.append(step_of(layer, (4, 6, 12), *routing()))
        results[-1] |= {"kernel": layer.weight.grad.cpu(), "bias": layer.bias.grad.cpu()}
    _agree(*results)


def test_absent_features_get_no_gradient_in_eager_mode():
    layer = layer_of("fused", 12, 9)
    step_of(layer, (4, 6, 12), *routing([{"language": "hau", "task": "ner"}] * 4))
    trained = {feature for feature, (a, _) in layer_pairs(layer).items() if a.grad is not None}
    assert trained == {("language", "hau"), ("task", "ner")}


def test_autocast():
    results = []
    for strategy in ("fused", "gather"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            results.append(step_of(layer_of(strategy, 24, 19), (4, 8, 24), *routing()))
    assert results[0]["y"].dtype == torch.bfloat16
    _agree(*results, torch.bfloat16)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Net(torch.nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.layer, self.checkpointed = torch.nn.Linear(12, 9), checkpointed

        def forward(self, x):
            if self.checkpointed:
                return checkpoint(self.layer, x, use_reentrant=reentrant)
            return self.layer(x)

    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = adapt(Net(checkpointed), config(), strategy="fused").to(DEVICE)
        randomize(model)
        x = torch.ones(4, 6, 12, device=DEVICE)
        ids, weights = routing()
        model(x, flix_features=ids, flix_weights=weights.to(DEVICE)).sum().backward()
        gradients.append(
            {n: p.grad.cpu() for n, p in live_pairs(model).items() if p.grad is not None}
        )
    _agree(*gradients)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_graph_gives_the_plain_result(dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    models = [
        adapt(torch.nn.Sequential(torch.nn.Linear(24, 19)), config(), strategy=s).to(DEVICE)
        for s in ("fused", "gather")
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        randomize(model)
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    sizes = [(4, 9), (3, 12), (2, 70)] if dynamic else [(4, 9), (4, 9)]
    for step, (count, length) in enumerate(sizes):
        ids, weights = routing((ROWS * 2)[step : step + count])
        results = []
        for model, call in zip(models, (compiled, models[1]), strict=True):
            model.zero_grad()
            found = step_of(model[0], (count, length, 24), ids.to(DEVICE), weights, call=call)
            results.append(found)
        absent = {n for n in results[0] if n not in results[1]}
        assert all(not results[0].pop(n).any() for n in absent)
        _agree(*results)


@pytest.mark.parametrize("length", [1, 5])
def test_ids_of_no_feature_give_nan_in_compiled_models(length):
    torch._dynamo.reset()
    model = adapt(torch.nn.Sequential(torch.nn.Linear(6, 5)), config(), strategy="fused")
    compiled = torch.compile(model.to(DEVICE), fullgraph=True, backend="aot_eager")
    for bad in (6, 9, -2):
        ids = torch.tensor([[0, 1], [0, bad], [-1, -1]], device=DEVICE)
        with torch.no_grad():
            y = compiled(torch.randn(3, length, 6, device=DEVICE), flix_features=ids)
        assert y.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert y[[0, 2]].isfinite().all()


def test_other_dtypes_are_refused():
    layer = layer_of("fused", 6, 5).double()
    with pytest.raises(
        ConfigError, match="needs an input of float16, bfloat16, float32, got float64"
    ):
        layer(torch.zeros(1, 6, dtype=torch.float64, device=DEVICE), flix_features=[[0]])


@pytest.mark.filterwarnings("ignore:values of", "ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [1, 3, 40])
def test_rows_stay_apart(length, way, learned):
    x = torch.randn(5, length, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(layer_of("fused", 8, 6), x, way, learned=learned)


class _Twice(torch.nn.Module):
    """Layers of several sizes, one of which runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)
        self.unused = torch.nn.Linear(12, 12)

    def forward(self, x):
        return self.first(self.second(self.first(x).tanh()).tanh())


def _model(strategy):
    torch.manual_seed(0)
    settings = config(rank_pattern={"second": {("task", "pos"): 0, ("language", "zul"): 3}})
    model = adapt(_Twice(), settings, strategy=strategy)
    randomize(model)
    return model.to(DEVICE)


def test_a_model_whose_layers_differ_and_run_twice():
    """Gradients of all layers become one vector a feature; a layer without one leaves zeros in it."""
    found = []
    for strategy in ("fused", "gather"):
        model, x = _model(strategy), torch.ones(4, 70, 12, device=DEVICE, requires_grad=True)
        ids, weights = routing(ROWS)
        model(x, flix_features=ids, flix_weights=weights).square().sum().backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"x": x.grad.cpu(), **grads})
    assert len(found[1]) > 4
    _agree(*found)


def test_gradients_of_gradients():
    found = []
    for strategy in ("fused", "gather"):
        model, x = _model(strategy), torch.ones(4, 3, 12, device=DEVICE, requires_grad=True)
        ids, weights = routing(ROWS)
        y = model(x, flix_features=ids, flix_weights=weights)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        first.square().sum().backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"x": x.grad.cpu(), **grads})
    _agree(*found)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="older torch")
@pytest.mark.parametrize(("asked", "wanted"), [("tf32", True), ("ieee", False)])
def test_float32_is_multiplied_as_torch_is_told(asked, wanted, request):
    """The older of torch's two settings raises once the newer was used."""
    from flix.backends.torch.kernels import launch

    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    request.addfinalizer(lambda: setattr(settings, "fp32_precision", before))
    settings.fp32_precision = asked
    assert launch._tf32() is wanted
    one = torch.ones(1)
    assert launch._products(one)["precision"] == asked
    assert launch._products(one.bfloat16())["precision"] == "ieee"


class _OwnForward(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def _around(strategy, shape, ids, weights, dtype=torch.float32, twice=False):
    """Output and gradients of a layer with a forward of its own, as ``step_of`` has them of a plain one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(_OwnForward(shape[-1], 19)).to(DEVICE, dtype)
    model = adapt(model, config(target_modules=("0",)), strategy=strategy)
    randomize(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()
    weights = weights.clone().to(DEVICE).requires_grad_()
    y = model(x, flix_features=ids, flix_weights=weights)
    dy = torch.randn(y.shape, generator=generator).to(DEVICE, dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = [x, weights, *parameters]
    found = torch.autograd.grad(y, wanted, dy, create_graph=twice, allow_unused=True)
    if twice:
        again = sum((g**2).sum() for g in found if g is not None)
        found = torch.autograd.grad(again, wanted, allow_unused=True)
    named = {str(i): g.cpu() for i, g in enumerate(found) if g is not None}
    return {"y": y.detach().cpu(), **named}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 24), (4, 1, 21), (4, 5, 24), (4, 69, 40)])
def test_around_a_forward_of_its_own(shape, dtype):
    found, expected = (_around(s, shape, *routing(), dtype) for s in ("fused", "gather"))
    _agree(found, expected, dtype)


def test_gradients_of_gradients_around_a_forward_of_its_own():
    found, expected = (_around(s, (4, 5, 12), *routing(), twice=True) for s in ("fused", "gather"))
    _agree(found, expected)


def test_the_kernels_run_around_a_forward_of_its_own(monkeypatch):
    from flix.backends.torch.kernels import launch

    seen, plain = [], launch.outputs
    monkeypatch.setattr(launch, "outputs", lambda *given: seen.append(given) or plain(*given))
    _around("fused", (4, 5, 12), *routing())
    assert len(seen) == 1

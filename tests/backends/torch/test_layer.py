"""Layers in training give the plain result: accumulation, autocast, batches that activate nothing, compiled graphs."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix import RoutingError  # noqa: E402
from flix.backends.torch import adapt, disable, freeze, trainable_parameters  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import MODELS, batch, live_pairs, make, output, randomize, routing  # noqa: E402


def test_gradient_accumulation_sums_micro_batches():
    model = adapt(make("llama"), config())
    randomize(model)
    ids, weights = routing()
    inputs = batch("llama")
    whole = _sum_gradients(model, inputs, ids, weights, [slice(0, 4)])
    parts = _sum_gradients(model, inputs, ids, weights, [slice(0, 1), slice(1, 4)])
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert_close(parts[name], gradient)


def _sum_gradients(model, inputs, ids, weights, slices):
    model.zero_grad()
    for part in slices:
        some = {name: value[part] for name, value in inputs.items()}
        result = output(model(**some, flix_features=ids[part], flix_weights=weights[part]))
        (result * torch.linspace(-1, 1, result.shape[-1], dtype=result.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_close_to_float32_and_trains_float32_pairs(name):
    model = adapt(make(name, torch.float32), config()).train()
    randomize(model)
    ids, weights = routing()
    inputs = batch(name)
    plain = output(model(**inputs, flix_features=ids, flix_weights=weights))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = output(model(**inputs, flix_features=ids, flix_weights=weights))
    assert_close(mixed, plain, dtype="bfloat16", times=3)
    mixed.float().sum().backward()
    gradients = [p.grad for p in live_pairs(model).values() if p.grad is not None]
    assert gradients and all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_a_half_precision_base_keeps_float32_pairs():
    model = adapt(make("llama", torch.bfloat16), config()).train()
    randomize(model)
    ids, weights = routing()
    assert {p.dtype for p in live_pairs(model).values()} == {torch.float32}
    result = output(model(**batch("llama"), flix_features=ids, flix_weights=weights))
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    reference = copy.deepcopy(model).float()
    plain = output(reference(**batch("llama"), flix_features=ids, flix_weights=weights))
    assert_close(result, plain, times=3)


def test_a_batch_that_activates_nothing_can_still_be_differentiated():
    model = adapt(make("llama"), config()).train()
    ids = torch.full((4, 2), -1)
    loss = model(**batch("llama"), labels=batch("llama")["input_ids"], flix_features=ids).loss
    loss.backward()
    assert all(p.grad is None for p in trainable_parameters(model))


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_a_batch_whose_features_are_frozen_can_be_differentiated_while_others_train(strategy):
    model = adapt(make("llama"), config(), strategy=strategy).train()
    features = model.flix_config.registry.live
    freeze(model, features[:1])
    ids = torch.zeros(4, 1, dtype=torch.int64)
    given = {**batch("llama"), "labels": batch("llama")["input_ids"], "flix_features": ids}
    model(**given).loss.backward()
    assert all(p.grad is None for p in trainable_parameters(model))
    freeze(model, features)
    assert not model(**given).loss.requires_grad  # nothing trains: nothing is kept for a backward


def test_an_empty_batch_passes():
    model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), config())
    y = model(torch.zeros(0, 3, 4), flix_features=torch.zeros(0, 2, dtype=torch.int64))
    assert y.shape == (0, 3, 4)


@pytest.mark.parametrize("training", [True, False])
def test_a_call_without_routing_is_an_error_from_whichever_module(training):
    model, inputs = adapt(make("llama"), config()).train(training), batch("llama")
    for part in (model, model.model):
        with pytest.raises(RoutingError, match=r"called without routing.*routed\(model, row\)"):
            part(**inputs)
    with pytest.raises(
        RoutingError, match=r"'model\.layers\.0\.mlp\.gate_proj'.*no routing is in force"
    ):
        model.model.layers[0].mlp(torch.zeros(2, 3, model.config.hidden_size).double())
    with disable(model):  # said so
        model(**inputs), model.model(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_compiled_whole_graph_gives_the_plain_result(backend, strategy):
    torch._dynamo.reset()
    model = adapt(make("llama", torch.float32), config(), strategy=strategy).train()
    randomize(model)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    inputs = batch("llama")
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.5) for m in (model, reference)
    ]
    rows_of_step = [
        [{"language": "swa", "task": "pos"}] * 4,
        [{"language": "hau", "task": "ner"}] * 4,
        [{"language": "swa", "task": "ner"}, {"task": "pos", "language": "hau"}] * 2,
        [{"language": "hau", "task": "ner"}] * 4,
    ]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in rows_of_step:
            ids, weights = routing(rows)
            results = []
            for runner, optimizer in zip((compiled, reference), optimizers, strict=True):
                optimizer.zero_grad()
                result = output(runner(**inputs, flix_features=ids, flix_weights=weights))
                result.square().mean().backward()
                optimizer.step()
                results.append(result)
            assert_close(results[0], results[1], times=10)
    for name, parameter in live_pairs(reference).items():
        assert_close(live_pairs(model)[name], parameter, name=name, times=100)
    untouched = [n for n in live_pairs(model) if n.endswith(".zul")]
    fresh = adapt(make("llama", torch.float32), config())
    randomize(fresh)
    for name in untouched:
        assert torch.equal(live_pairs(model)[name], live_pairs(fresh)[name])

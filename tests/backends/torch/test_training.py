"""Training gives the plain result: absent features, checkpointing, accumulation, autocast, compilation."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix import RoutingError  # noqa: E402
from flix.backends.torch import adapt, trainable_parameters  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import MODELS, batch, live_pairs, make, output, randomize, routing  # noqa: E402

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.5),
}


def _step(model, optimizer, rows, inputs) -> None:
    ids, weights = routing(rows)
    optimizer.zero_grad()
    output(model(**inputs, flix_features=ids, flix_weights=weights)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_absent_features_are_bit_identical_under_any_optimizer(optimizer):
    model = adapt(make("llama", torch.float32), config())
    randomize(model)
    opt = OPTIMIZERS[optimizer](trainable_parameters(model))
    inputs = batch("llama", rows=2)
    # swa and pos get momentum first, and are then absent.
    _step(model, opt, [{"language": "swa", "task": "pos"}] * 2, inputs)
    before = {name: p.detach().clone() for name, p in live_pairs(model).items()}
    for _ in range(3):
        _step(model, opt, [{"language": "hau", "task": "ner"}, {"language": "hau"}], inputs)
    moved = {n for n, p in live_pairs(model).items() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.endswith((".language.hau", ".task.ner"))}


def test_the_base_never_moves():
    model = adapt(make("gpt2", torch.float32), config())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        _step(model, opt, ROWS, batch("gpt2"))
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def _gradients(model, inputs, ids, weights):
    model.zero_grad()
    result = output(model(**inputs, flix_features=ids, flix_weights=weights))
    project = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
    (result * project.to(result.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}


def _enable(model, reentrant: bool) -> None:
    for name in (
        "activation_checkpointing",
        "gradient_checkpointing",
    ):  # transformers 5, and before
        if hasattr(model, f"{name}_enable"):
            getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})
            return


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_gives_the_plain_gradients(name, reentrant):
    model = adapt(make(name), config()).train()
    randomize(model)
    ids, weights = routing()
    inputs = batch(name)
    plain = _gradients(model, inputs, ids, weights)
    _enable(model, reentrant)
    calls = []
    handle = next(m for m in model.modules() if hasattr(m, "flix_A")).register_forward_hook(
        lambda *_: calls.append(1)
    )
    found = _gradients(model, inputs, ids, weights)
    handle.remove()
    assert len(calls) == 2, "the layer must have run again in the backward"
    assert found.keys() == plain.keys()
    for pair, gradient in plain.items():
        assert_close(found[pair], gradient, name=pair)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_two_pending_forwards_apart(reentrant):
    """Two forwards under different routings, then one backward: each recomputation needs its own routing."""
    model = adapt(make("llama"), config()).train()
    randomize(model)
    inputs = batch("llama")
    first, second = routing(ROWS), routing(ROWS[::-1])
    expected = _gradients(model, inputs, *first)
    for name, gradient in _gradients(model, inputs, *second).items():
        expected[name] = expected.get(name, 0) + gradient
    _enable(model, reentrant)
    model.zero_grad()
    total = 0.0
    for ids, weights in (first, second):
        result = output(model(**inputs, flix_features=ids, flix_weights=weights))
        project = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
        total = total + (result * project.to(result.dtype)).sum()
    total.backward()
    for name, gradient in expected.items():
        assert_close(dict(live_pairs(model))[name].grad, gradient, name=name)


def test_checkpointing_in_a_users_own_model_and_on_another_thread():
    import threading

    from torch.utils.checkpoint import checkpoint

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.reentrant = None

        def forward(self, x):
            run = lambda h: self.second(torch.tanh(self.first(h)))  # noqa: E731
            if self.reentrant is None:
                return run(x)
            return checkpoint(run, x, use_reentrant=self.reentrant)

    torch.manual_seed(0)
    model = adapt(Net().double(), config()).train()
    randomize(model)
    ids, weights = routing()
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    model(x, flix_features=ids, flix_weights=weights).sum().backward()
    expected = {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}
    for reentrant in (True, False):
        model.reentrant = reentrant
        model.zero_grad()
        loss = model(x, flix_features=ids, flix_weights=weights).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        found = {n: p.grad for n, p in live_pairs(model).items() if p.grad is not None}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(found[name], gradient)


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


def test_an_empty_batch_passes():
    model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), config())
    y = model(torch.zeros(0, 3, 4), flix_features=torch.zeros(0, 2, dtype=torch.int64))
    assert y.shape == (0, 3, 4)


def test_training_without_routing_is_an_error():
    model = adapt(make("llama"), config()).train()
    with pytest.raises(RoutingError, match="called without routing"):
        model(**batch("llama"))
    with pytest.raises(
        RoutingError, match=r"'model\.layers\.0\.self_attn\.q_proj'.*no routing is in force"
    ):
        model.model(**batch("llama"))
    model.eval()
    with pytest.warns(UserWarning, match="base model answers alone"):
        model(**batch("llama"))


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

"""Activation checkpointing gives the plain gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix.backends.torch import adapt  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import MODELS, batch, live_pairs, make, output, randomize, routing  # noqa: E402


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

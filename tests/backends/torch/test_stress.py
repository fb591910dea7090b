"""Many requests at once, and for long: each gets its own answer, and memory stays (docs/specification.md §5.1.4)."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import flix  # noqa: E402
from flix.backends.torch import adapt, disable, page, routed, trainable_parameters  # noqa: E402
from tests.helpers.stress import (  # noqa: E402
    FEATURES,
    REGISTRY,
    answers,
    check_memory,
    in_tasks,
    in_threads,
    needs_proc,
    pair_of,
)
from tests.helpers.torch import randomize  # noqa: E402

CALLS = 10_000
X = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))


def _model(d=16):
    plain = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d))
    model = adapt(plain, flix.FlixConfig(registry=REGISTRY, ranks=4))
    randomize(model)
    return model.eval()


@torch.no_grad()
def _answers(model):
    found = answers(lambda pair: model(X, flix_features=[[i] for i in pair]))
    return {key: torch.from_numpy(value) for key, value in found.items()}


def _ask(model, want, worker, call):
    """Whether the answer to a request of some kind is right."""
    a, b = pair_of(worker, call)
    kind = (worker + call) % 4
    if kind == 0:
        with routed(model, {"language": f"l{a}"}):
            found, key = model(X), (a, a)
    elif kind == 1:
        with disable(model):
            found, key = model(X, flix_features=[[a], [b]]), None
    else:
        given = torch.tensor([[a], [b]]) if kind == 2 else [[a], [b]]
        found, key = model(X, flix_features=given), (a, b)
    return torch.allclose(found, want[key], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("paged", [False, True])
def test_threads_get_their_own_answers(paged):
    model = _model()
    want, size = _answers(model), next(iter(trainable_parameters(model))).nbytes
    pager = page(model, FEATURES // 2 * size) if paged else None

    def ask(worker, call):
        with torch.no_grad():
            return _ask(model, want, worker, call)

    assert in_threads(CALLS, ask) == {"right": CALLS}
    assert pager is None or pager.resident <= pager.budget


@pytest.mark.slow
@pytest.mark.parametrize("paged", [False, True])
def test_tasks_get_their_own_answers(paged):
    model = _model()
    want = _answers(model)
    if paged:
        page(model, FEATURES // 2 * next(iter(trainable_parameters(model))).nbytes)

    def block(worker, call):
        row = {"language": f"l{pair_of(worker, call)[0]}"}
        return disable(model) if call % 5 == 0 else routed(model, row)

    def ask(worker, call):
        key = None if call % 5 == 0 else pair_of(worker, call)[:1] * 2
        return torch.allclose(model(X), want[key], atol=1e-5)

    with torch.no_grad():
        assert in_tasks(CALLS, block, ask) == {"right": CALLS}


@pytest.mark.slow
@needs_proc
def test_memory_stays_over_ten_thousand_steps(record_property):
    model = _model().train()
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-3)
    generator = torch.Generator().manual_seed(1)

    def steps(count):
        for _ in range(count):
            ids = torch.randint(0, FEATURES, (2, 1), generator=generator)
            model(X, flix_features=ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    check_memory(record_property, lambda: steps(1000), lambda: steps(10_000))


@pytest.mark.slow
@needs_proc
def test_memory_stays_over_ten_thousand_shapes(record_property):
    model, x = _model(), torch.randn(100, 100, 16)
    ids = torch.arange(100)[:, None] % FEATURES

    def over(rows, lengths):
        with torch.no_grad():
            for n in rows:
                for s in lengths:
                    model(x[:n, :s], flix_features=ids[:n])

    some, all_of_them = range(1, 101, 10), range(1, 101)
    check_memory(
        record_property, lambda: over(some, all_of_them), lambda: over(all_of_them, all_of_them)
    )

"""Many requests at once, and for long: each gets its own answer, and memory stays (docs/specification.md §5.1.4)."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import flix  # noqa: E402
from flix.backends.torch import adapt, disable, page, routed, trainable_parameters  # noqa: E402
from tests.helpers.torch import randomize  # noqa: E402

FEATURES, WORKERS, CALLS = 16, 8, 10_000
REGISTRY = flix.FeatureRegistry({"language": [f"l{i}" for i in range(FEATURES)]})
X = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))


def _model(d=16):
    plain = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d))
    model = adapt(plain, flix.FlixConfig(registry=REGISTRY, ranks=4))
    randomize(model)
    return model.eval()


@torch.no_grad()
def _answers(model):
    """Of every pair of features, of every one for all rows, and of the base."""
    found = {
        (a, b): model(X, flix_features=[[a], [b]]) for a in range(FEATURES) for b in range(FEATURES)
    }
    return found | {None: model(X, flix_features=[[-1], [-1]])}


def _ask(model, want, worker, call):
    """One request of some kind, and whether its answer is right."""
    a, b = (worker * 7 + call) % FEATURES, (worker * 5 + 3 * call) % FEATURES
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
    return "right" if torch.allclose(found, want[key], atol=1e-5) else "wrong"


def _counted(work):
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("paged", [False, True])
def test_threads_get_their_own_answers(paged):
    model = _model()
    want, counts = _answers(model), [Counter() for _ in range(WORKERS)]
    size = next(iter(trainable_parameters(model))).nbytes
    pager = page(model, FEATURES // 2 * size) if paged else None

    def serve(worker):
        with torch.no_grad():
            for call in range(CALLS // WORKERS):
                found = _counted(lambda call=call: _ask(model, want, worker, call))
                counts[worker][found] += 1

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts, Counter()) == {"right": CALLS}
    assert pager is None or pager.resident <= pager.budget


@pytest.mark.slow
@pytest.mark.parametrize("paged", [False, True])
def test_tasks_get_their_own_answers(paged):
    """Each holds a block of its own open while the others run."""
    model = _model()
    want, counts = _answers(model), Counter()
    if paged:
        page(model, FEATURES // 2 * next(iter(trainable_parameters(model))).nbytes)

    async def serve(worker):
        for call in range(CALLS // WORKERS):
            a = (worker * 7 + call) % FEATURES
            with disable(model) if call % 5 == 0 else routed(model, {"language": f"l{a}"}):
                await asyncio.sleep(0)
                found = _counted(lambda: model(X))
                key = None if call % 5 == 0 else (a, a)
                right = isinstance(found, torch.Tensor) and torch.allclose(
                    found, want[key], atol=1e-5
                )
            await asyncio.sleep(0)
            counts["right" if right else str(found)[:80]] += 1

    async def all_of_them():
        await asyncio.gather(*map(serve, range(WORKERS)))

    with torch.no_grad():
        asyncio.run(all_of_them())
    assert dict(counts) == {"right": CALLS}


def _resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@pytest.mark.slow
@needs_proc
def test_memory_stays_over_ten_thousand_steps():
    model = _model().train()
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-3)
    generator = torch.Generator().manual_seed(1)

    def step():
        ids = torch.randint(0, FEATURES, (2, 1), generator=generator)
        model(X, flix_features=ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(1000):
        step()
    before = _resident()
    for _ in range(10_000):
        step()
    assert _resident() < 1.02 * before


@pytest.mark.slow
@needs_proc
def test_memory_stays_over_ten_thousand_shapes():
    model, x = _model(), torch.randn(100, 100, 16)
    ids = torch.arange(100)[:, None] % FEATURES

    def over(rows, lengths):
        with torch.no_grad():
            for n in rows:
                for s in lengths:
                    model(x[:n, :s], flix_features=ids[:n])

    over(range(1, 101, 10), range(1, 101))
    before = _resident()
    over(range(1, 101), range(1, 101))
    assert _resident() < 1.02 * before

"""What ``routed`` and ``disable`` hold: for their own task and thread, whatever the order, nothing left behind."""

from __future__ import annotations

import asyncio
import threading

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import flix  # noqa: E402
from flix import RoutingError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    FlixLinear,
    adapt,
    disable,
    merge,
    route,
    routed,
    scopes,
)
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import randomize  # noqa: E402

REGISTRY = flix.FeatureRegistry({"language": ["hau", "swa"]})
HAU, SWA = ({"language": name} for name in ("hau", "swa"))
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def model():
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    made = adapt(plain, flix.FlixConfig(registry=REGISTRY, ranks=2))
    randomize(made)
    yield made.eval()
    assert scopes._blocks.task == () and scopes._blocks.thread.open == ()


@pytest.fixture
def want(model):
    found = {name: merge(model, row)(X) for name, row in (("hau", HAU), ("swa", SWA))}
    found["base"] = model(X, flix_features=torch.full((3, 1), -1))
    assert_far(found["hau"], found["swa"], at_least=1e-2)
    return found


def test_each_task_sees_its_own(model, want):
    async def ask(name, others):
        with disable(model) if name == "base" else routed(model, {"language": name}):
            for _ in range(others):
                await asyncio.sleep(0)
                assert_close(model(X), want[name])
                assert_close(model[2](model[1](model[0](X))), want[name])  # part by part
                assert_close(await asyncio.to_thread(model, X), want[name])
        with pytest.raises(RoutingError, match="called without routing"):
            model(X)

    async def all_at_once():
        await asyncio.gather(*(ask(name, i) for i in range(1, 4) for name in want))

    asyncio.run(all_at_once())


def test_a_thread_of_ones_own_starts_without(model, want):
    found = []

    def ask(**given):
        try:
            found.append(model(X, **given))
        except RoutingError as error:
            found.append(error)

    with routed(model, HAU), disable(model):
        for given in ({}, {"flix_features": torch.ones(3, 1, dtype=torch.long)}):
            thread = threading.Thread(target=ask, kwargs=given)
            thread.start()
            thread.join()
        assert_close(model(X), want["base"])
    assert isinstance(found[0], RoutingError)
    assert_close(found[1], want["swa"])  # this thread's disable is not that thread's


def test_blocks_may_close_in_any_order(model, want):
    first, second = routed(model, HAU), routed(model, SWA)
    first.__enter__()
    second.__enter__()
    assert_close(model(X), want["swa"])
    first.__exit__(None, None, None)
    assert_close(model(X), want["swa"])
    second.__exit__(None, None, None)
    off, on = disable(model), disable(model)
    off.__enter__()
    on.__enter__()
    off.__exit__(None, None, None)
    assert_close(model(X, flix_features=torch.zeros(3, 1, dtype=torch.long)), want["base"])
    on.__exit__(None, None, None)
    assert_close(model(X, flix_features=torch.zeros(3, 1, dtype=torch.long)), want["hau"])


def test_the_base_alone_wins_within_and_around(model, want):
    for outer, inner in (
        (disable(model), routed(model, HAU)),
        (routed(model, HAU), disable(model)),
    ):
        with outer, inner:
            assert_close(model(X), want["base"])
            assert_close(model[2](model[1](model[0](X))), want["base"])


def test_routing_that_a_part_lets_drop_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x, **kwargs):
            return self.q(x)

    model = adapt(nn.Sequential(Block()).double(), flix.FlixConfig(registry=REGISTRY, ranks=2))
    randomize(model)
    want = merge(model.eval(), HAU)(X)
    with routed(model, HAU):
        assert_close(model[0](X), want)
        assert_close(model[0](X, flix_features=None), want)
        with pytest.raises(RoutingError, match=r"given to a Block around layer '0\.q'"):
            model[0](X, flix_features=torch.ones(3, 1, dtype=torch.long))


def test_layers_trained_part_by_part_under_one_composition(model):
    """The pieces of a model under ``routed``, with gradients, step after step."""
    twin = merge(model, HAU)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with routed(model, HAU):
        for _ in range(3):
            twin = merge(model, HAU)
            x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
            model[2](model[1](model[0](x))).square().sum().backward()
            twin(y).square().sum().backward()
            assert_close(x.grad, y.grad)
            optimizer.step()
            optimizer.zero_grad()
    assert_far(merge(model, HAU)(X), twin(X), at_least=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_code_follows_blocks_but_not_tasks(model, want, whole):
    torch._dynamo.reset()
    if whole:
        call = torch.compile(model, backend="eager")
    else:
        model[0].compile(backend="eager")
        model[2].compile(backend="eager")
        call = model
    for name in ("hau", "swa", "hau"):
        with routed(model, {"language": name}):
            assert_close(call(X), want[name])
    with disable(model):
        assert_close(call(X), want["base"])
    for name, feature in (("swa", 1), ("hau", 0), ("base", -1)):
        assert_close(call(X, flix_features=torch.full((3, 1), feature)), want[name])

    async def ask():
        with routed(model, SWA):
            try:
                found = call(X)
            except Exception as error:
                assert "tell asyncio's tasks apart" in str(error)
            else:  # what is not compiled knows
                assert_close(found, want["swa"])
            torch._dynamo.reset()  # forgets that it gave up on the frame
            strict = torch.compile(model, backend="eager", fullgraph=True)
            with pytest.raises(Exception, match=r"tell asyncio's tasks apart|Observed exception"):
                strict(X)

    with routed(model, HAU):
        asyncio.run(ask())
        assert_close(call(X), want["hau"])


def test_a_trace_would_keep_one_batchs_routing(model, want):
    class Caller(nn.Module):
        def forward(self, x, ids):
            return model(x, flix_features=ids)

    ids = torch.zeros(3, 1, dtype=torch.long)
    message = r"torch\.jit\.trace.*merge\(model, row\)"
    model(X, flix_features=ids)  # which is kept for the next call
    with pytest.raises(RoutingError, match=message):
        torch.jit.trace(Caller(), (X, ids))
    for traced in (model, model[0]):
        with pytest.raises(RoutingError, match=message), routed(model, HAU):
            torch.jit.trace(traced, X)
    with disable(model):
        assert_close(torch.jit.trace(model, X)(X[:2]), want["base"][:2])


def test_copies_that_data_parallel_makes_are_refused(model):
    model._is_replica = True
    with pytest.raises(RoutingError, match=r"nn\.DataParallel.*DistributedDataParallel"):
        model(X, flix_features=torch.zeros(3, 1, dtype=torch.long))
    del model._is_replica


def test_a_layer_refuses_the_routing_of_another_registry():
    other = flix.FeatureRegistry({"language": ["swa", "hau"]})
    layer = FlixLinear(8, 4, config=flix.FlixConfig(registry=REGISTRY, ranks=2), name="q")
    same = flix.FeatureRegistry({"language": ["hau", "swa"]})
    with route(same, [[0], [1], [0]]):
        layer(X.float())
    with pytest.raises(RoutingError, match=r"'q' belongs to .*made for"), route(other, [[0]] * 3):
        layer(X.float())

"""What layers keep between the tokens of a generation gives the numbers of a forward that keeps nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flix.backends.torch import adapt, disable, merge_in_place, routed, unmerge  # noqa: E402
from flix.backends.torch.tokens import compositions  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import parameters_of, randomize, routing  # noqa: E402


def model(strategy="auto", **changes):
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5, bias=False)
    made = adapt(torch.nn.Sequential(*layers).double(), config(**changes), strategy=strategy)
    randomize(made)
    return made.eval()


ALIKE = [ROWS[1]] * 4
PAIRS = [ROWS[0], ROWS[1], ROWS[1], ROWS[0], ROWS[1], ROWS[0]]
UNEVEN = [ROWS[0], *[ROWS[1]] * 6, ROWS[2]]
CASES = {"unlike": ROWS, "pairs": PAIRS, "uneven": UNEVEN, "alike": ALIKE}


def plain(made, x, **call):
    """The same, as it is computed where gradients are recorded."""
    with torch.enable_grad():
        return made(x.clone().requires_grad_(), **call).detach()


@pytest.mark.parametrize("shape", [(1, 6), (6,)])
@pytest.mark.parametrize("strategy", ["auto", "gather", "masked", "single"])
@pytest.mark.parametrize("rows", CASES)
def test_tokens_equal_a_plain_forward(rows, strategy, shape):
    if strategy == "single" and rows != "alike":
        pytest.skip("rows differ")
    made, (ids, weights) = model(strategy), routing(CASES[rows])
    call = {"flix_features": ids, "flix_weights": weights}
    with torch.no_grad():
        inputs = [torch.randn(len(ids), *shape).double() for _ in range(3)]
        found = [made(x, **call) for x in inputs]
        assert len(made.flix_state.last[-1].tokens) == 2
        for x, y in zip(inputs, found, strict=True):
            assert_close(y, plain(made, x, **call))


def test_inputs_of_another_shape_or_precision_are_computed_anew():
    made, (ids, weights) = model(), routing()
    call = {"flix_features": ids, "flix_weights": weights}
    with torch.no_grad():
        for shape in ((4, 1, 6), (4, 3, 6), (4, 6), (4, 1, 6)):
            x = torch.randn(shape).double()
            assert_close(made(x, **call), plain(made, x, **call))
        made.float()
        x = torch.randn(4, 1, 6)
        assert_close(made(x, **call), plain(made, x, **call))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(x, **call).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_for_all_serves_any_shape(rows):
    made = model()
    with torch.no_grad(), routed(made, ROWS[1]):
        for length in (4, 1, 1, 2):
            x = torch.randn(rows, length, 6).double()
            ids, weights = routing([ROWS[1]] * rows)
            assert_close(made(x), plain(made, x, flix_features=ids, flix_weights=weights))


def test_changed_values_are_seen_at_the_next_token():
    made, (ids, _) = model(), routing()
    x = torch.randn(4, 1, 6).double()
    with torch.no_grad():
        before = made(x, flix_features=ids)
        parameters_of(made)["task", "ner"].mul_(3.0)
        after = made(x, flix_features=ids)
        assert not torch.equal(after, before)
        assert_close(after, plain(made, x, flix_features=ids))
        made.load_state_dict({n: p * 2 for n, p in made.state_dict().items()})
        assert_close(made(x, flix_features=ids), plain(made, x, flix_features=ids))


def test_a_model_that_is_disabled_or_merged_keeps_nothing_of_it():
    made, (ids, _) = model(), routing()
    x = torch.randn(4, 1, 6).double()
    with torch.no_grad():
        wanted = made(x, flix_features=ids)
        base = made(x, flix_features=torch.full((4, 1), -1))
        with disable(made):
            assert torch.equal(made(x, flix_features=ids), base)
        merge_in_place(made, ROWS[0])
        assert not torch.equal(made(x), base)
        unmerge(made)
        assert torch.equal(made(x, flix_features=ids), wanted)


def test_a_model_inside_another_keeps_its_own():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = model(), model(seed=5)
            randomize(self.second, 7)

        def forward(self, x, ids):
            inner = self.second

            def hook(module, args, y):
                return y + inner(args[0])  # runs under the routing of the model around it

            handle = self.first[0].register_forward_hook(lambda m, a, y: y + inner[0](a[0]))
            try:
                return self.first(x, flix_features=ids)
            finally:
                handle.remove()

    outer, (ids, _) = Outer(), routing()
    x = torch.randn(4, 1, 6).double()
    with torch.no_grad():
        found = [outer(x, ids) for _ in range(2)]
    with torch.enable_grad():
        wanted = outer(x, ids).detach()
    for one in found:
        assert_close(one, wanted)


def test_rows_that_are_alike_are_put_together():
    ids = np.array([[0, 1], [2, 1], [0, 1], [2, 1], [0, 1]])
    found = compositions(ids, None)
    assert found.count == 2
    order, places = found.order.numpy(), found.places.numpy()
    assert (ids[order[places]] == ids).all() and (order[places] == np.arange(5)).all()
    assert len(order) == 6 and {tuple(ids[i]) for i in found.first} == {(0, 1), (2, 1)}
    # Weights tell rows apart; so does padding that would be most of the work.
    weights = np.array([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0.5]], np.float32)
    assert compositions(ids, weights).count == 3 or compositions(ids, weights).order is None
    uneven = compositions(np.array([[0]] * 6 + [[1], [2], [3]]), None)
    assert uneven.count == 9 and uneven.order is None
    assert compositions(np.array([[0]] * 4), None).count == 1


@pytest.mark.parametrize("how", ["in place", "AdamW", "fused AdamW"])
def test_tokens_after_values_changed_are_those_of_the_new_values(how):
    made, (ids, weights) = model("gather"), routing()
    call = {"flix_features": ids, "flix_weights": weights}
    x = torch.randn(len(ids), 1, 6).double()
    held = list(parameters_of(made).values())
    optimizer = torch.optim.AdamW(held, 0.1, fused=how.startswith("fused"))
    for parameter in held:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        with torch.no_grad():
            for _ in range(3):  # kept from the second on
                y = made(x, **call)
            # Of a copy: a forward with gradients would renew what is kept.
            assert_close(y, plain(copy.deepcopy(made), x, **call))
            if how == "in place":
                for parameter in held:
                    parameter.mul_(-1.5)
            else:
                optimizer.step()

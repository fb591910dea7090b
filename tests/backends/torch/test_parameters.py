"""A feature is one parameter: what optimizers, copies, files and layers by hand see of it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from flix import RoutingError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    FlixEmbedding,
    FlixLinear,
    adapt,
    merge,
    named_pairs,
    route,
    trainable_parameters,
)
from flix.backends.torch.layer import flix_layers  # noqa: E402
from flix.backends.torch.parameters import Bank  # noqa: E402
from flix.core.adapter.initial import initial_pairs  # noqa: E402
from tests.helpers.registry import ROWS, config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import live_pairs, parameters_of, randomize, routing  # noqa: E402


class Net(torch.nn.Module):
    """An embedding, two linear layers and a head; "up" has other ranks than "down"."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.up, self.down = torch.nn.Linear(6, 9), torch.nn.Linear(9, 6, bias=False)
        self.head = torch.nn.Linear(6, 2)

    def forward(self, tokens, use_down=True):
        x = torch.tanh(self.up(self.embed(tokens)))
        return self.head(self.down(x) if use_down else x[..., :6])


SETTINGS = {"target_modules": ["embed", "up", "down"], "rank_pattern": {"up": {"task": {"ner": 0}}}}


def net(**changes):
    torch.manual_seed(0)
    model = adapt(Net().double(), config(**SETTINGS), **changes)
    randomize(model)
    return model


TOKENS = torch.arange(12).view(4, 3) % 11


def test_a_model_has_as_many_tensors_as_features():
    model = net()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    # "yor" has rank 0 everywhere.
    assert names == ["flix_bank.language:hau", "flix_bank.language:swa", "flix_bank.language:zul",
                     "flix_bank.task:ner", "flix_bank.task:pos"]  # fmt: skip
    assert [p.dim() for p in trainable_parameters(model)] == [1] * 5
    sizes = {":".join(f): p.numel() for f, p in parameters_of(model).items()}
    assert sizes["task:ner"] == 2 * (11 + 6) + 2 * (9 + 6)
    assert sizes["language:swa"] == 3 * (11 + 6) + 3 * (6 + 9) + 3 * (9 + 6)
    assert {n for n in model.state_dict() if "flix" in n} == set(names)


def test_initial_values_are_the_cores_bytes_in_every_layer():
    model = adapt(Net(), config(seed=3, **SETTINGS))
    ranks = dict(config().ranks)
    for path, layer in flix_layers(model):
        mine = {f: config(**SETTINGS).rank(path, f) for f in ranks}
        expected = initial_pairs(seed=3, layer=path, ranks=mine, d_in=layer.d_in, d_out=layer.d_out)
        found = {f: (a.detach().numpy(), b.detach().numpy()) for f, a, b in layer.pairs()}
        assert found.keys() == expected.keys()
        for feature, (a, b) in expected.items():
            assert found[feature][0].tobytes() == a.tobytes()
            assert found[feature][1].shape == b.shape and not found[feature][1].any()


def test_views_are_the_parameters_memory_and_carry_its_gradient():
    model = net()
    a, b = model.up.flix_A["language", "swa"], model.up.flix_B["language", "swa"]
    assert a.shape == (3, 6) and b.shape == (9, 3)
    with torch.no_grad():
        a.fill_(7.0)
        b[0].fill_(5.0)
    pairs = named_pairs(model)
    assert (pairs["up.A.language.swa"] == 7).all() and (pairs["up.B.language.swa"][0] == 5).all()
    (
        model.up.flix_A["language", "swa"].sum() + model.down.flix_B["language", "swa"].sum()
    ).backward()
    grads = {n: p.grad for n, p in live_pairs(model).items() if p.grad is not None}
    assert {n for n, g in grads.items() if g.all()} == {"up.A.language.swa", "down.B.language.swa"}
    assert not any(
        g.any() for n, g in grads.items() if n not in ("up.A.language.swa", "down.B.language.swa")
    )
    assert ("task", "ner") not in model.up.flix_A and ("task", "ner") in model.down.flix_B
    for missing in (("task", "ner"), ("language", "yor"), ("language", "nobody")):
        with pytest.raises(KeyError):
            model.up.flix_A[missing]


def test_a_layer_that_does_not_run_gets_zeros_and_the_others_their_gradients():
    model, ids = net(), routing()[0]
    model(TOKENS, flix_features=ids, use_down=False).sum().backward()
    grads = {n: p.grad for n, p in live_pairs(model).items() if p.grad is not None}
    assert all(g.any() != n.startswith("down") for n, g in grads.items()) and grads
    assert {f for f, p in parameters_of(model).items() if p.grad is None} == {("language", "zul")}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_parameters_of_their_own_and_give_the_same(copied):
    model = net()
    ids, weights = routing()
    wanted = model(TOKENS, flix_features=ids, flix_weights=weights)
    twin = copied(model)
    assert isinstance(twin, Net) and twin.flix_bank is not model.flix_bank
    assert all(layer.flix_state is twin.flix_state for _, layer in flix_layers(twin))
    assert twin.flix_state.bank is twin.flix_bank
    assert_close(twin(TOKENS, flix_features=ids, flix_weights=weights), wanted)
    with torch.no_grad():
        for parameter in trainable_parameters(twin):
            parameter.zero_()
    assert_close(model(TOKENS, flix_features=ids, flix_weights=weights), wanted)
    assert_far(twin(TOKENS, flix_features=ids, flix_weights=weights), wanted)


def test_saving_by_torch_keeps_the_model():
    model = net()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin, ids = torch.load(file, weights_only=False), routing()[0]
    assert_close(twin(TOKENS, flix_features=ids), model(TOKENS, flix_features=ids))


def test_a_state_dict_goes_into_another_model():
    model, other = net(), adapt(Net().double(), config(**SETTINGS))
    other.load_state_dict(model.state_dict())
    ids = routing()[0]
    assert_close(other(TOKENS, flix_features=ids), model(TOKENS, flix_features=ids))


def test_the_bank_moves_and_changes_dtype_with_its_model():
    model, ids = net(), routing()[0]
    with torch.no_grad():
        wanted = model(TOKENS, flix_features=ids)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model.to(dtype)
            assert {p.dtype for p in trainable_parameters(model)} == {dtype}
            found = model(TOKENS, flix_features=ids)
            assert found.dtype == dtype and (found.double() - wanted).abs().max() < 0.1
    model.half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.to("meta").flix_bank.parameter(("task", "ner")).is_meta


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_layer_by_hand_moves_with_its_features(kind):
    make = {
        "linear": lambda: FlixLinear(6, 5, config=config(), name="layer"),
        "embedding": lambda: FlixEmbedding(6, 5, config=config(), name="layer"),
    }[kind]
    layer = make()
    randomize(layer)
    x = torch.randn(4, 3, 6) if kind == "linear" else torch.ones(4, 3, dtype=torch.int64)
    ids = routing()[0]
    wanted = layer(x, flix_features=ids)
    assert set(dict(layer.named_parameters())) >= {"weight", "flix_bank.task:ner"}
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x, flix_features=ids), wanted)
    assert twin.flix_state.bank is twin.flix_bank is not layer.flix_bank
    twin.half()
    assert {p.dtype for p in twin.parameters()} == {torch.float16}
    half = twin(x.half() if kind == "linear" else x, flix_features=ids)
    assert half.dtype == torch.float16 and (half.float() - wanted).abs().max() < 0.05
    other = make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, flix_features=ids), wanted)


def test_a_layer_of_a_model_changes_dtype_alone():
    """The features stay as they are, and are read in the input's precision."""
    model, ids = net(), routing()[0]
    wanted = model.up(torch.ones(4, 3, 6).double(), flix_features=ids)
    model.up.to(torch.float32)
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float64}
    found = model.up(torch.ones(4, 3, 6), flix_features=ids)
    assert found.dtype == torch.float32 and (found - wanted).abs().max() < 1e-5
    found.sum().backward()
    assert parameters_of(model)["task", "pos"].grad.dtype == torch.float64


def test_a_deep_copy_of_one_layer_works_by_itself():
    model, ids = net(), routing()[0]
    twin, x = copy.deepcopy(model.up), torch.ones(4, 3, 6).double()
    assert torch.equal(twin(x, flix_features=ids), model.up(x, flix_features=ids))


def test_a_sequential_keeps_its_steps():
    model = adapt(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU()), config())
    assert len(model) == 2 and [type(m).__name__ for m in model] == ["FlixLinear", "ReLU"]
    assert isinstance(model[-1], torch.nn.ReLU) and isinstance(model.flix_bank, Bank)
    assert model(torch.ones(4, 6), flix_features=routing()[0]).shape == (4, 5)


def test_a_model_that_runs_its_children_in_turn_runs_past_the_bank():
    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

        def forward(self, x):
            for child in self.children():
                x = child(x)
            return x

    model = adapt(Chain(), config())
    x, ids = torch.ones(4, 6), routing()[0]
    with route(registry(), ids):
        wanted = model.second(model.first(x))
    assert_close(model(x, flix_features=ids), wanted)


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_values_changed_between_a_forward_and_its_backward_are_refused(strategy):
    model, ids = (
        adapt(Net().double(), config(target_modules=["up"]), strategy=strategy),
        routing()[0],
    )
    loss = model(TOKENS, flix_features=ids).sum()
    with torch.no_grad():
        parameters_of(model)["language", "zul"].add_(1.0)  # absent from the batch
        parameters_of(model)["language", "hau"].add_(1.0)
    with pytest.raises(RuntimeError, match="values of language=hau were changed between a forward"):
        loss.backward()


def test_frozen_features_cost_no_gradient():
    model, ids = net(), routing()[0]
    for feature, parameter in parameters_of(model).items():
        parameter.requires_grad_(feature[0] == "language")
    model(TOKENS, flix_features=ids).sum().backward()
    trained = {f for f, p in parameters_of(model).items() if p.grad is not None}
    assert trained == {("language", "hau"), ("language", "swa")}
    model.requires_grad_(False)
    assert not model(TOKENS, flix_features=ids).requires_grad


def test_one_routing_serves_many_steps_of_a_layer_by_hand():
    """Under ``route`` the values may change between calls, and each backward belongs to its own forward."""
    layer = FlixLinear(6, 5, config=config(), name="layer").double()
    randomize(layer)
    ids, x = routing()[0], torch.randn(4, 3, 6, dtype=torch.float64)
    optimizers = []
    for fused in (False, True):
        twin = copy.deepcopy(layer)
        optimizer = torch.optim.AdamW(twin.flix_bank.parameters(), 0.1, fused=fused)
        with route(registry(), ids):
            for _ in range(3):
                optimizer.zero_grad()
                twin(x).square().sum().backward()
                optimizer.step()
                with torch.no_grad():
                    assert torch.equal(twin(x), twin(x, flix_features=ids))
        optimizers.append(twin)
    one, two = (dict(twin.named_parameters()) for twin in optimizers)
    for name, parameter in one.items():
        torch.testing.assert_close(two[name], parameter)
    plain = copy.deepcopy(layer)
    optimizer = torch.optim.AdamW(plain.flix_bank.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        plain(x, flix_features=ids).square().sum().backward()
        optimizer.step()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, one[name]), name


def test_gradients_reach_features_twice_when_a_graph_is_kept():
    model, ids = net(), routing()[0]
    loss = model(TOKENS, flix_features=ids).sum()
    loss.backward(retain_graph=True)
    once = {f: p.grad.clone() for f, p in parameters_of(model).items() if p.grad is not None}
    loss.backward()
    for feature, gradient in once.items():
        torch.testing.assert_close(parameters_of(model)[feature].grad, 2 * gradient)


def test_merging_reads_the_composition_alone(monkeypatch):
    model, read = net(), []
    arrays = Bank.arrays
    monkeypatch.setattr(Bank, "arrays", lambda self, some: read.extend(some) or arrays(self, some))
    merge(model, {"language": "swa"})
    assert read == [("language", "swa")]


def test_ranks_of_zero_leave_no_parameter_and_no_update():
    model = adapt(Net().double(), config(**SETTINGS, ranks={"language": {"hau": 0, "swa": 0, "yor": 0, "zul": 1}, "task": 0}))  # fmt: skip
    assert set(parameters_of(model)) == {("language", "zul")}
    ids = registry().encode([{"language": "hau", "task": "ner"}] * 4).ids
    out = model(TOKENS, flix_features=torch.from_numpy(ids))
    assert_close(out, model(TOKENS, flix_features=torch.full((4, 1), -1)))


def test_weights_without_features_are_refused_by_layers_too():
    model = net()
    with pytest.raises(RoutingError, match="weights belong to ids"):
        model.up(torch.ones(4, 6).double(), flix_weights=torch.ones(4, 1))
    with pytest.raises(RoutingError, match="weights belong to ids"):
        model(TOKENS, flix_weights=torch.ones(4, 1))


def test_rows_train_their_own_features_over_many_optimizer_steps():
    """Absent features stay bit for bit, whatever momentum and decay they have gathered, in every layer."""
    model = net()
    optimizer = torch.optim.AdamW(trainable_parameters(model), 0.1, weight_decay=0.5)
    for rows in (ROWS, [{"language": "zul"}] * 4, [{"task": "ner"}] * 4):
        before = {f: p.detach().clone() for f, p in parameters_of(model).items()}
        ids, weights = routing(rows)
        optimizer.zero_grad()
        model(TOKENS, flix_features=ids, flix_weights=weights).square().sum().backward()
        optimizer.step()
        moved = {f for f, p in parameters_of(model).items() if not torch.equal(p, before[f])}
        active = {f for i in ids.unique().tolist() if i >= 0 for f in [registry().features[i]]}
        assert moved == active - {("language", "yor")}

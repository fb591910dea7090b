"""Tenants train in mixed batches, and each ends where it would have ended alone."""

from __future__ import annotations

import functools
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from flix import ConfigError, FeatureError, RoutingError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    Tenants,
    adapt,
    page,
    thaw,
)
from tests.helpers.tenants import (  # noqa: E402
    LIMITS,
    NAMES,
    OPTIMIZERS,
    RANKS,
    alone,
    batches,
    config,
    difference,
    model,
    pairs,
    together,
    tokens_of,
    train,
)
from tests.helpers.torch import make, parameters_of  # noqa: E402


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_each_ends_where_it_would_have_ended_alone(name):
    made, rows, seen = model(name), batches(), []
    start = {f: p.detach().clone() for f, p in parameters_of(made).items()}
    tenants = together(made)
    train(tenants, rows, seen)
    for tenant in NAMES:
        expected, losses = alone(name, tenant, rows, LIMITS.get(tenant, math.inf))
        found = parameters_of(made)["tenant", tenant].detach()
        assert tenants[tenant].taken == len(losses) >= 20
        assert difference(found, expected) < 1e-9
        assert difference(found, start["tenant", tenant]) > 1e-2  # it did train
        mine = [losses[tenant] for moved, losses in seen if tenant in moved]
        assert mine == pytest.approx(losses, abs=1e-9)
    assert tenants.active == ("ann", "ben", "dan", "eve")
    assert torch.equal(parameters_of(made)["base", "all"], start["base", "all"])


def test_in_parts_each_ends_where_it_ends_in_one_batch():
    rows = batches(20)
    whole, parted = together(model()), together(model())
    train(whole, rows)
    train(parted, rows, parts=4)
    for tenant in NAMES:
        found, expected = (parameters_of(t.model)["tenant", tenant] for t in (parted, whole))
        assert parted[tenant].taken == whole[tenant].taken > 5
        assert difference(found, expected) < 1e-9
    with pytest.raises(ConfigError, match="rows must be"):
        whole.parts(whole.model.flix_config.registry.encode([{"tenant": "ann"}]), 0)


def test_matrices_give_optimizers_the_shapes_that_pefts_lora_has():
    peft = pytest.importorskip("peft")
    made, rows = model(), batches(25, ["ann", "ben"])
    made.requires_grad_(False)
    for feature, parameter in parameters_of(made).items():
        parameter.requires_grad_(feature in (("tenant", "ann"), ("tenant", "ben")))
    with torch.no_grad():  # PEFT's has no second adapter that all rows share
        parameters_of(made)["base", "all"].zero_()
    kinds = {
        "ann": functools.partial(torch.optim.Adafactor, weight_decay=0.1),
        "ben": torch.optim.Muon,
    }
    references = {}
    for tenant, kind in kinds.items():
        rank = RANKS["tenant"][tenant]
        settings = peft.LoraConfig(
            r=rank, lora_alpha=4.0, target_modules="all-linear", fan_in_fan_out=True
        )
        lora = peft.get_peft_model(make("gpt2"), settings).double()
        for path, (a, b) in pairs(made, tenant).items():
            layer = lora.base_model.model.get_submodule(path)
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
        parameters = [p for p in lora.parameters() if p.requires_grad]
        optimizer = kind(parameters, lr=1e-2)
        for owners, tokens, labels in rows:
            mine = [i for i, owner in enumerate(owners) if owner == tenant]
            if not mine:
                continue
            logits = lora(input_ids=tokens[mine]).logits
            torch.nn.functional.cross_entropy(logits.mT, labels[mine]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        references[tenant] = {
            path: tuple(
                getattr(lora.base_model.model.get_submodule(path), side)["default"].weight.detach()
                for side in ("lora_A", "lora_B")
            )
            for path in pairs(made, tenant)
        }
    tenants = Tenants(made, "tenant", kinds, lr=1e-2, max_norm=0.1, matrices=True)
    train(tenants, rows)
    for tenant, expected in references.items():
        for path, found in pairs(made, tenant).items():
            assert max(map(difference, found, expected[path])) < 1e-9, (tenant, path)


def test_a_compiled_model_trains_them_alike():
    rows = batches(4)
    found = []
    for compiled in (False, True):
        made = model()
        tenants = together(made)
        run = torch.compile(made, backend="aot_eager") if compiled else made
        moved = []
        for owners, tokens, _ in rows:
            routing = made.flix_config.registry.encode([{"tenant": owner} for owner in owners])
            ids = torch.from_numpy(routing.ids)
            logits = run(input_ids=tokens, flix_features=ids, use_cache=False).logits
            logits.square().mean().backward()
            moved.append(tenants.step())  # without losses(): by who has a gradient alone
        assert moved == [tuple(n for n in NAMES if n in owners) for owners, *_ in rows]
        found.append({f: p.detach().clone() for f, p in parameters_of(made).items()})
    assert max(difference(found[0][f], found[1][f]) for f in found[0]) < 1e-12


@pytest.mark.parametrize("matrices", [False, True])
def test_paged_features_train_alike(matrices):
    found = []
    for paged in (False, True):
        made = model()
        if paged:
            page(made, 1 << 20)
        optimizers = OPTIMIZERS["ann"] if matrices else {n: OPTIMIZERS[n] for n in NAMES}
        tenants = together(made, matrices=matrices, optimizer=optimizers)
        train(tenants, batches(5))
        found.append({f: p.detach().clone() for f, p in parameters_of(made).items()})
    assert all(torch.equal(found[0][f], found[1][f]) for f in found[0])


def test_a_tenant_without_anything_to_count_takes_no_step():
    made = model()
    tenants = together(made)
    owners, tokens = ["ann", "ben"], torch.ones(2, 7, dtype=torch.long)
    labels = tokens.clone()
    labels[0] = -100
    before = {n: parameters_of(made)["tenant", n].detach().clone() for n in owners}
    seen = []
    train(tenants, [(owners, tokens, labels)], seen)
    assert [(moved, list(said)) for moved, said in seen] == [(("ben",), ["ben"])]
    assert torch.equal(parameters_of(made)["tenant", "ann"], before["ann"])
    assert not torch.equal(parameters_of(made)["tenant", "ben"], before["ben"])


def test_accumulated_batches_are_one_step():
    first, second = batches(2)
    made = model()
    tenants = together(made)
    for batch in (first, second):
        losses, routing, counts = tokens_of(made, *batch)
        sum(tenants.losses(losses, routing, counts).values()).backward()
    assert set(tenants.step()) == {*first[0], *second[0]}
    assert all(tenants[n].taken <= 1 for n in tenants)
    assert tenants.step() == ()  # the gradients are gone


def test_weights_and_frozen_features_act_as_they_do_alone():
    made = model()
    tenants = together(made)
    tokens = torch.arange(1, 22).view(3, 7)
    registry = made.flix_config.registry
    routing = registry.encode([{"tenant": {"ann": 0.5}}, {"tenant": "ben"}, {"base": "all"}])
    losses = made(input_ids=tokens, flix_features=routing).logits.square().mean((1, 2))
    found = tenants.losses(losses, routing)
    assert list(found) == ["ann", "ben"]
    assert torch.equal(found["ann"], losses[0])
    with pytest.raises(RoutingError, match="row 1 names tenant=ann and tenant=cyd; a row of tenants names one"):  # fmt: skip
        two = registry.encode([{"tenant": "ann"}, {"tenant": ["ann", "cyd"]}])
        tenants.losses(losses[:2], two)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": {"ann": 1e-3, "bob": 1}}, FeatureError, r"lr names 'bob'.*; the tenants are ann, ben"),
        ({"lr": {"ann": 1e-3}}, ConfigError, "lr must name every tenant, but 'ben' is missing"),
        ({"steps": 0}, ConfigError, "steps of 'ann' must be a whole number of 1 or more, got 0"),
        ({"max_norm": -1.0}, ConfigError, "max_norm of 'ann' must be a positive number, got -1.0"),
        ({"optimizer": torch.optim.LBFGS}, ConfigError, "LBFGS cannot train tenants: it needs a closure"),
        ({"optimizer": torch.optim.SparseAdam}, ConfigError, "SparseAdam cannot train tenants"),
        ({"optimizer": lambda p, lr: None}, ConfigError, "optimizer must make a torch.optim.Optimizer, got None for 'ann'"),
        ({"optimizer": lambda p, lr: torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr)}, ConfigError, "the SGD of 'ann' holds other parameters"),
        ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, ConfigError, r"ReduceLROnPlateau of 'ann' cannot be a tenant's schedule: its step\(\) needs"),
        ({"schedule": lambda o: torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1))}, ConfigError, "the schedule of 'ann' is of another optimizer"),
    ],
)  # fmt: skip
def test_settings_that_cannot_serve_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        Tenants(model(), "tenant", **{"optimizer": torch.optim.SGD, "lr": 0.1, **settings})


def test_models_that_would_couple_tenants_are_refused():
    made = model()
    thaw(made, {"base": "all"})
    made.lm_head.weight.requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"base=all, .* would also train, on the rows of several tenants"
    ):
        together(made)
    with pytest.raises(FeatureError, match="no feature group 'tennant'"):
        Tenants(model(), "tennant", torch.optim.SGD)
    made = model().requires_grad_(False)
    with pytest.raises(ConfigError, match="no feature of group 'tenant' trains; thaw"):
        together(made)

    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    tenants = Tenants(adapt(layers, config(["ann", "ben"])).requires_grad_(False) and thaw(layers, {"tenant": ["ann", "ben"]}), "tenant", torch.optim.SGD)  # fmt: skip
    with pytest.raises(ConfigError, match="the layer '1' normalises over the batch"):
        tenants.step()
    layers[1].eval()
    assert tenants.step() == ()

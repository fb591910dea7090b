"""Tenants train in mixed batches, and each ends where it would have ended alone."""

from __future__ import annotations

import functools
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import AdapterError, ConfigError, FeatureError, RoutingError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    Tenants,
    adapt,
    add_feature,
    load_features,
    page,
    thaw,
)
from tests.helpers.torch import make, parameters_of  # noqa: E402

NAMES = ["ann", "ben", "cyd", "dan", "eve"]
RANKS = {"tenant": {"ann": 1, "ben": 3, "cyd": 2, "dan": 2, "eve": 2, "fay": 2}, "base": {"all": 2}}
STEPS = 50


class Lion(torch.optim.Optimizer):
    """Steps by signs, as users write their own."""

    def __init__(self, params, lr, beta=0.95, decay=0.1):
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["decay"])
                p.sub_(group["lr"] * mean.lerp(p.grad, 0.1).sign())
                mean.lerp_(p.grad, 1 - group["beta"])


OPTIMIZERS = {
    "ann": functools.partial(torch.optim.AdamW, fused=True, weight_decay=0.1),
    "ben": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "cyd": Lion,
    "dan": torch.optim.Adafactor,
    "eve": functools.partial(torch.optim.NAdam, foreach=True),
    "fay": functools.partial(torch.optim.AdamW, amsgrad=True),
}
RATES = {"ann": 3e-3, "ben": 5e-2, "cyd": 1e-3, "dan": 1e-2, "eve": 2e-3, "fay": 1e-3}
SCHEDULES = {
    "ann": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: min(1.0, (n + 1) / 9)),
    "ben": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
    "eve": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 5e-3, total_steps=60),
}
LIMITS = {"cyd": 20}
NORMS = {"ann": 0.05, "dan": 0.5, "eve": 0.1}


def config(names, **changes):
    groups = {"tenant": list(names), "base": ["all"]}
    ranks = {"tenant": {n: RANKS["tenant"].get(n, 2) for n in names}, "base": {"all": 2}}
    registry = flix.FeatureRegistry(groups, implies={("tenant", "*"): [("base", "all")]})
    return flix.FlixConfig(registry=registry, ranks=ranks, alpha=4.0, **changes)


def model(name="gpt2", names=NAMES, **changes):
    """A model with updates that are not zero, whose tenants share a frozen feature."""
    made = adapt(make(name), config(names, **changes))
    for (group, feature), parameter in parameters_of(made).items():
        generator = torch.Generator().manual_seed(sum(map(ord, group + feature)))
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.copy_(0.05 * noise)
        parameter.requires_grad_(group == "tenant")
    return made


def batches(steps=STEPS, names=NAMES, seed=0):
    """Shuffled rows of some tenants, one to three of each, some of their labels left out."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        draw = torch.randint(0, 4, (len(names),), generator=generator).tolist()
        owners = [n for n, count in zip(names, draw, strict=True) for _ in range(count)]
        owners = owners or [names[step % len(names)]]
        owners = [owners[i] for i in torch.randperm(len(owners), generator=generator)]
        tokens = torch.randint(1, 40, (len(owners), 7), generator=generator)
        labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, -100)
        labels[:, -1] = tokens[:, -1]
        found.append((owners, tokens, labels))
    return found


def tokens_of(made, owners, tokens, labels):
    """The loss of each label before any mean, and which count."""
    routing = made.flix_config.registry.encode([{"tenant": owner} for owner in owners])
    inputs = {"input_ids": tokens}
    if made.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(1)
    logits = made(**inputs, flix_features=routing).logits
    found = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return found, routing, labels != -100


def train(tenants, rows, seen=None, parts=None):
    for batch in rows:
        if parts is not None:
            train_in_parts(tenants, batch, parts)
            continue
        losses, routing, counts = tokens_of(tenants.model, *batch)
        means = tenants.losses(losses, routing, counts)
        total = sum(means.values())
        if total.requires_grad:
            total.backward()
        moved = tenants.step()
        if seen is not None:
            seen.append((moved, {name: value.item() for name, value in means.items()}))


def train_in_parts(tenants, batch, most):
    owners, tokens, labels = batch
    registry = tenants.model.flix_config.registry
    routing = registry.encode([{"tenant": owner} for owner in owners])
    for part in tenants.parts(routing, most):
        own = [owners[i] for i in part]
        losses, own_routing, counts = tokens_of(tenants.model, own, tokens[part], labels[part])
        assert own_routing.ids.tolist() == routing[part].ids.tolist()
        total = sum(tenants.losses(losses, routing[part], counts).values())
        if total.requires_grad:
            total.backward()
    tenants.step()


def alone(name, tenant, rows, limit=math.inf):
    """One tenant's run as anybody writes it: its rows, the mean loss, torch's clipping, optimizer and schedule."""
    made = model(name, [tenant])
    parameter = parameters_of(made)["tenant", tenant]
    optimizer = OPTIMIZERS[tenant]([parameter], lr=RATES[tenant])
    schedule = SCHEDULES[tenant](optimizer) if tenant in SCHEDULES else None
    taken, losses = 0, []
    for owners, tokens, labels in rows:
        mine = [i for i, owner in enumerate(owners) if owner == tenant]
        if not mine or taken == limit:
            continue
        found, _, counts = tokens_of(made, [tenant] * len(mine), tokens[mine], labels[mine])
        loss = found.sum() / counts.sum()
        loss.backward()
        if tenant in NORMS:
            torch.nn.utils.clip_grad_norm_([parameter], NORMS[tenant])
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        taken += 1
        losses.append(loss.item())
    return parameter.detach(), losses


def together(made, **changes):
    names = made.flix_config.registry.names("tenant")
    mine = {k: {n: v[n] for n in names if n in v} for k, v in SETTINGS.items()}
    return Tenants(made, "tenant", **{**mine, **changes})


SETTINGS = {"optimizer": OPTIMIZERS, "lr": RATES, "schedule": SCHEDULES, "steps": LIMITS, "max_norm": NORMS}  # fmt: skip


def difference(a, b):
    return float((a - b).abs().max())


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


def pairs(made, tenant):
    from flix.backends.torch.layer import flix_layers

    feature = ("tenant", tenant)
    return {
        path: (layer.flix_A[feature].detach().clone(), layer.flix_B[feature].detach().clone())
        for path, layer in flix_layers(made)
    }


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


def test_a_tenant_that_diverges_leaves_the_others_alone():
    rows = batches(12)
    made = model()
    tenants = together(
        made, lr={n: RATES[n] for n in NAMES} | {"ben": 1e200}, max_norm={"ann": 0.05, "eve": 0.1}
    )
    with pytest.warns(UserWarning, match="tenant=ben"):
        train(tenants, rows)
    assert not parameters_of(made)["tenant", "ben"].isfinite().all()
    for tenant in ("ann", "eve"):
        expected, _ = alone("gpt2", tenant, rows)
        assert difference(parameters_of(made)["tenant", tenant].detach(), expected) < 1e-9


def test_a_tenant_is_saved_and_resumed_apart(tmp_path):
    rows = batches(30)
    whole = model()
    train(together(whole), rows)

    made = model()
    tenants = together(made)
    train(tenants, rows[:15])
    for tenant in NAMES:
        tenants.save(tenant, tmp_path / tenant)
    again = model(names=["ben", "ann", "eve"])  # other ids, and one that joins later
    others = Tenants(
        again, "tenant", OPTIMIZERS["ann"], lr=RATES["ann"], schedule=SCHEDULES["ann"], max_norm=1.0
    )
    for tenant in ("ann", "ben", "dan", "eve", "cyd"):
        settings = {k: v.get(tenant) for k, v in SETTINGS.items() if k != "steps"}
        others.resume(tenant, tmp_path / tenant, **settings)
        assert others[tenant].taken == tenants[tenant].taken
    assert others["cyd"].limit == 20
    train(others, rows[15:])
    for tenant in NAMES:
        found, expected = (parameters_of(m)["tenant", tenant].detach() for m in (again, whole))
        assert difference(found, expected) < 1e-12, tenant
    served = load_features(model(names=["zoe"]), tmp_path / "dan")
    saved = parameters_of(made)["tenant", "dan"]
    assert torch.equal(parameters_of(served)["tenant", "dan"], saved)


def test_a_tenant_goes_back_to_what_was_saved(tmp_path):
    made, rows = model(), batches(12)
    tenants = together(made)
    train(tenants, rows[:6])
    tenants.save("eve", tmp_path)
    train(tenants, rows[6:])
    once = parameters_of(made)["tenant", "eve"].detach().clone()
    tenants.resume("eve", tmp_path)
    train(tenants, rows[6:])
    assert difference(parameters_of(made)["tenant", "eve"].detach(), once) < 1e-10


def test_tenants_join_leave_and_change_names_in_the_middle():
    names = [*NAMES, "fay"]
    rows = batches(10), batches(20, names, 1), batches(10, ["ann", "cyd", "fay", "eva"], 2)
    made = model()
    tenants = together(made)
    train(tenants, rows[0])
    tenants.join("fay", 2, **{k: v.get("fay") for k, v in SETTINGS.items()})
    with torch.no_grad():
        start = parameters_of(model(names=["fay"]))["tenant", "fay"]
        parameters_of(made)["tenant", "fay"].copy_(start)
    train(tenants, rows[1])
    tenants.leave("ben")
    tenants.leave("dan", remove=False)
    tenants.rename("eve", "eva")
    train(tenants, rows[2])
    assert list(tenants) == ["ann", "cyd", "eva", "fay"]
    assert ("tenant", "ben") not in made.flix_config.registry
    for tenant in ("ann", "cyd", "eve", "fay"):
        now = {"eve": "eva"}.get(tenant, tenant)
        renamed = [
            ([tenant if o == now else o for o in owners], *rest) for owners, *rest in rows[2]
        ]
        expected, _ = alone("gpt2", tenant, [*rows[0], *rows[1], *renamed], LIMITS.get(tenant, 99))
        found = parameters_of(made)["tenant", now].detach()
        assert difference(found, expected) < 1e-9, tenant


def test_a_stopped_tenant_keeps_its_bits_while_its_rows_still_come():
    made, rows, seen = model(), batches(8), []
    tenants = together(made)
    train(tenants, rows[:4])
    tenants.stop("ann")
    before = parameters_of(made)["tenant", "ann"].detach().clone()
    train(tenants, rows[4:], seen)
    assert torch.equal(parameters_of(made)["tenant", "ann"], before)
    assert all("ann" not in moved for moved, _ in seen) and any("ann" in said for _, said in seen)
    assert "ann" not in tenants.active
    tenants.go_on("ann", steps=tenants["ann"].taken + 1)
    train(tenants, rows)
    assert not torch.equal(parameters_of(made)["tenant", "ann"], before)
    assert tenants["ann"].stopped
    with pytest.raises(ConfigError, match=r"'ann' has taken \d steps; steps must be more, got 2"):
        tenants.go_on("ann", 2)


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


def test_what_is_done_behind_tenants_backs_is_named():
    made = model()
    tenants = together(made)
    add_feature(made, "tenant", "gus", 2, freeze_others=False)
    losses, routing, counts = tokens_of(made, *batches(1, ["gus", "ann"], 3)[0])
    with pytest.raises(ConfigError, match=r"tenant=gus has rows and trains, but is no tenant: join\('gus'\)"):  # fmt: skip
        tenants.losses(losses, routing, counts)
    add_feature(made, "tenant", "hal", 2)
    with pytest.raises(ConfigError, match="the tenant 'ann' was frozen from outside"):
        tenants.step()
    thaw(made, {"tenant": NAMES})
    made.remove = flix.backends.get("torch").remove_feature(made, "tenant", "ben")
    with pytest.raises(ConfigError, match="the tenant 'ben' has changed: its feature was"):
        tenants.step()


def test_files_of_others_are_refused(tmp_path):
    made = model()
    tenants = together(made)
    tenants.save("ann", tmp_path / "ann")
    with pytest.raises(AdapterError, match=r"not a tenant's folder: it has no flix_tenant\.pt"):
        tenants.resume("ben", tmp_path)
    with pytest.raises(AdapterError, match="is 'tenant=ann', not tenant=ben"):
        tenants.resume("ben", tmp_path / "ann")
    with pytest.raises(ConfigError, match="the optimizer of tenant=ann was AdamW when it was saved, and is SGD here"):  # fmt: skip
        tenants.resume("ann", tmp_path / "ann", optimizer=torch.optim.SGD)
    other = model(rank_pattern={".*c_attn": {"tenant": {"ann": 2}}})
    with pytest.raises(AdapterError, match=r"is of another model: tenant=ann has \[layer, rank"):
        together(other).resume("ann", tmp_path / "ann")
    (tmp_path / "ann" / "flix_tenant.pt").write_bytes(b"PK\x03\x04no")
    with pytest.raises(AdapterError, match="cannot be read"):
        tenants.resume("ann", tmp_path / "ann")
    assert tenants.active == tuple(NAMES)  # as it was
    odd = together(model(), optimizer=lambda p, lr: Odd(p, lr))
    with pytest.raises(ConfigError, match=r"the state of tenant=ann .* cannot be saved"):
        odd.save("ann", tmp_path / "odd")


class Odd(torch.optim.SGD):
    def state_dict(self):
        return {**super().state_dict(), "odd": Lion}

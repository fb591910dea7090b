"""Tenants stop, join, leave, diverge, and are saved and resumed, and the others never notice."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import flix  # noqa: E402
from flix import AdapterError, ConfigError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    Tenants,
    add_feature,
    load_features,
    thaw,
)
from tests.helpers.tenants import (  # noqa: E402
    LIMITS,
    NAMES,
    OPTIMIZERS,
    RATES,
    SCHEDULES,
    SETTINGS,
    Lion,
    alone,
    batches,
    difference,
    model,
    together,
    tokens_of,
    train,
)
from tests.helpers.torch import parameters_of  # noqa: E402


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

"""Features over a model's life: they join, leave, get other names, come from files and rest."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flix
from flix.backends.jax import (
    FlixOptimizer,
    adamw,
    adapt,
    add_feature,
    freeze,
    import_peft,
    linear,
    load,
    load_features,
    named_pairs,
    primitives,
    remove_feature,
    rename_feature,
    save,
    summary,
    thaw,
    to_adapter,
    to_bank,
    value_and_grad,
)
from flix.backends.jax.adapt import flix_layers
from tests.helpers.jax import TOKENS, Net, adapted, random_bank, randomize
from tests.helpers.loras import write_lora
from tests.helpers.registry import IDS, WEIGHTS, config, registry
from tests.helpers.tolerance import assert_all_close, assert_close, assert_far, same_bits

LAYERS = {"q": (5, 7), "table": (9, 3, "embedding")}


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 5)), jnp.float32)


KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)


FEW = ["embed", "back"]


def bits(source: Any) -> dict[str, bytes]:
    return {name: np.asarray(value).tobytes() for name, value in named_pairs(source).items()}


def without(found: dict[str, bytes], *features: str) -> dict[str, bytes]:
    return {name: v for name, v in found.items() if not name.endswith(features)}


class Two(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.relu(self.up(x)))


def two(**changes: Any) -> tuple[Any, Any]:
    """An adapted model, and its base."""
    base, model = Two(), adapt(Two(), config(**changes))
    randomize(model)
    return model, base


FLOATS = np.random.default_rng(0).normal(size=(5, 4)).astype("f")


@nnx.jit
def forward(model: Any, ids: Any, weights: Any = None, tokens: Any = TOKENS) -> Any:
    return model(tokens, flix_features=ids, flix_weights=weights)


def loss_of(model: Any, ids: Any) -> Any:
    return (model(FLOATS, flix_features=ids) ** 2).mean()


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train(model: Any, optimizer: Any, ids: Any) -> Any:
    value, grads = value_and_grad(loss_of)(model, ids)
    optimizer.update(model, grads)
    return value


@pytest.mark.covers("nnx", "remove", backend="jax")
def test_removed_features_leave_the_rest_as_it_was() -> None:
    model = adapted(target_modules=FEW)
    source = (model.flix_config, {path: layer.bank for path, layer in flix_layers(model)})
    before = bits(model)
    ids = np.where(IDS == 1, -1, IDS)  # without swa
    y = forward(model, ids, WEIGHTS)
    cfg, bank = remove_feature(source, "language", "swa")
    assert remove_feature(model, "language", "swa") is model
    kept = without(before, "language.swa")
    assert bits(model) == bits((cfg, bank)) == kept
    assert bits(source) == before  # what was given is not changed
    assert cfg == model.flix_config
    assert [cfg.registry.id("task", name) for name in ("ner", "pos")] == [4, 5]
    assert_close(forward(model, ids, WEIGHTS), y)
    with pytest.raises(flix.RoutingError, match="language=swa, which was removed"):
        model(TOKENS, flix_features=IDS)
    assert np.isnan(np.asarray(forward(model, IDS))[[1, 4]]).all()
    assert np.isfinite(np.asarray(forward(model, IDS))[[0, 2, 3]]).all()
    with pytest.raises(flix.FeatureError, match="was removed"):
        remove_feature(model, "language", "swa")


@pytest.mark.parametrize("strategy", ["gather", "masked", "single"])
@pytest.mark.parametrize("path", ["q", "bare"])
def test_traced_ids_of_removed_features_are_nan(strategy: str, path: str) -> None:
    """Also in a layer where no feature is left with an update."""
    cfg = config(rank_pattern={"bare": {("language", "swa"): 1, "language": 0, "task": 0}})
    source = (cfg, random_bank(cfg, {path: (5, 7)}))
    _, bank = remove_feature(source, "language", "swa")
    run = jax.jit(functools.partial(linear, strategy=strategy))
    ids = np.array([[1, 4], [1, 4]])
    assert np.isnan(run(X, KERNEL, bank[path], ids)).all()
    assert np.isfinite(run(X, KERNEL, bank[path], np.where(ids == 1, 0, ids))).all()
    with pytest.raises(flix.RoutingError, match="was removed"):
        linear(X, KERNEL, bank[path], ids)


def test_a_removed_feature_comes_back_under_its_id_and_trains() -> None:
    model = two()[0]
    freeze(model, {"language": "swa"})
    remove_feature(model, "language", "swa")
    add_feature(model, "language", "swa", rank=2)
    assert model.flix_config.registry.id("language", "swa") == 1
    before = bits(model)
    optimizer = FlixOptimizer(model, optax.adamw(1e-2, weight_decay=0.1))
    for _ in range(2):
        train(model, optimizer, IDS)
    after = bits(model)
    assert {n for n in after if after[n] != before[n]} == {
        n for n in after if n.endswith("language.swa")
    }


@pytest.mark.covers("nnx", "rename", backend="jax")
def test_renaming_keeps_ids_values_and_the_optimizers_state() -> None:
    runs = []
    for renamed in (False, True):
        model = two()[0]
        optimizer = FlixOptimizer(model, adamw(1e-2))
        train(model, optimizer, IDS)
        if renamed:
            tables = [layer.flix_A for _, layer in flix_layers(model)]
            before = bits(model)
            rename_feature(model, "language", "swa", "kiswahili")
            assert {n.replace("kiswahili", "swa"): v for n, v in bits(model).items()} == before
            assert model.flix_config.registry.id("language", "kiswahili") == 1
            after = [layer.flix_A for _, layer in flix_layers(model)]
            assert all(a is b for a, b in zip(tables, after, strict=True))
        train(model, optimizer, IDS)
        runs.append(named_pairs(model))
    assert_all_close({n.replace("kiswahili", "swa"): v for n, v in runs[1].items()}, runs[0])
    source = (config(), random_bank(config(), LAYERS))
    cfg, bank = rename_feature(source, "task", "ner", "names")
    assert bank["q"].A is source[1]["q"].A
    tx = optax.adam(1e-2)
    state = jax.tree.unflatten(
        jax.tree.structure(tx.init(bank)), jax.tree.leaves(tx.init(source[1]))
    )
    tx.update(bank, state, bank)
    with pytest.raises(flix.FeatureError, match="exists"):
        rename_feature((cfg, bank), "task", "names", "pos")


def test_frozen_features_stay_frozen_through_changes() -> None:
    model = two()[0]
    freeze(model, {"task": "pos"})
    freeze(model, [("language", "hau")])
    remove_feature(model, "language", "zul")
    rename_feature(model, "task", "pos", "tagging")
    add_feature(model, "language", "fra", rank=2, freeze_others=False)
    other = two(target_modules=["down"])[0]
    load_features(model, to_adapter(other), {"language": "zul"})
    for _, layer in flix_layers(model):
        assert layer.flix_spec.frozen == {0, 5}
    before = bits(model)
    optimizer = FlixOptimizer(model, optax.adamw(1e-2, weight_decay=0.1))
    train(model, optimizer, np.where(IDS == 2, 6, IDS))
    after = bits(model)
    still = ("language.hau", "task.tagging")
    assert {n for n in after if after[n] == before[n]} == {n for n in after if n.endswith(still)}
    thaw(model, {"language": "hau"})
    assert all(layer.flix_spec.frozen == {5} for _, layer in flix_layers(model))
    thaw(model)
    assert not any(layer.flix_spec.frozen for _, layer in flix_layers(model))
    with pytest.raises(flix.FeatureError, match="no feature 'nope'"):
        freeze(model, [("task", "nope")])


@pytest.mark.covers("nnx", "share a feature", backend="jax")
def test_one_features_file_loads_into_another_model(tmp_path: Path) -> None:
    donor = adapted(seed=0, target_modules=["back", "o"])
    rename_feature(donor, "language", "swa", "kin")
    save(donor, tmp_path, {"language": "kin"})
    stored = flix.load_adapter(tmp_path)
    assert stored.config.registry.features == (("language", "kin"),)
    model = adapted(target_modules=FEW)
    model.eval()
    before = bits(model)
    y = forward(model, IDS, WEIGHTS)
    assert load_features(model, tmp_path) is model
    assert ("language", "kin") in model.flix_config.registry.live
    after = bits(model)
    assert without(after, "language.kin") == before
    wanted = {n: v for n, v in bits(donor).items() if n.endswith("language.kin")}
    assert {n: v for n, v in after.items() if n.endswith("language.kin")} == wanted
    assert_close(forward(model, IDS, WEIGHTS), y)
    # The donor's other layer became an adapted one, in the model's mode.
    paths = dict(flix_layers(model))
    assert set(paths) == {"embed", "layers.0.back", "layers.0.o"}
    assert all(layer.deterministic for layer in paths.values())
    kin = model.flix_config.registry.encode([{"language": "kin"}] * 5)
    ids = donor.flix_config.registry.encode([{"language": "kin"}] * 5)
    donor.eval()
    assert_close(forward(model, kin.ids), forward(donor, ids.ids))
    save(model, tmp_path / "all")
    again = load(Net(), tmp_path / "all")
    assert bits(again) == after


@pytest.mark.covers("nnx", "import from PEFT", backend="jax")
def test_import_peft(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def pair(rank: int, d_in: int, d_out: int) -> Any:
        return tuple(rng.normal(size=s).astype("f") for s in ((rank, d_in), (d_out, rank)))

    first = {"mlp.up": pair(2, 4, 6), "mlp.down": pair(2, 6, 3)}
    second = {"mlp.up": pair(3, 4, 6)}
    folders = {
        "ner": write_lora(tmp_path / "ner", first, 4),
        "pos": write_lora(tmp_path / "pos", second, 6),
    }

    def rename(path: str) -> str:
        return path.removeprefix("mlp.")

    with pytest.raises(flix.AdapterError, match=r"no layer 'mlp\."):
        import_peft(Two(), folders, "task")
    plain = Two()
    model = import_peft(Two(), folders, "task", rename=rename)
    x = rng.normal(size=(2, 4)).astype("f")
    y = model(
        x, flix_features=model.flix_config.registry.encode([{"task": "ner"}, {"task": "pos"}])
    )
    for row, lora in enumerate((first, second)):
        h = x[row] @ np.asarray(plain.up.kernel) + np.asarray(plain.up.bias)
        a, b = lora["mlp.up"]
        h = np.maximum(h + 2 * b @ (a @ x[row]), 0)
        wanted = h @ np.asarray(plain.down.kernel) + np.asarray(plain.down.bias)
        if "mlp.down" in lora:
            a, b = lora["mlp.down"]
            wanted = wanted + 2 * b @ (a @ h)
        assert_close(y[row], wanted)
    # Into an adapted model, and into a bank.
    other = adapt(Two(), flix.FlixConfig(registry=registry(), ranks=1, target_modules=["up"]))
    assert import_peft(other, folders, "lora", rename=rename) is other
    assert other.flix_config.registry.names("lora") == ("ner", "pos")
    ids = other.flix_config.registry.encode([{"lora": "ner"}, {"lora": "pos"}])
    assert_close(other(x, flix_features=ids), y)
    source = to_bank(flix.from_peft(folders, "task"))
    assert bits(import_peft(source, folders, "task")) == bits(source)
    assert bits(source) == {f"mlp.{name}": value for name, value in bits(model).items()}


def test_add_feature_on_a_mesh_keeps_the_banks_placement() -> None:
    mesh = jax.make_mesh((1,), ("model",))
    spec = jax.sharding.PartitionSpec(None, "model")
    placed = jax.sharding.NamedSharding(mesh, spec)
    bank = jax.tree.map(lambda t: jax.device_put(t, placed), random_bank(config(), {"q": (5, 7)}))
    for changed in (
        add_feature((config(), bank), "language", "fra", rank=2),
        remove_feature((config(), bank), "language", "swa"),
    ):
        assert changed[1]["q"].A.sharding == placed


@pytest.mark.covers("nnx", "add a feature", backend="jax")
def test_add_feature() -> None:
    model = adapted()
    pairs = named_pairs(model)
    y = forward(model, IDS, WEIGHTS)
    add_feature(model, "language", "fra", rank=3)
    add_feature(model, "language", "kin", init_from="swa", freeze_others=False)
    assert model.flix_config.registry.id("language", "kin") == 7
    grown = named_pairs(model)
    assert all(same_bits(grown[name], value) for name, value in pairs.items())
    assert_close(forward(model, IDS, WEIGHTS), y)
    swa = {"language": "swa"}
    fra, kin = {"language": "fra"}, {"language": "kin"}
    routing = model.flix_config.registry.encode([swa, kin, fra, {}, {}], width=3)
    y = forward(model, routing.ids, tokens=np.tile(TOKENS[:1], (5, 1)))
    assert_close(y[1], y[0])
    assert_close(y[2], y[3])  # a fresh feature starts at zero
    assert_far(y[0], y[3])
    with pytest.raises(flix.RankError, match="needs a rank"):
        add_feature(model, "language", "zzz")
    with pytest.raises(flix.FeatureError, match="no feature 'nope'"):
        add_feature(model, "language", "zzz", init_from="nope")


def test_summary() -> None:
    model = adapt(Net(), config(target_modules=["back"]))
    found = summary(model)
    assert found.layers == ("layers.0.back",)
    assert found.features["language", "swa"] == 3 * 12
    assert found.trainable == 12 * 12
    assert found.total == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert "1 adapted layers; 144 trainable" in str(found)
    add_feature(model, "task", "sum", rank=1)
    assert summary(model).trainable == 12
    thaw(model)
    assert summary(model).trainable == 12 * 13


def test_a_model_is_read_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()[0]
    wanted = {path: layer.bank for path, layer in flix_layers(model)}
    calls: list[Any] = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tables: calls.append(1) or get(tables))
    monkeypatch.delattr("flix.backends.jax.LayerBank.pair")
    found = primitives.read(model)
    some = primitives.read(model, [("task", "pos"), ("language", "yor")])
    assert len(calls) == 2
    for path, layer in wanted.items():
        assert list(found[path]) == [f for f, _, _ in layer.pairs()]
        for feature, a, b in layer.pairs():
            assert same_bits(found[path][feature][0], a)
            assert same_bits(found[path][feature][1], b)
        assert list(some[path]) == [("task", "pos")]  # the other has rank 0


def test_tables_whose_rows_all_stay_are_left_as_they_are() -> None:
    model = two(rank_pattern={"up": {"language": 0}})[0]
    held = model.up.flix_A, model.down.flix_A
    values = held[0][...]
    add_feature(model, "language", "fra", rank=2)
    assert model.up.flix_A is held[0]
    assert model.up.flix_A[...] is values
    assert model.up.flix_spec.registry == model.flix_config.registry
    assert model.down.flix_A is not held[1]


def test_halves_are_read_as_float32_and_written_back_bit_for_bit() -> None:
    bank = jax.tree.map(lambda t: t.astype(jnp.bfloat16), random_bank(config(), LAYERS))
    source = (config(), bank)
    assert {v.dtype for v in named_pairs(source).values()} == {np.dtype("float32")}
    _, again = primitives.write(source, primitives.read(source))
    _, grown = add_feature(source, "language", "fra", rank=2)
    for path, layer in bank.items():
        assert again[path].A.dtype == grown[path].A.dtype == jnp.bfloat16
        assert same_bits(again[path].A, layer.A)
        assert same_bits(again[path].B, layer.B)
        assert same_bits(grown[path].pair("task", "pos")[0], layer.pair("task", "pos")[0])

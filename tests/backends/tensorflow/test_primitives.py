"""Features over a model's life: they leave, get other names, come from files, rest and are switched off."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import (
    adapt,
    add_feature,
    disable,
    freeze,
    import_peft,
    load,
    load_features,
    merge,
    named_pairs,
    remove_feature,
    rename_feature,
    save,
    summary,
    thaw,
    to_adapter,
)
from flix.core.adapter.files import load_adapter
from tests.helpers import tensorflow as models
from tests.helpers.claims import over
from tests.helpers.loras import write_lora
from tests.helpers.registry import config
from tests.helpers.tensorflow import randomize
from tests.helpers.tolerance import assert_all_close, assert_all_same_bits, assert_close

X = np.random.default_rng(0).normal(size=(6, 4)).astype("f")
# hau swa yor zul | ner pos
IDS = np.array([[0, 4], [1, 5], [3, 5], [-1, 4], [2, 5], [1, -1]], np.int32)
GIVEN = {"inputs": X, "flix_features": IDS}


def plain():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="inputs")
    x = keras.layers.Dense(6, activation="tanh", name="up")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="down")(x))


def adapted(seed=0, **changes):
    model = adapt(plain(), config(**{"target_modules": ["up", "down"], **changes}))
    randomize((layer for _, layer in flix_layers(model.base)), seed)
    return model


def bits(model):
    return {name: value.tobytes() for name, value in named_pairs(model).items()}


def ending(found, *features):
    return {name: value for name, value in found.items() if name.endswith(features)}


def moved(before, after):
    return {name.split(".", 2)[2] for name in before if before[name] != after[name]}


def compiled(model):
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    return model


@pytest.mark.covers("functional", "remove", backend="tensorflow")
def test_removed_features_leave_the_rest_as_it_was(tmp_path):
    model = compiled(adapted())
    before, ids = bits(model), np.where(IDS == 1, -1, IDS)
    y = model({**GIVEN, "flix_features": ids}).numpy()
    model.predict(GIVEN, verbose=0)  # traced with the feature
    remove_feature(model, "language", "swa")
    after = bits(model)
    assert after == {n: v for n, v in before.items() if not n.endswith("language.swa")}
    assert model.flix_config.registry.id("task", "pos") == 5
    assert_close(model({**GIVEN, "flix_features": ids}), y)
    assert not model.compiled
    with pytest.raises(flix.RoutingError, match="language=swa, which was removed"):
        model(GIVEN)
    with pytest.raises(tf.errors.InvalidArgumentError, match="language=swa"):
        model.predict(GIVEN, verbose=0)  # not by the old trace
    # In graphs, too, where ids are known at run time only; in .keras files; in SavedModels.
    compiled(model).save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.flix_config == model.flix_config and bits(again) == after
    model.export(str(tmp_path / "served"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    assert_close(served.serve({**GIVEN, "flix_features": ids}), y)
    for call in (
        lambda: model.predict(GIVEN, verbose=0),
        lambda: again.predict(GIVEN, verbose=0),
        lambda: served.serve(GIVEN),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="language=swa"):
            call()


def test_a_removed_feature_comes_back_under_its_id_and_trains():
    model = adapted()
    freeze(model, {"language": "swa"})
    remove_feature(model, "language", "swa")
    add_feature(model, "language", "swa", rank=2)
    assert model.flix_config.registry.id("language", "swa") == 1
    before = bits(model)
    compiled(model).fit(GIVEN, np.ones((6, 3)), epochs=2, verbose=0)
    assert moved(before, bits(model)) == {"language.swa"}


@pytest.mark.covers("functional", "rename", backend="tensorflow")
def test_renaming_keeps_ids_variables_and_the_optimizer():
    runs = []
    for renamed in (False, True):
        model = compiled(adapted())
        model.fit(GIVEN, np.ones((6, 3)), verbose=0)
        if renamed:
            before, variables = bits(model), model.trainable_variables
            rename_feature(model, "language", "swa", "kiswahili")
            assert {n.replace("kiswahili", "swa"): v for n, v in bits(model).items()} == before
            assert model.flix_config.registry.id("language", "kiswahili") == 1
            same = zip(model.trainable_variables, variables, strict=True)
            assert model.compiled and all(a is b for a, b in same)
        model.fit(GIVEN, np.ones((6, 3)), verbose=0)
        runs.append(named_pairs(model))
    assert_all_close({n.replace("kiswahili", "swa"): v for n, v in runs[1].items()}, runs[0])
    with pytest.raises(flix.FeatureError, match="exists"):
        rename_feature(model, "task", "ner", "pos")


def test_frozen_features_stay_frozen_through_changes_and_files(tmp_path):
    model = adapted()
    freeze(model, {"task": "pos"})
    freeze(model, [("language", "hau")])
    remove_feature(model, "language", "zul")
    rename_feature(model, "task", "pos", "tagging")
    add_feature(model, "language", "ibo", rank=2, freeze_others=False)
    load_features(model, to_adapter(adapted(1, target_modules=["down"])), {"language": "zul"})
    compiled(model).save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    ids = np.where(IDS == 2, 6, IDS)
    for trained in (model, again):
        assert all(layer.flix_state.frozen == (0, 5) for _, layer in flix_layers(trained.base))
        before = bits(trained)
        trained.fit({**GIVEN, "flix_features": ids}, np.ones((6, 3)), verbose=0)
        everything = {name.split(".", 2)[2] for name in before}
        assert moved(before, bits(trained)) == everything - {"language.hau", "task.tagging"}
    assert_all_close(named_pairs(again), named_pairs(model))
    # Thawed while compiled: the next fit trains it, with the optimizer as it is.
    thaw(model, {"language": "hau"})
    before = bits(model)
    model.fit({**GIVEN, "flix_features": ids}, np.ones((6, 3)), verbose=0)
    assert "language.hau" in moved(before, bits(model))
    thaw(model)
    assert not any(layer.flix_state.frozen for _, layer in flix_layers(model.base))
    with pytest.raises(flix.FeatureError, match="no feature 'nope'"):
        freeze(model, [("task", "nope")])


@pytest.mark.covers("functional", "share a feature", backend="tensorflow")
def test_one_features_file_loads_into_another_model(tmp_path):
    donor = adapted(1)
    rename_feature(donor, "language", "swa", "kin")
    save(donor, tmp_path, {"language": "kin"})
    assert flix.load_adapter(tmp_path).config.registry.features == (("language", "kin"),)
    model = compiled(adapted(target_modules=["down"]))
    before, y = bits(model), model.predict(GIVEN, verbose=0)
    assert load_features(model, tmp_path, freeze_others=True) is model
    assert model.flix_config.registry.id("language", "kin") == 6
    assert not model.compiled
    after = bits(model)
    assert ending(after, "language.kin") == ending(bits(donor), "language.kin")
    assert {n: v for n, v in after.items() if not n.endswith("language.kin")} == before
    assert_close(model.predict(GIVEN, verbose=0), y)
    assert [path for path, _ in flix_layers(model.base)] == ["up", "down"]
    rows = [{"language": "kin"}] * 6
    found, wanted = (
        m({"inputs": X, "flix_features": m.flix_config.registry.encode(rows)})
        for m in (model, donor)
    )
    assert_close(found, wanted)
    kin = np.where(IDS == 1, 6, IDS)
    compiled(model).fit({**GIVEN, "flix_features": kin}, np.ones((6, 3)), verbose=0)
    assert moved(after, bits(model)) == {"language.kin"}
    # All of it in one file, into a plain model.
    save(model, tmp_path / "all")
    assert bits(load(plain(), tmp_path / "all")) == bits(model)
    model.save(tmp_path / "m.keras")
    assert bits(keras.models.load_model(tmp_path / "m.keras")) == bits(model)


def test_conflicts():
    theirs = to_adapter(adapted(1))
    with pytest.raises(flix.AdapterError, match=r"language=hau .*other values in A of layer 'up'"):
        load_features(adapted(), theirs)
    model = adapted()
    before = bits(model)
    assert load_features(model, theirs, conflicts="keep") is model
    assert bits(model) == before
    load_features(model, theirs, {"task": ["ner", "pos"]}, conflicts="replace")
    assert moved(before, bits(model)) == {"task.ner", "task.pos"}
    assert ending(bits(model), "task.ner") == ending(bits(adapted(1)), "task.ner")


@pytest.mark.covers("functional", "import from PEFT", backend="tensorflow")
def test_import_peft(tmp_path):
    rng = np.random.default_rng(0)

    def pair(rank, d_in, d_out):
        return tuple(rng.normal(size=s).astype("f") for s in ((rank, d_in), (d_out, rank)))

    loras = {
        "ner": {"mlp.up": pair(2, 4, 6), "mlp.down": pair(2, 6, 3)},
        "pos": {"mlp.up": pair(3, 4, 6)},
    }
    folders = {
        name: write_lora(tmp_path / name, lora, 2 * len(lora["mlp.up"][0]))
        for name, lora in loras.items()
    }

    def rename(path):
        return path.removeprefix("mlp.")

    with pytest.raises(flix.AdapterError, match=r"no layer 'mlp\."):
        import_peft(plain(), folders, "task")
    model, base = import_peft(plain(), folders, "task", rename=rename), plain()
    rows = [{"task": "ner"}, {"task": "pos"}]
    y = model({"inputs": X[:2], "flix_features": model.flix_config.registry.encode(rows)})
    for row, lora in enumerate(loras.values()):
        merged = plain()
        for path, (a, b) in lora.items():
            layer = merged.get_layer(rename(path))
            layer.kernel.assign(base.get_layer(rename(path)).kernel + 2 * (b @ a).T)
        assert_close(y[row], merged(X[row : row + 1])[0])
    other = adapted(target_modules=["up"])
    assert import_peft(other, folders, "lora", rename=rename) is other
    assert other.flix_config.registry.groups == ("language", "task", "lora")
    ids = other.flix_config.registry.encode([{"lora": "ner"}, {"lora": "pos"}])
    assert_close(other({"inputs": X[:2], "flix_features": ids}), y)


@pytest.mark.covers("functional", "disable", backend="tensorflow")
def test_disabled_models_are_their_base_in_eager_mode_and_in_what_keras_compiles():
    model, base = compiled(adapted()), plain()
    wanted, answer = model.predict(GIVEN, verbose=0), base.predict(X, verbose=0)
    assert np.abs(wanted - answer).max() > 0.1
    model.evaluate(GIVEN, answer, verbose=0)
    with disable(model):
        assert_close(model(X, training=True), base(X))
        assert_close(model({"inputs": X}), base(X))
        assert_close(model.base.get_layer("up")(X), base.get_layer("up")(X))
        odd = np.full((99, 1), 99, np.int32)
        assert_close(model({"inputs": X, "flix_features": odd}), base(X))
        assert_close(model.predict(GIVEN, verbose=0), answer)
        with disable(model):
            assert_close(model.predict(X, verbose=0), answer)
        assert model.evaluate(GIVEN, answer, verbose=0) < 1e-9
        assert model.compiled
        traced = tf.function(model)
        assert_close(traced({"inputs": X}), answer)
        merged = merge(model, {"task": "ner"})
        assert not list(flix_layers(merged))
    assert_close(model.predict(GIVEN, verbose=0), wanted)
    assert model.evaluate(GIVEN, answer, verbose=0) > 1e-3
    with pytest.raises(flix.RoutingError, match="called without routing"):
        model(X, training=True)
    with pytest.raises(ValueError, match="stop"), disable(model):
        raise ValueError("stop")
    assert_close(model(GIVEN), wanted)
    with pytest.raises(flix.TargetError, match="disable needs an adapted model"), disable(base):
        pass


def test_disable_contexts_nest_and_overlap_and_win_over_explicit_features():
    model, base = compiled(adapted()), plain()
    wanted, answer = model.predict(GIVEN, verbose=0), base.predict(X, verbose=0)
    layer, first, second = model.base.get_layer("up"), disable(model), disable(model)
    first.__enter__()
    assert_close(model.predict(GIVEN, verbose=0), answer)
    traced = model.predict_function
    second.__enter__()
    first.__exit__(None, None, None)
    for given in (
        {"flix_features": IDS},
        {"flix_weights": np.ones((6, 2), "f")},
        {"training": True},
    ):
        assert_close(layer(X, **given), base.get_layer("up")(X))
    assert_close(model({"inputs": X, "flix_weights": np.ones((9, 9))}), base(X))
    assert_close(model.predict(GIVEN, verbose=0), answer)
    assert model.predict_function is traced  # nothing went on or off in between
    second.__exit__(None, None, None)
    assert_close(model.predict(GIVEN, verbose=0), wanted)
    assert np.abs(layer(X, flix_features=IDS) - base.get_layer("up")(X)).max() > 0.01


def test_changes_need_an_adapted_model():
    for call in (
        lambda m: remove_feature(m, "task", "ner"),
        lambda m: rename_feature(m, "task", "ner", "x"),
        lambda m: load_features(m, "folder"),
        lambda m: freeze(m, [("task", "ner")]),
        thaw,
    ):
        with pytest.raises(flix.TargetError, match="needs an adapted model"):
            call(plain())


@pytest.mark.covers("functional", "add a feature", backend="tensorflow")
@pytest.mark.parametrize("freeze", [True, False])
def test_new_feature_joins_without_moving_the_others(freeze, tmp_path):
    model, given = models.adapted()
    randomize(layer for _, layer in flix_layers(model.base))
    before, output = named_pairs(model), model(given).numpy()
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(given, np.ones((6, 3)), epochs=0)
    add_feature(model, "language", "ibo", rank=3, init_from="swa", freeze_others=freeze)
    after = named_pairs(model)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert_close(model(given), output)
    new, swa = np.array([[6, 4]] * 6), np.array([[1, 4]] * 6)
    copied = model({"inputs": models.X, "flix_features": swa}).numpy()
    assert_close(model({"inputs": models.X, "flix_features": new}), copied)
    with pytest.raises(ValueError, match="compile"):
        model.fit(given, np.ones((6, 3)), verbose=0)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse", run_eagerly=True)
    mixed = np.array([[6, 4], [0, 4], [6, 5], [1, 5], [3, 5], [6, 4]], np.int32)
    model.fit({"inputs": models.X, "flix_features": mixed}, np.ones((6, 3)), epochs=2, verbose=0)
    moved = {
        name for name, value in named_pairs(model).items() if not np.array_equal(value, after[name])
    }
    assert any(".ibo" in name for name in moved)
    assert all(".ibo" in name for name in moved) == freeze
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    given = {"inputs": models.X, "flix_features": new}
    assert_close(again(given), model(given))
    trained = sum(
        summary(model).features[f] for f in summary(model).features if not freeze or f[1] == "ibo"
    )
    assert summary(again).trainable == trained
    with pytest.raises(flix.FeatureError, match="ibo"):
        add_feature(model, "language", "ibo", rank=1)
    with pytest.raises(flix.RankError, match="rank"):
        add_feature(model, "language", "xho")


def test_frozen_features_get_no_gradient():
    model, _ = models.adapted("sequential")
    add_feature(model, "language", "ibo", rank=2)
    randomize(layer for _, layer in flix_layers(model.base))
    ids = np.array([[6, 4], [0, 4], [6, 5], [1, 5], [3, 5], [-1, 4]], np.int32)
    x = np.random.default_rng(0).normal(size=(6, 6)).astype("f")
    with tf.GradientTape() as tape:
        y = model({"inputs": x, "flix_features": ids}, training=True)
    (a, *_) = tape.gradient(y, model.trainable_variables)
    rows = np.asarray(a.indices)
    assert set(rows.tolist()) == {0, 13, 14} and not np.asarray(a.values)[rows == 0].any()


@over(["functional", "subclassed"], "save and load", backend="tensorflow", argument="kind")
def test_adapter_folder_round_trip(kind, tmp_path):
    model, given = models.adapted(kind)
    randomize(layer for _, layer in flix_layers(model.base))
    save(model, tmp_path / "a")
    again = load(models.made(kind)[0], tmp_path / "a")
    assert_all_same_bits(named_pairs(again), named_pairs(model))
    assert_close(again(given), model(given))
    other, _ = models.adapted(kind)
    load(other, tmp_path / "a")
    assert_all_same_bits(named_pairs(other), named_pairs(model))
    assert_close(other(given), model(given))
    adapter = load_adapter(tmp_path / "a")
    path, layer = next(flix_layers(model.base))
    assert adapter.layers[path].d_in == layer.d_in
    with pytest.raises(flix.AdapterError, match="another architecture"):
        load(models.sequential(8), tmp_path / "a")
    with pytest.raises(flix.AdapterError, match="rank"):
        load(models.adapted(kind, ranks=2)[0], tmp_path / "a")
    with pytest.raises(flix.AdapterError, match="scale"):
        load(models.adapted(kind, alpha=1.0)[0], tmp_path / "a")

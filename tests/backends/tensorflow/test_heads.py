"""Trained heads of Keras models, and the base that they and the features were trained on."""

import warnings

import keras
import numpy as np
import pytest

import flix
from flix.backends.tensorflow import adapt, load, save
from tests.helpers import tensorflow as models
from tests.helpers.heads import check_every_stop, fingerprint_of, wrong_heads
from tests.helpers.registry import config

X = np.random.default_rng(0).normal(size=(6, 4)).astype("f")
GIVEN = {"inputs": X, "flix_features": np.array([[0, 4]] * 6, np.int32)}
HEAD = {"out.kernel", "out.bias"}


def plain(seed=1):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,), name="inputs")
    x = keras.layers.Dense(6, activation="tanh", name="up")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="out")(x))


def trained(value=3.0, unfreeze=True):
    model = adapt(plain(), config(target_modules=["up"]))
    head = model.base.get_layer("out")
    head.trainable = unfreeze
    head.kernel.assign(np.full((6, 3), value))
    return model


def kernel(model):
    return model.base.get_layer("out").kernel.numpy()


def test_what_was_unfrozen_goes_with_the_adapter(tmp_path):
    save(trained(), tmp_path)
    assert set(flix.load_adapter(tmp_path).heads) == HEAD
    model = load(plain(), tmp_path)
    assert (kernel(model) == 3).all()
    names = {v.path for v in model.trainable_variables}
    assert {"out/kernel", "out/bias"} <= names and not any("up/kernel" in n for n in names)
    model.compile("sgd", "mse")
    before = kernel(model)
    model.fit(GIVEN, np.ones((6, 3)), verbose=0)
    assert not np.array_equal(kernel(model), before)
    model.base.get_layer("out").trainable = False
    save(model, tmp_path)  # a head that is frozen later stays part of the adapter
    assert set(flix.load_adapter(tmp_path).heads) == HEAD
    assert not (kernel(load(plain(), tmp_path, heads=False)) == 3).any()


def test_heads_can_be_named_and_frozen_bases_have_none(tmp_path):
    model = trained(unfreeze=False)
    save(model, tmp_path)
    assert flix.load_adapter(tmp_path).heads == {}
    save(model, tmp_path, heads=["out.bias", "norm"])
    assert set(flix.load_adapter(tmp_path).heads) == {"out.bias", "norm.gamma", "norm.beta"}
    loaded = load(plain(), tmp_path)
    trains = {v.path for v in loaded.trainable_variables if not v.path.endswith(("flix_A", "flix_B"))}  # fmt: skip
    assert {"out/bias", "norm/gamma", "norm/beta"} <= trains and "out/kernel" not in trains


def test_dtypes_are_kept(tmp_path):
    def half():
        inputs = keras.Input((4,))
        x = keras.layers.Dense(6, name="up")(inputs)
        return keras.Model(inputs, keras.layers.Dense(3, name="out", dtype="bfloat16")(x))

    model = adapt(half(), config(target_modules=["up"]))
    model.base.get_layer("out").trainable = True
    save(model, tmp_path)
    found = flix.load_adapter(tmp_path).heads
    assert {n: h.dtype for n, h in found.items()} == dict.fromkeys(HEAD, "BF16")
    for base in (half(), keras.Model(*(lambda m: (m.inputs, m.outputs))(plain()))):
        loaded = load(base, tmp_path)
        want = found["out.kernel"].array()
        assert np.array_equal(np.asarray(kernel(loaded), np.float32), want)


def test_a_head_is_no_adapted_kernel_and_has_a_place(tmp_path):
    model = trained()
    with pytest.raises(flix.AdapterError, match="kernel of the adapted layer 'up'"):
        save(model, tmp_path, heads=["up"])
    save(model, tmp_path)
    wrong = [
        ("up.kernel", (4, 6), "kernel of the adapted layer 'up'"),
        ("out.kernel", (3, 6), r"has the shape \[3, 6\] in the adapter, but this Functional's has \[6, 3\]"),
        ("ot.kernel", (6, 3), "'ot.kernel', which this Functional does not have"),
        ("norm.moving_mean", (6,), "'norm.moving_mean', which this Functional does not have"),
    ]  # fmt: skip
    for error in wrong_heads(tmp_path, wrong):
        base = plain()
        with error:
            load(base, tmp_path)
        assert type(base.get_layer("up")) is keras.layers.Dense


def test_every_stop_of_a_save_leaves_one_version(tmp_path):
    check_every_stop(
        tmp_path,
        [trained(1.0), trained(2.0)],
        lambda model: save(model, tmp_path),
        lambda: set(np.unique(kernel(load(plain(), tmp_path)))),
    )


def test_the_base_is_told_and_compared(tmp_path):
    """By its kernels as matrices, whatever axes they have."""
    model = adapt(models.functional(), config(target_modules=["emb", "q", "query", "attention_output"]))  # fmt: skip
    save(model, tmp_path)
    found = flix.load_adapter(tmp_path)
    base = models.functional()
    mha = base.get_layer("mha")
    kernels = {
        "emb": base.get_layer("emb").embeddings.numpy().T,
        "q": base.get_layer("q").kernel.numpy().T,
        "mha.query": mha._query_dense.kernel.numpy().reshape(8, 8).T,
        "mha.attention_output": mha._output_dense.kernel.numpy().reshape(8, 8).T,
    }
    assert set(found.layers) == set(kernels)
    assert found.base.fingerprint == fingerprint_of(found.layers, kernels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(base, tmp_path)
    other = models.functional()
    other.get_layer("q").kernel.assign(other.get_layer("q").kernel * 2)
    with pytest.warns(UserWarning, match=f"fingerprint {found.base.fingerprint}.*is loaded onto"):
        load(other, tmp_path)


def test_a_kernel_that_was_refused_is_no_head_once_it_is_frozen(tmp_path):
    model = trained(unfreeze=False)
    layer = model.base.get_layer("up")
    layer._trainable = layer.kernel.trainable = True
    with pytest.raises(flix.AdapterError, match="kernel of the adapted layer 'up'"):
        save(model, tmp_path)
    layer.kernel.trainable = False
    save(model, tmp_path)
    assert flix.load_adapter(tmp_path).heads == {}

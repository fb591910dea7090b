"""Layers that Keras quantised before adapt: their own forward is called, and each row's update added."""

import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import flix
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, disable, load, merge, save
from tests.helpers.claims import over
from tests.helpers.dense import dense
from tests.helpers.registry import config, registry
from tests.helpers.tensorflow import GIVEN, IDS, X, functional, pairs_of, randomize, table_grads
from tests.helpers.tolerance import (
    assert_all_same_bits,
    assert_close,
    assert_far,
    relative,
    same_bits,
)

CONFIGS = {
    "int8": lambda: keras.quantizers.Int8QuantizationConfig(),
    "int4": lambda: keras.quantizers.Int4QuantizationConfig(block_size=3),
    "int4 by channel": lambda: keras.quantizers.Int4QuantizationConfig(block_size=None),
    "float8": lambda: keras.quantizers.Float8QuantizationConfig(),
}
WAYS = ["gather", "masked", "fused"]
BASES = {"backend": "keras-bases", "argument": "mode", "slow": ["int4 by channel"]}
# Four bits take twenty seconds here, and their layers have tests of their own.
FEWER = {**BASES, "slow": ["int4 by channel", "int4"]}
ROUTED = np.array([[0, 4], [1, 5], [-1, 4], [-1, -1]], np.int32)
ROW = {"language": {"swa": 0.5, "zul": -1.0}, "task": "pos"}
SIZE, OUT = 7, 6

# Axes of the batch's rows are left alone: how an input becomes [..., d_in], and an output [..., d_out].
FORMS = {
    # name: (layer, shape of a row, axes of the input as the kernel has them, axes of the output likewise)
    "dense": (lambda: keras.layers.Dense(OUT, name="q"), (3, SIZE), (0, 1, 2), (0, 1, 2)),
    "query": (
        lambda: keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", name="q"),
        (3, SIZE),
        (0, 1, 2),
        (0, 1, 2, 3),
    ),
    "output": (
        lambda: keras.layers.EinsumDense("abdc,cde->abe", (None, OUT), bias_axes="e", name="q"),
        (3, 2, SIZE),
        (0, 1, 3, 2),
        (0, 1, 2),
    ),
    "swapped": (
        lambda: keras.layers.EinsumDense("abc,dce->abed", (None, 3, 2), name="q"),
        (3, SIZE),
        (0, 1, 2),
        (0, 1, 3, 2),
    ),
}


def quantize(model, mode):
    """Keras's own, which warns of each layer that it cannot quantise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.quantize(config=CONFIGS[mode]())


def plain(form, mode):
    """One layer, quantised, with a bias that is not zero."""
    make, shape, *_ = FORMS[form]
    keras.utils.set_random_seed(1)
    layer = make()
    model = keras.Sequential([keras.Input(shape), layer])
    if layer.bias is not None:
        layer.bias.assign(np.arange(layer.bias.shape.num_elements()).reshape(layer.bias.shape) / 4)
    quantize(model, mode)
    assert layer.quantization_mode == mode[:6].split()[0]
    return model


def flat(value, order):
    """``[rows, positions, size]`` of a layer's input or output."""
    value = np.asarray(value).transpose(order)
    return value.reshape(*value.shape[:2], -1)


def kernel_of(model, form):
    """``[d_in, d_out]``, from what Keras's own forward makes of unit vectors."""
    _, shape, inwards, outwards = FORMS[form]
    size = int(np.prod(shape[1:]))
    units = np.zeros((size, 1, size), "f")
    units[range(size), 0, range(size)] = 1
    sizes = [shape[axis - 1] for axis in inwards[2:]]
    x = units.reshape(size, 1, *sizes).transpose(np.argsort(inwards))
    x = np.repeat(x, shape[0], 1)
    y = flat(model(x), outwards) - flat(model(np.zeros_like(x)), outwards)
    return y[:, 0].astype(np.float64)


@pytest.mark.parametrize(
    "form,strategy,mode",
    [
        *((form, "auto", mode) for form in FORMS for mode in CONFIGS),
        *((form, way, "int8") for form in ("dense", "swapped") for way in WAYS),
        *(("query", way, "int4") for way in WAYS),
    ],
)
def test_a_layer_gives_its_own_output_and_each_rows_update_and_every_gradient(form, strategy, mode):
    _, shape, inwards, outwards = FORMS[form]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(ROUTED), *shape)).astype("f")
    base = plain(form, mode)
    own, kernel = base(x), kernel_of(base, form)
    model = adapt(plain(form, mode), config(target_modules=["q"]), strategy=strategy)
    ((_, layer),) = flix_layers(model.base)
    randomize([layer])
    dy = rng.normal(size=own.shape).astype("f")
    outside = flat(dy, outwards)
    calls = 2 if strategy == "auto" else 1
    update = dense(flat(x, inwards), ROUTED, pairs_of(layer), dy=outside)
    if mode == "float8":  # Keras rounds the gradient to the base's output, too
        outside = outside.astype(ml_dtypes.float8_e5m2).astype("f")
    # Keras's float8 has no gradient outside a graph: its own function for it cannot be differentiated there.
    for call in ([tf.function(model)] if mode == "float8" else [model, tf.function(model)])[:calls]:
        given = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(given)
            y = call({"inputs": given, "flix_features": tf.constant(ROUTED)})
        assert_close(flat(y, outwards), flat(own, outwards) + update.y, dtype="float32")
        dx, da, db = tape.gradient(y, [given, layer.flix_A, layer.flix_B], tf.constant(dy))
        assert_close(flat(dx, inwards), update.x + outside @ kernel.T, dtype="float32")
        for part, grad in (("A", da), ("B", db)):
            found, _ = table_grads(layer, grad, part)
            for i, value in getattr(update, part).items():
                assert_close(found[i], value, dtype="float32")
    assert_far(y, own)
    with disable(model):
        assert same_bits(model({"inputs": x}), own)


@pytest.mark.parametrize(
    "mode,strategy",
    [("int8", "gather"), ("int8", "masked"), ("int4", "auto"), ("int4 by channel", "auto")],
)
def test_an_embedding_gives_its_own_rows_and_the_updates(mode, strategy):
    def made():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((5,), dtype="int32"), keras.layers.Embedding(11, OUT, name="emb")]
        )
        quantize(model, mode)
        return model

    model = adapt(made(), config(target_modules=["emb"]), strategy=strategy)
    ((_, layer),) = flix_layers(model.base)
    assert (layer.d_in, layer.d_out) == (11, OUT)
    randomize([layer])
    x, own = X[: len(ROUTED)], made()(X[: len(ROUTED)])
    dy = np.random.default_rng(1).normal(size=own.shape)
    wanted = dense(np.eye(11)[x], ROUTED, pairs_of(layer), dy=dy)
    with tf.GradientTape() as tape:
        y = model({"inputs": x, "flix_features": ROUTED})
    assert_close(y, np.asarray(own) + wanted.y, dtype="float32")
    tables = [layer.flix_A, layer.flix_B]
    for part, grad in zip("AB", tape.gradient(y, tables, tf.constant(dy, "float32")), strict=True):
        found, _ = table_grads(layer, grad, part)
        for i, value in getattr(wanted, part).items():
            assert_close(found[i], value, dtype="float32")
    row = {"flix_features": registry().encode([ROW] * 11)}
    merged = merge(model, ROW, dequantize=True)
    assert merged.layers[-1].quantization_mode is None
    tokens = np.arange(11)[:, None].repeat(5, 1)
    assert_close(merged(tokens), model({"inputs": tokens, **row}))


def test_the_activation_comes_after_the_sum_and_stays_the_layers():
    def made(activation):
        keras.utils.set_random_seed(1)
        layer = keras.layers.Dense(OUT, name="q", activation=activation)
        model = keras.Sequential([keras.Input((SIZE,)), layer])
        quantize(model, "int8")
        model = adapt(model, config(target_modules=["q"]))
        randomize(found for _, found in flix_layers(model.base))
        return model

    x = np.random.default_rng(0).normal(size=(len(ROUTED), SIZE)).astype("f")
    given = {"inputs": x, "flix_features": ROUTED}
    model, linear = made("relu"), made(None)
    assert_close(model(given), np.maximum(linear(given), 0))
    assert model.base.get_layer("q").activation is keras.activations.relu


def quantised(mode, **changes):
    """An adapted model, and what gives its plain base."""

    def made():
        model = functional()
        quantize(model, mode)
        return model

    targets = ["q", "mha.query", "mha.attention_output", "out"]
    model = adapt(made(), config(target_modules=targets, **changes))
    randomize(layer for _, layer in flix_layers(model.base))
    return model, made


@over(CONFIGS, "mixed batch", "save and load", **FEWER)
def test_a_batch_of_unlike_rows_is_each_row_alone_also_after_save_and_load(mode, tmp_path):
    model, made = quantised(mode)
    y = model(GIVEN)
    assert_far(y, made()(X))
    for i in range(len(X)):
        assert_close(model({"inputs": X[i : i + 1], "flix_features": IDS[i : i + 1]}), y[i : i + 1])
    save(model, tmp_path)
    again = load(made(), tmp_path)
    assert same_bits(again(GIVEN), y)


@over(CONFIGS, "gradients", **BASES)
def test_features_of_the_batch_train_and_nothing_of_the_base_does(mode):
    model, _ = quantised(mode)
    before = {v.path: v.numpy() for v in model.base.variables}
    tables = {v.path for v in model.trainable_variables}
    model.compile(keras.optimizers.Adam(0.02), "mse")
    losses = model.fit(GIVEN, np.ones((6, 3)), epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    kept = {v.path: v.numpy() for v in model.base.variables if v.path not in tables}
    assert_all_same_bits(kept, {path: before[path] for path in kept})
    assert len(tables) == 8 and len(before) > len(kept)


@over(CONFIGS, "keras file", "export", **FEWER)
def test_files_of_keras_keep_what_is_quantised_in_layers_of_layers_too(mode, tmp_path):
    model, _ = quantised(mode)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert same_bits(again(GIVEN), model(GIVEN))
    modes = {path: layer.quantization_mode for path, layer in flix_layers(again.base)}
    assert set(modes.values()) == {mode.split()[0]} and "mha.query" in modes
    model.export(str(tmp_path / "served"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    assert_close(served.serve(GIVEN), model(GIVEN))


@pytest.mark.parametrize("mode", CONFIGS)
def test_quantised_layers_are_not_merged_in_silence(mode):
    model, _ = quantised(mode)
    reason = rf"its kernel is quantised \({mode.split()[0]}\)"
    with pytest.raises(
        flix.TargetError,
        match=rf"layer 'q' \(Dense\) cannot be merged: {reason}.*dequantize=True",
    ):
        merge(model, ROW)


@over(CONFIGS, "dequantized", **{**BASES, "slow": ["int4 by channel", "int4", "float8"]})
def test_quantised_layers_become_plain_ones_if_asked(mode, tmp_path):
    model, _ = quantised(mode)
    merged = merge(model, ROW, dequantize=True)
    routing = registry().encode([ROW] * 6)
    wanted = model({"inputs": X, "flix_features": routing})
    # int8 and float8 round a layer's input, too, which a plain one does not.
    off = {"int8": 0.02, "float8": 0.25}.get(mode, 1e-5)
    assert relative(merged(X), wanted) < off
    for name in ("q", "out"):
        assert merged.get_layer(name).quantization_mode is None
        assert len(merged.get_layer(name).trainable_variables) == 2
    assert merged.get_layer("mha").key_dense.quantization_mode == mode.split()[0]  # no target
    merged.save_weights(tmp_path / "w.weights.h5")
    again = merge(model, {"task": "ner"}, dequantize=True)
    again.load_weights(tmp_path / "w.weights.h5")
    assert_close(again(X), merged(X))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", CONFIGS)
def test_a_plain_layer_has_the_values_that_the_quantised_one_stands_for(mode, form):
    base = plain(form, mode)
    model = adapt(plain(form, mode), config(target_modules=["q"], ranks=1))
    ((_, layer),) = flix_layers(model.base)
    layer.flix_B.assign(np.zeros(layer.flix_B.shape))
    merged = merge(model, ROW, dequantize=True)
    assert merged.layers[-1].kernel.dtype == "float32"
    assert_close(kernel_of(merged, form), kernel_of(base, form), dtype="float32")


def test_half_precision_stays_that_of_the_base():
    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model, made = quantised("int8")
        y = model(GIVEN)
        assert y.dtype == made()(X).dtype == tf.bfloat16
        assert model.base.get_layer("q").flix_A.dtype == "float32"
        merged = merge(model, ROW, dequantize=True)
    finally:
        keras.mixed_precision.set_global_policy(policy)
    assert merged.get_layer("q").dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_other_quantisations_are_left_out_by_name(mode):
    base = functional()
    layer = base.get_layer("q")
    kinds = {"gptq": "GPTQConfig", "awq": "AWQConfig"}
    settings = getattr(keras.quantizers, kinds[mode])(dataset=None, tokenizer=None, group_size=4)
    layer.quantize(mode, config=settings)
    with pytest.raises(flix.TargetError, match=rf"quantized \({mode}\)"):
        adapt(base, config(target_modules=["q"]))
    with pytest.warns(UserWarning, match=rf"leaves out 'q' \(it is quantized \({mode}\)\)"):
        adapt(base, config())

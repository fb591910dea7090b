"""``fit`` with callbacks, and resumed runs that end exactly where uninterrupted ones do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import adapt, add_feature, named_pairs, remove_feature
from tests.helpers.registry import config
from tests.helpers.tensorflow import randomize

ROWS, EPOCHS = 24, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, 4)).astype("f")
Y = rng.normal(size=(ROWS, 3)).astype("f")
# In order, so that features come and go from batch to batch; zul (3) never acts.
IDS = np.stack([np.repeat([0, 1, -1, 0], 6), np.repeat([4, 5, -1, 5], 6)], 1).astype(np.int32)
GIVEN = {"inputs": X, "flix_features": IDS}

OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(2e-2, 40), weight_decay=0.1, clipnorm=1.0
    ),
    "accumulated": lambda: keras.optimizers.AdamW(1e-2, gradient_accumulation_steps=3),
}


def made(seed=0):
    """An adapted model whose head, outside of the adapter, trains too; the base is the same for all seeds."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="inputs")
    hidden = keras.layers.Dense(6, activation="tanh", name="up")(inputs)
    base = keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden))
    model = adapt(base, config(target_modules=["up"]))
    model.base.get_layer("head").trainable = True
    randomize((layer for _, layer in flix_layers(model.base)), seed)
    return model


def compiled(name, seed=0):
    model = made(seed)
    model.compile(OPTIMIZERS[name](), "mse", metrics=["mae"])
    return model


def fit(model, epochs=EPOCHS, **options):
    options = {"batch_size": 6, "shuffle": False, "verbose": 0, **options}
    return model.fit(GIVEN, Y, epochs=epochs, **options).history


def state(model):
    """The bytes of all weights, of the optimizer's slots, counts of steps and learning rate."""
    variables = [*model.variables, *model.optimizer.variables]
    return [np.asarray(v).tobytes() for v in variables]


class Stop(keras.callbacks.Callback):
    """As if the process had been killed."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.covers("functional", "resume", backend="tensorflow")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_keras_file_resumes_exactly(name, tmp_path):
    whole = compiled(name)
    losses = fit(whole)["loss"]
    first = compiled(name)
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    fit(first, epochs=1, callbacks=[checkpoint])
    resumed = keras.models.load_model(tmp_path / "1.keras")
    assert state(resumed) == state(first)
    history = fit(resumed, initial_epoch=1, callbacks=[checkpoint])
    assert history["loss"] == losses[1:]
    assert state(resumed) == state(whole)
    assert int(resumed.optimizer.iterations) == int(whole.optimizer.iterations) > 0
    assert len(list(tmp_path.glob("*.keras"))) == EPOCHS


def test_backup_and_restore_resumes_exactly(tmp_path):
    whole = compiled("adamw")
    fit(whole)
    backup = str(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        fit(compiled("adamw"), callbacks=[keras.callbacks.BackupAndRestore(backup), Stop(1)])
    resumed = compiled("adamw", seed=5)  # a new process would start from other values
    fit(resumed, callbacks=[keras.callbacks.BackupAndRestore(backup)])
    assert state(resumed) == state(whole)


def test_early_stopping_restores_the_best_weights():
    model = made()
    model.compile(keras.optimizers.SGD(1.0, momentum=0.9), "mse")  # diverges after a while
    best = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            best.append((logs["val_loss"], self.model.get_weights()))

    stopping = keras.callbacks.EarlyStopping(
        "val_loss", patience=2, restore_best_weights=True, start_from_epoch=0
    )
    history = fit(model, 10, validation_data=(GIVEN, Y), callbacks=[Watch(), stopping])
    assert len(history["loss"]) < 10
    wanted = min(best, key=lambda pair: pair[0])[1]
    for found, value in zip(model.get_weights(), wanted, strict=True):
        np.testing.assert_array_equal(found, value)
    assert any(not np.array_equal(a, b) for a, b in zip(wanted, best[-1][1], strict=True))


def test_best_only_checkpoints_and_csv(tmp_path):
    model = compiled("adamw")
    callbacks = [
        keras.callbacks.ModelCheckpoint(
            str(tmp_path / "best.keras"), monitor="val_loss", save_best_only=True
        ),
        keras.callbacks.ModelCheckpoint(str(tmp_path / "last.weights.h5"), save_weights_only=True),
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        keras.callbacks.TerminateOnNaN(),
    ]
    history = fit(model, validation_data=(GIVEN, Y), callbacks=callbacks)
    best = keras.models.load_model(tmp_path / "best.keras")
    loss, _ = best.evaluate(GIVEN, Y, batch_size=6, verbose=0)
    assert loss == pytest.approx(min(history["val_loss"]), rel=1e-5)
    other = compiled("adamw", seed=5)
    other.load_weights(tmp_path / "last.weights.h5")
    for name, value in named_pairs(model).items():
        np.testing.assert_array_equal(named_pairs(other)[name], value)


def test_a_changed_model_resumes_exactly(tmp_path):
    """Removed features, their ids, and what is frozen go through files."""

    def changed():
        model = made()
        remove_feature(model, "language", "swa")
        add_feature(model, "language", "ibo", rank=2)
        model.compile(OPTIMIZERS["adamw"](), "mse")
        return model

    ids = np.where(IDS == 1, 6, IDS)
    given = {"inputs": X, "flix_features": ids}
    options = {"batch_size": 6, "shuffle": False, "verbose": 0}
    whole, first = changed(), changed()
    before = named_pairs(whole)
    whole.fit(given, Y, epochs=2, **options)
    first.fit(given, Y, epochs=1, **options)
    first.save(tmp_path / "m.keras")
    resumed = keras.models.load_model(tmp_path / "m.keras")
    resumed.fit(given, Y, initial_epoch=1, epochs=2, **options)
    assert state(resumed) == state(whole)
    moved = {n for n, v in named_pairs(resumed).items() if not np.array_equal(v, before[n])}
    assert moved == {"up.A.language.ibo", "up.B.language.ibo"}
    with pytest.raises(tf.errors.InvalidArgumentError, match="language=swa"):
        resumed.predict(GIVEN, verbose=0)

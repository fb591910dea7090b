"""What needs a process of its own: imports, a missing framework, another Keras backend, several devices."""

import os
import subprocess
import sys
import textwrap
import warnings

import keras
import pytest

from flix.backends import tensorflow as backend


def run(code, **environment):
    """Run Python code; its standard output."""
    env = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", ["keras", "tensorflow"])
def test_missing_framework_says_what_to_install(name):
    out = run(f"""
        import sys
        sys.modules[{name!r}] = None
        try:
            import flix.backends.tensorflow
        except ImportError as error:
            print(type(error).__name__, error)
        """)
    assert out.startswith(
        "MissingFrameworkError the tensorflow backend needs TensorFlow and Keras 3"
    )
    assert 'pip install "flix-peft[tensorflow]"' in out


def test_keras_on_another_backend_is_an_error():
    pytest.importorskip("scipy", reason="Keras on numpy needs scipy")
    out = run(
        """
        try:
            import flix.backends.tensorflow
        except ValueError as error:
            print(type(error).__name__, error)
        """,
        KERAS_BACKEND="numpy",
    )
    assert out.startswith("ConfigError") and "'numpy'" in out and "KERAS_BACKEND=tensorflow" in out


def test_several_devices_give_the_single_device_numbers_and_no_other_framework_is_imported():
    out = run("""
        import sys
        import keras, numpy as np, tensorflow as tf
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
        frameworks = {"torch", "jax", "peft", "flax", "transformers"}
        before = frameworks & set(sys.modules)  # TensorFlow imports jax where it finds it
        import flix
        from flix.backends.tensorflow import adapt, named_pairs
        assert frameworks & set(sys.modules) == before

        registry = flix.FeatureRegistry({"language": ["a", "b", "c", "d"], "task": ["x", "y"]})
        config = flix.FlixConfig(registry=registry, ranks=3, target_modules=["dense", "dense_1"])
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(16, 6)), rng.normal(size=(16, 3))
        # Other features on the two devices, none of them language c.
        ids = np.stack([np.where(np.arange(16) // 4 % 2, 0, rng.integers(0, 2, 16)), rng.integers(4, 6, 16)], 1)
        ids[-1, 0] = 3
        given = {"inputs": x, "flix_features": ids.astype("int32")}

        def train(strategy):
            with strategy.scope():
                keras.utils.set_random_seed(0)
                base = keras.Sequential([keras.Input((6,), dtype="float64"),
                    keras.layers.Dense(6, dtype="float64"), keras.layers.Dense(3, dtype="float64")])
                model = adapt(base, config)
                model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
            start = named_pairs(model)
            data = tf.data.Dataset.from_tensor_slices((given, y)).batch(8)
            model.fit(data, epochs=3, shuffle=False, verbose=0)
            return start, named_pairs(model)

        start, one = train(tf.distribute.get_strategy())
        _, two = train(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
        for name in one:
            assert np.abs(one[name] - two[name]).max() < 1e-9, (name, np.abs(one[name] - two[name]).max())
            for end in (one, two):
                assert (start[name].tobytes() == end[name].tobytes()) == name.endswith("language.c"), name
        print("same")
        """)
    assert out.strip().endswith("same")


def test_public_names():
    for name in backend.__all__:
        assert getattr(backend, name) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert issubclass(backend.FlixModel, keras.Model)

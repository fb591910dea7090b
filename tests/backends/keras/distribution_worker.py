"""One model trained on one device, with its data on four, and with data and kernels on two by two (JAX).

Run with KERAS_BACKEND=jax and XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import keras
import numpy as np
from keras import distribution

from flix.backends.keras import named_pairs
from flix.backends.keras.paths import flix_layers
from tests.backends.keras.models import FLOATS, IDS, Y, adapted

ABSENT = ("language.yor", "language.zul", "task.pos")
rng = np.random.default_rng(0)
GIVEN = {
    "inputs": np.concatenate([FLOATS, FLOATS[:2]]),
    "flix_features": np.concatenate([np.where(np.isin(IDS, (3, 5)), -1, IDS), IDS[:1], IDS[4:5]]),
}
TARGETS = np.concatenate([Y, Y[:2]])


def trained():
    """The model after two epochs, its pairs before and after, and what it predicts."""
    model, _ = adapted(ranks=2)
    start = named_pairs(model)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    model.fit(GIVEN, TARGETS, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model, start, named_pairs(model), model.predict(GIVEN, batch_size=8, verbose=0)


def same(one, other):
    for name, value in one[2].items():
        assert np.abs(value - other[2][name]).max() < 1e-5, name
        for end in (one, other):
            kept = end[1][name].tobytes() == end[2][name].tobytes()
            assert kept == name.endswith(ABSENT), name
    assert np.abs(one[3] - other[3]).max() < 1e-5


def main():
    one = trained()
    devices = distribution.list_devices("cpu")
    assert len(devices) == 4
    with distribution.DataParallel(devices=devices).scope():
        four = trained()
    same(one, four)
    mesh = distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layouts = distribution.LayoutMap(mesh)
    layouts["q/kernel"] = (None, "model")  # by output
    layouts["out/kernel"] = ("model", None)  # by input
    with distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope():
        both = trained()
    same(one, both)
    layers = dict(flix_layers(both[0].base))
    specs = {
        (path, name): tuple(getattr(layer, name).value.sharding.spec)
        for path, layer in layers.items()
        for name in ("flix_A", "flix_B")
    }
    whole = {(), (None,), (None, None)}
    assert specs["q", "flix_B"] == specs["out", "flix_A"] == (None, "model"), specs
    assert {specs["q", "flix_A"], specs["out", "flix_B"]} <= whole, specs
    slots = [v for v in both[0].optimizer.variables if v.path.endswith("q_flix_B_momentum")]
    assert [tuple(v.value.sharding.spec) for v in slots] == [(None, "model")], slots
    held = {shard.data.shape for shard in layers["q"].flix_B.value.addressable_shards}
    rows, columns = layers["q"].flix_B.shape
    assert held == {(rows, columns // 2)}
    print("the same on 1, 4 and 2 x 2 devices")


if __name__ == "__main__":
    main()

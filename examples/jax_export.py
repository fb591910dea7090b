"""Serve an adapted model without its code: one serialised program, with routing as an input."""

import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import flix
from flix.backends.jax import FlixOptimizer, adamw, adapt, export_fn, value_and_grad

TASKS = ["double", "negate", "reverse"]
registry = flix.FeatureRegistry({"task": TASKS})
config = flix.FlixConfig(registry=registry, ranks=8)
rngs = nnx.Rngs(0)
base = nnx.Sequential(nnx.Linear(8, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 8, rngs=rngs))
model = adapt(base, config)
optimizer = FlixOptimizer(model, adamw(2e-2, weight_decay=0.0))


def batch(step, rows=64):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(rows, 8)).astype(np.float32)
    tasks = rng.integers(0, len(TASKS), rows)
    y = np.select([tasks[:, None] == i for i in range(3)], [2 * x, -x, x[:, ::-1]])
    return x, y, registry.encode([{"task": TASKS[i]} for i in tasks], width=1).ids


@nnx.jit
def train_step(model, optimizer, ids, x, y):
    def loss(model, ids):
        return ((model(x, flix_features=ids) - y) ** 2).mean()

    value, grads = value_and_grad(loss)(model, ids)
    optimizer.update(model, grads)
    return value


for step in range(300):
    x, y, ids = batch(step)
    value = train_step(model, optimizer, ids, x, y)
print(f"trained: loss {value:.4f}")

function, params = export_fn(model)  # params: {"layers.0.kernel": array, ...}
(b,) = jax.export.symbolic_shape("b")  # batches of any size
shapes = jax.ShapeDtypeStruct((b, 8), "float32"), jax.ShapeDtypeStruct((b, 1), "int32")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.jax"
    path.write_bytes(jax.export.export(jax.jit(function))(params, *shapes).serialize())
    print(f"the program: {path.stat().st_size} bytes, without the {len(params)} parameters")
    program = jax.export.deserialize(path.read_bytes())  # knows nothing of flix or flax

model.eval()
for rows in (1, 64):  # mixed batches, each row its own composition
    x, y, ids = batch(1000, rows)
    difference = abs(program.call(params, x, ids) - model(x, flix_features=ids)).max()
    print(f"{rows} rows: largest difference to the model {difference:.1e}")
ids[1] = 3  # an id of no feature
print("rows that are NaN:", np.flatnonzero(np.isnan(program.call(params, x, ids)).any(1)).tolist())

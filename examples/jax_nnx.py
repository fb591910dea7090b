"""Train an adapted flax.nnx model, resume from an Orbax checkpoint, and merge one composition."""

import functools
import tempfile

import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import flix
from flix.backends.jax import FlixOptimizer, adamw, adapt, merge, save, summary, value_and_grad

registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["double", "negate"]})
config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=2, task=8))


def make():
    rngs = nnx.Rngs(0)
    base = nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 8, rngs=rngs))
    model = adapt(base, config)
    return model, FlixOptimizer(model, adamw(2e-2, weight_decay=0.0))


def batch(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(32, 8)).astype(np.float32)
    tasks = rng.choice(["double", "negate"], 32)
    rows = [{"language": rng.choice(["hau", "swa"]), "task": task} for task in tasks]
    y = np.where((tasks == "double")[:, None], 2 * x, -x)
    return x, y, registry.encode(rows, width=2).ids


def loss_of(model, ids, x, y):
    return ((model(x, flix_features=ids) - y) ** 2).mean()


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model, optimizer, ids, x, y):
    loss, grads = value_and_grad(loss_of)(model, ids, x, y)  # of the batch's features only
    optimizer.update(model, grads)  # absent features keep their bits
    return loss


model, optimizer = make()
print(summary(model))
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    for step in range(400):
        if step == 200:  # as if the run had been stopped here
            state = nnx.to_pure_dict(nnx.state((model, optimizer)))
            checkpointer.save(f"{folder}/state", state)
            checkpointer.wait_until_finished()
            model, optimizer = make()
            nnx.update((model, optimizer), checkpointer.restore(f"{folder}/state", state))
        x, y, ids = batch(step)
        loss = train_step(model, optimizer, ids, x, y)
        if step % 100 == 99:
            print(f"step {step:3d}  loss {loss:.4f}")
    save(model, f"{folder}/adapter")  # opens in every backend
plain = merge(model, {"language": "swa", "task": "negate"})
print(f"merged: a plain {type(plain).__name__}, mean error {abs(plain(x) + x).mean():.3f}")

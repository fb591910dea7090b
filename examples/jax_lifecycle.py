"""A trained adapter gets a new language: it trains alone, then others leave, are renamed, and are shared as files."""

import tempfile

import numpy as np
from flax import nnx

import flix
from flix.backends import jax as fj

registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["scale"]})
config = flix.FlixConfig(registry=registry, ranks=4)
FACTOR = {"hau": 2.0, "swa": -1.0, "yor": 0.5}
x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)


def base():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), nnx.tanh, nnx.Linear(32, 8, rngs=rngs))


@nnx.jit
def train_step(model, optimizer, ids, y):
    def loss(model, ids):
        return ((model(x, flix_features=ids) - y) ** 2).mean()

    value, grads = fj.value_and_grad(loss)(model, ids)
    optimizer.update(model, grads)
    return value


def train(model, languages, steps=150):
    rows = [{"language": languages[i % len(languages)], "task": "scale"} for i in range(len(x))]
    y = np.stack([FACTOR[row["language"]] * v for row, v in zip(rows, x, strict=True)])
    ids = model.flix_config.registry.encode(rows).ids
    optimizer = fj.FlixOptimizer(model, fj.adamw(2e-2))  # after a change, always a new one
    for _ in range(steps):
        value = train_step(model, optimizer, ids, y)
    print(f"{', '.join(languages)}: loss {value:.4f}")


model = fj.adapt(base(), config)
train(model, ["hau", "swa"])
before = fj.named_pairs(model)
fj.add_feature(model, "language", "yor", rank=4, init_from=["hau", "swa"])  # the others are frozen
train(model, ["yor"])
pairs = fj.named_pairs(model)
assert all(np.array_equal(pairs[n], v) for n, v in before.items())  # the others: no bit moved
with fj.disable(model):
    print("disabled is the base:", bool((model(x) == base()(x)).all()))
with tempfile.TemporaryDirectory() as folder:
    fj.save(model, folder, {"language": "yor"})  # one language's file, without the rest
    other = fj.adapt(base(), config)
    fj.load_features(other, folder)
    print("another model knows:", other.flix_config.registry.names("language"))
fj.remove_feature(model, "language", "hau")
fj.rename_feature(model, "language", "yor", "yoruba")
print("ids stay:", model.flix_config.registry.id("language", "yoruba"))
plain = fj.merge(model, {"language": "yoruba", "task": "scale"})
print(f"merged: mean error {abs(plain(x) - 0.5 * x).mean():.3f}")

"""The functional core in a Flax linen model: the bank is one more pytree argument, as in any JAX program."""

import flax.linen as nn
import jax
import numpy as np

import flix
from flix.backends import jax as fj

registry = flix.FeatureRegistry({"task": [f"shift {k}" for k in range(50)]})
config = flix.FlixConfig(registry=registry, ranks=4)


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, rows, ids, present):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.width))
        return fj.linear_rows(x, kernel, rows, ids, present)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, rows, ids, present):
        x = nn.relu(Layer(32, name="up")(x, rows["up"], ids, present))
        return Layer(8, name="down")(x, rows["down"], ids, present)


bank = fj.init(config, {"up": (8, 32), "down": (32, 8)})
tx = fj.adamw(1e-2, weight_decay=0.0)
state = tx.init(bank)
model = Model()
ids0 = np.zeros((1, 1), int)
base = model.init(jax.random.key(0), np.ones((1, 8)), fj.gather(bank, ids0[0]), ids0, ids0[0])


@jax.jit
def train_step(bank, state, x, y, ids):
    present = fj.touched(ids, len(registry))

    def loss(rows):
        return ((model.apply(base, x, rows, ids, present) - y) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(fj.gather(bank, present))
    return value, *fj.sparse_update(tx, grads, state, bank, present)


rng = np.random.default_rng(0)
for step in range(300):
    x = rng.normal(size=(64, 8)).astype(np.float32)
    shifts = rng.integers(0, 4, 64)  # features 4 to 49 never act, and keep their bits
    y = np.stack([np.roll(row, k) for row, k in zip(x, shifts, strict=True)])
    value, bank, state = train_step(bank, state, x, y, shifts[:, None])
    if step % 100 == 99:
        print(f"step {step:3d}  loss {value:.4f}")
kernels = {path: base["params"][path]["kernel"] for path in bank}
merged = fj.merge_kernels(config, bank, kernels, {"task": "shift 2"})
error = abs(nn.relu(x @ merged["up"]) @ merged["down"] - np.roll(x, 2, 1)).mean()
print(f"merged for 'shift 2': mean error {error:.3f}")

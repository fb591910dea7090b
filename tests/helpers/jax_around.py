"""Layers of flax.nnx with a forward of their own, quantised ones among them, for tests."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flix.backends.jax import adapt
from tests.helpers.jax import randomize
from tests.helpers.registry import IDS, config

SIZE, OUT = 6, 4
ROW = {"language": {"swa": 0.5, "zul": -1.0}, "task": "pos"}


def kernel(seed: int = 0, shape: tuple[int, ...] = (SIZE, OUT)) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Int8Linear(nnx.Linear):
    """A kernel of integers, and a scale for each output beside it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(SIZE, OUT, rngs=rngs)
        scale = jnp.abs(kernel()).max(0, keepdims=True) / 127
        self.kernel = nnx.Variable(jnp.round(kernel() / scale).astype(jnp.int8))
        self.scale = nnx.Variable(scale)
        self.bias = nnx.Param(kernel(1, (OUT,)))

    def __call__(self, x: Any) -> Any:
        return x @ (self.kernel[...] * self.scale[...]) + self.bias[...]


class Int4(nnx.Module):
    """No nnx.Linear: four bits, a scale for each block of three inputs, and no bias."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.in_features, self.out_features = SIZE, OUT
        blocks = kernel().reshape(2, 3, OUT)
        scale = jnp.abs(blocks).max(1, keepdims=True) / 7
        self.qvalue = nnx.Variable(jnp.round(blocks / scale).astype(jnp.int4))
        self.scale = nnx.Variable(scale)
        self.deterministic = True

    def __call__(self, x: Any) -> Any:
        whole = self.qvalue[...].astype(jnp.float32) * self.scale[...]
        return x @ whole.reshape(SIZE, OUT)


class Float8(nnx.Linear):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(SIZE, OUT, rngs=rngs)
        self.kernel = nnx.Variable(kernel().astype(jnp.float8_e4m3fn))

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel[...].astype(x.dtype)


class Own(nnx.Linear):
    def __call__(self, x: Any) -> Any:
        return jnp.einsum("...i,io->...o", x, self.kernel[...])


class Doubled(nnx.Linear):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) * 2


class Clipped(nnx.Linear):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x).clip(-0.5, 0.5)


class Int8Embed(nnx.Embed):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(SIZE, OUT, rngs=rngs)
        self.embedding = nnx.Variable(jnp.round(kernel() * 40).astype(jnp.int8))

    def __call__(self, tokens: Any) -> Any:
        return self.embedding[...][tokens] / 40.0


LAYERS: dict[str, Any] = {
    "int8": Int8Linear,
    "int4": Int4,
    "float8": Float8,
    "subclass": lambda rngs: Own(SIZE, OUT, rngs=rngs),
    "doubled": lambda rngs: Doubled(SIZE, OUT, rngs=rngs),
    "clipped": lambda rngs: Clipped(SIZE, OUT, rngs=rngs),
    "embed": Int8Embed,
}


class Net(nnx.Module):
    def __init__(self, kind: str) -> None:
        self.q = LAYERS[kind](nnx.Rngs(0))
        self.o = nnx.Linear(OUT, OUT, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.o(jnp.tanh(self.q(x)))


def adapted(kind: str, strategy: str = "auto", **changes: Any) -> Any:
    targets = {"target_modules": ["q", "o"], **changes}
    model = adapt(Net(kind), config(**targets), strategy=strategy)
    randomize(model)
    return model


def inputs(kind: str) -> Any:
    rng = np.random.default_rng(3)
    shape = (len(IDS), 3)
    if kind == "embed":
        return jnp.asarray(rng.integers(0, SIZE, shape))
    return jnp.asarray(rng.normal(size=(*shape, SIZE)), jnp.float32)

"""A whole flax.nnx model: a training step and a forward of a mixed batch, flix beside ``nnx.LoRA``.

A decoder of transformer blocks with random weights; every linear map of the blocks is adapted. ``nnx.LoRA`` is one
LoRA for the whole batch: it cannot route rows, and is here as the cost of equal arithmetic. All steps are compiled,
model and optimizer are donated, and what a step computes is returned: the loss, and through the optimizer's state the
gradients.

    python -m benchmarks.model.jax_model [--smoke]
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import jax_settings  # noqa: F401 - before JAX

# isort: split

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.common import Arm, Result, Table, environment, figure, interleave, over
from benchmarks.guards import guard
from benchmarks.model.problem import LORA_RANK, MixedBatch, randomized
from flix.backends.jax import (
    FlixOptimizer,
    adamw,
    adapt,
    load_into,
    merge,
    to_adapter,
    value_and_grad,
)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
FROZEN, FLIX = "frozen model", "**flix**"
LORA = f"`nnx.LoRA`, one of rank {LORA_RANK} for all rows"
RATE = 1e-12
"""Far too small to change the model: every round computes the same."""


class Block(nnx.Module):
    """Causal self-attention and a feed-forward layer, each before a residual sum."""

    def __init__(self, d: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1, self.norm2 = (nnx.LayerNorm(d, rngs=rngs) for _ in range(2))
        self.q, self.k, self.v, self.o = (nnx.Linear(d, d, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(d, 4 * d, rngs=rngs), nnx.Linear(4 * d, d, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        h = self.norm1(x)
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(h).reshape(split) for layer in (self.q, self.k, self.v))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + self.o(h)
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """Token ids to logits; or, given embeddings, embeddings to logits."""

    def __init__(self, d: int, heads: int, layers: int, vocabulary: int) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(vocabulary, d, rngs=rngs)
        self.blocks = nnx.List([Block(d, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(d, rngs=rngs)
        self.head = nnx.Linear(d, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Any, embedded: Any = None) -> Any:
        x = self.embed(tokens) if embedded is None else embedded
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(logits: Any, tokens: Any) -> Any:
    """Mean cross-entropy of each token as its own label: any labels cost the same."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def _flix(make: Any, batch: MixedBatch) -> Any:
    model = adapt(make(), batch.config)
    return load_into(model, randomized(to_adapter(model)))


def _lora(make: Any) -> Any:
    model = make()
    rngs = nnx.Rngs(1)
    for block in model.blocks:
        for name in ("q", "k", "v", "o", "up", "down"):
            base = getattr(block, name)
            lora = nnx.LoRA(
                base.in_features,
                LORA_RANK,
                base.out_features,
                base_module=base,
                b_initializer=nnx.initializers.normal(),
                rngs=rngs,
            )
            setattr(block, name, lora)
    return model


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def _flix_step(model: Any, optimizer: Any, ids: Any, tokens: Any) -> Any:
    def loss(model: Any, ids: Any, tokens: Any) -> Any:
        return loss_of(model(tokens, flix_features=ids), tokens)

    value, grads = value_and_grad(loss)(model, ids, tokens)
    optimizer.update(model, grads)
    return value


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def _lora_step(model: Any, optimizer: Any, tokens: Any) -> Any:
    def loss(model: Any) -> Any:
        return loss_of(model(tokens), tokens)

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def _frozen_step(model: Any, tokens: Any) -> Any:
    def loss(embedded: Any) -> Any:
        return loss_of(model(tokens, embedded), tokens)

    return jax.value_and_grad(loss)(model.embed(tokens))


@nnx.jit
def _forward(model: Any, tokens: Any) -> Any:
    return model(tokens)


@nnx.jit
def _flix_forward(model: Any, ids: Any, tokens: Any) -> Any:
    return model(tokens, flix_features=ids)


def _moments(optimizer: Any) -> dict[str, Any]:
    """The sums of squared gradients that Adam keeps: they are zero where no gradient came through."""
    state = nnx.as_pure(optimizer.opt_state)
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        f"moment {jax.tree_util.keystr(path)}": np.asarray(leaf)
        for path, leaf in flat
        if ".nu" in jax.tree_util.keystr(path) or "'nu'" in jax.tree_util.keystr(path)
    }


def _composed_loss(model: Any, batch: MixedBatch, tokens: Any) -> float:
    """The mixed batch's loss from plain models, one merged for each composition."""
    total = 0.0
    for row, numbers in batch.groups.items():
        plain = merge(model, dict(row))
        part = tokens[np.asarray(numbers)]
        total += float(loss_of(_forward(plain, part), part)) * len(numbers)
    return total / len(batch.rows)


def guarded_arms(smoke: bool = False) -> tuple[list[Arm], list[Arm], str]:
    """The candidates of a training step and of a forward, each guarded; and what they are, in words."""
    d, heads, layers, vocabulary, length = (32, 2, 1, 64, 8) if smoke else (512, 8, 6, 8192, 64)
    batch = MixedBatch(4, 2) if smoke else MixedBatch()

    def make() -> Decoder:
        return Decoder(d, heads, layers, vocabulary)

    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, vocabulary, (len(batch.rows), length)), jnp.int32)
    ids = jnp.asarray(batch.ids)
    frozen, flix_model, lora = make(), _flix(make, batch), _lora(make)
    composed = _composed_loss(flix_model, batch, tokens)
    flix_optimizer = FlixOptimizer(flix_model, adamw(RATE, weight_decay=0.0))
    lora_optimizer = nnx.Optimizer(lora, optax.adamw(RATE, weight_decay=0.0), wrt=nnx.LoRAParam)

    def step(name: str, call: Any, optimizer: Any = None) -> Arm:
        def run() -> Any:
            # The donated states are the step's outputs; waiting for the loss alone would leave them running.
            made = call()
            held = nnx.as_pure(nnx.state(optimizer)) if optimizer is not None else None
            jax.block_until_ready((made, held))
            return made

        def results(out: Any) -> dict[str, Any]:
            if optimizer is None:
                return {"loss": np.asarray(out[0]), "dx": np.asarray(out[1])}
            return {"loss": np.asarray(out), **_moments(optimizer)}

        return Arm(name, run, results)

    arms = [
        step(FROZEN, lambda: _frozen_step(frozen, tokens)),
        step(FLIX, lambda: _flix_step(flix_model, flix_optimizer, ids, tokens), flix_optimizer),
        step(LORA, lambda: _lora_step(lora, lora_optimizer, tokens), lora_optimizer),
    ]
    guard(arms[0], ("loss", "dx"))
    names = list(_moments(flix_optimizer))
    others = list(_moments(lora_optimizer))
    assert names and others, "the optimizers' moments were not found"
    guard(arms[1], {"loss": np.float64(composed), **dict.fromkeys(names)}, tolerance=1e-4)
    guard(arms[2], ("loss", *others))

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        flix_model.eval()
        yield
        flix_model.train()

    forwards = [
        Arm(FROZEN, lambda: jax.block_until_ready(_forward(frozen, tokens)), _logits),
        Arm(
            FLIX,
            lambda: jax.block_until_ready(_flix_forward(flix_model, ids, tokens)),
            _logits,
            around=evaluating,
        ),
        Arm(LORA, lambda: jax.block_until_ready(_forward(lora, tokens)), _logits),
    ]
    for arm in forwards:
        guard(arm, ("y",))
    said = (
        f"A decoder of {layers} blocks, d = {d}, vocabulary {vocabulary:,}; {batch.describe()}; "
        f"{length} positions."
    )
    return arms, forwards, said


def suite(smoke: bool = False) -> Result:
    """The nnx model's part of the benchmark."""
    rounds, limit = (1, 5.0) if smoke else (15, 40.0)
    arms, forwards, said = guarded_arms(smoke)
    times = interleave(arms, rounds, limit=limit)
    alone = interleave(forwards, rounds, limit=limit / 2)
    trained, ran = over(times, FROZEN), over(alone, FROZEN)
    rows = [
        [
            arm.name,
            figure([t * 1e3 for t in times[arm.name]]),
            trained[arm.name],
            figure([t * 1e3 for t in alone[arm.name]]),
            ran[arm.name],
        ]
        for arm in arms
    ]
    head = ["", "training step, ms", "over frozen", "forward, ms", "over frozen"]
    result = Result("model-jax", "A whole model: flax.nnx", environment=environment(PACKAGES))
    result.method = (
        f"{said} The step is forward, backward and Adam (no decay), compiled and donated; the frozen model's runs "
        "backward to the embeddings. `nnx.LoRA` cannot route rows."
    )
    result.tables.append(Table("A training step and a forward, flax.nnx", head, rows))
    return result


def _logits(out: Any) -> dict[str, Any]:
    return {"y": np.asarray(out)}


if __name__ == "__main__":
    from benchmarks.report import section

    print(section(suite("--smoke" in sys.argv).to_dict()))

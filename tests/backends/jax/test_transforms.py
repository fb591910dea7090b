"""optax's optimizers on tables: by the batch's rows or by whole tables the same, or refused by name."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import flix
from flix.backends.jax import (
    FlixOptimizer,
    FlixParam,
    adapt,
    gather,
    init,
    mask_absent,
    sparse_update,
    touched,
    value_and_grad,
)
from tests.helpers.jax import randomize
from tests.helpers.registry import config
from tests.helpers.tolerance import assert_close

X = np.random.default_rng(0).normal(size=(2, 3, 6)).astype("f")
BATCHES = [np.array(ids) for ids in ([[0, 4], [1, 4]], [[1, 4], [1, -1]], [[0, 5], [0, 4]])]


class Net(nnx.Module):
    def __init__(self) -> None:
        self.q, self.o = (nnx.Linear(6, 6, rngs=nnx.Rngs(k)) for k in (0, 1))

    def __call__(self, x: Any) -> Any:
        return self.o(jax.numpy.tanh(self.q(x)))


def model_of() -> Any:
    model = adapt(Net(), config(target_modules=["q", "o"]))
    randomize(model)
    return model


def loss(model: Any, ids: Any, x: Any) -> Any:
    return (model(x, flix_features=ids) ** 2).mean()


def first(path: Any) -> str:
    return str(getattr(path[0], "key", getattr(path[0], "name", "")))


def labels(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: first(path), tree)


def only_q(tree: Any) -> Any:
    return jax.tree.map(lambda label: label == "q", labels(tree))


ROWS: dict[str, Any] = {
    "adam": optax.adam(1e-2),
    "partition": optax.partition({"q": optax.adam(1e-2), "o": optax.set_to_zero()}, labels),
    "masked": optax.chain(optax.masked(optax.trace(0.9), only_q), optax.scale(-1e-2)),
    "schedule free": optax.contrib.schedule_free_sgd(1e-2),
    "ema": optax.chain(optax.sgd(1e-1), optax.ema(0.9)),
    "apply if finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "global norm": optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1e-1, momentum=0.9)),
}
TABLES: dict[str, Any] = {
    "lamb": optax.lamb(1e-2, weight_decay=0.1),
    "lars": optax.lars(1e-1, weight_decay=0.1),
    "block rms": optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(1e-1, momentum=0.9)),
    "fromage": optax.fromage(1e-2),
    "adaptive clip": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1e-1, momentum=0.9)),
    "lamb in partition": optax.partition({"q": optax.lamb(1e-2), "o": optax.adam(1e-3)}, labels),
}


def bits(model: Any) -> dict[Any, bytes]:
    found = {}
    for path in ("q", "o"):
        for feature, a, b in getattr(model, path).bank.pairs():
            found[path, feature] = np.asarray(a).tobytes() + np.asarray(b).tobytes()
    return found


@pytest.mark.parametrize("name", [*ROWS, *TABLES])
def test_by_rows_and_by_tables_alike(name: str) -> None:
    tx, finals = {**ROWS, **TABLES}[name], []
    for sparse in (True, False):
        model = model_of()
        optimizer = FlixOptimizer(model, tx)

        @nnx.jit
        def step(model: Any, optimizer: Any, ids: Any, sparse: bool = sparse) -> None:
            if sparse:
                optimizer.update(model, value_and_grad(loss)(model, ids, X)[1])
            else:
                of = nnx.DiffState(0, FlixParam)
                grads = nnx.grad(loss, argnums=of)(model, ids, X)
                optimizer.update(model, grads, flix_features=ids)

        registry = model.flix_config.registry
        for ids in BATCHES:
            before = bits(model)
            step(model, optimizer, ids)
            still = {key for key, value in bits(model).items() if value == before[key]}
            absent = {
                (path, f) for path, f in before if registry.id(*f) not in set(ids.ravel().tolist())
            }
            frozen = {key for key in before if key[0] == "o"} if name == "partition" else set()
            assert still == absent | frozen
        finals.append(nnx.state(model, FlixParam))
    jax.tree.map(lambda a, b: assert_close(a, b, times=30), *finals)


def test_lamb_of_a_bank_is_that_of_its_whole_tables() -> None:
    bank = init(config(), {"q": (5, 7)})
    bank = jax.tree.map(lambda t: t + 1, bank)
    tx, present = optax.lamb(1e-2), touched(np.array([[1, 4]]), 6)
    grads = gather(bank, present)
    whole = jax.tree.map(lambda t: 0 * t, bank)
    rows = np.isin(bank["q"].spec.owners, [1, 4])[:, None]
    whole = jax.tree.map(lambda zero, t: jax.numpy.where(rows, t, zero), whole, bank)
    updates, _ = mask_absent(tx).update(whole, tx.init(bank), bank)
    wanted = optax.apply_updates(bank, updates)
    got, _ = sparse_update(tx, grads, tx.init(bank), bank, present)
    jax.tree.map(assert_close, got, wanted)
    assert (np.asarray(got["q"].A)[~rows[:, 0]] == np.asarray(bank["q"].A)[~rows[:, 0]]).all()


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.identity(), tx)])
@pytest.mark.parametrize(
    ("tx", "said"),
    [
        (optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), r"MultiSteps.*mask_absent"),
        (optax.contrib.muon(1e-2), r"muon.*Use another optimizer for the tables"),
        (optax.sm3(1e-2), r"sm3.*Use another optimizer for the tables"),
    ],
)
def test_what_cannot_keep_features_apart_is_refused_by_name(wrap: Any, tx: Any, said: str) -> None:
    model = model_of()
    with pytest.raises(flix.ConfigError, match=said):
        FlixOptimizer(model, wrap(tx))
    with pytest.raises(flix.ConfigError, match=said):
        mask_absent(wrap(tx), model)
    bank = init(config(), {"q": (5, 7)})
    present = touched(np.array([[0]]), 6)
    with pytest.raises(flix.ConfigError, match=said):
        sparse_update(wrap(tx), gather(bank, present), tx.init(bank), bank, present)


def test_multisteps_itself_is_refused_and_the_form_that_the_error_names_works() -> None:
    model = model_of()
    with pytest.raises(flix.ConfigError, match="MultiSteps"):
        FlixOptimizer(model, optax.MultiSteps(optax.sgd(0.1), 2))
    tx = optax.MultiSteps(mask_absent(optax.adamw(1e-2, weight_decay=0.1), model), 2)
    optimizer = nnx.Optimizer(model, tx, wrt=FlixParam)
    one = model_of()
    whole = nnx.Optimizer(one, mask_absent(optax.adamw(1e-2, weight_decay=0.1), one), wrt=FlixParam)
    of = nnx.DiffState(0, FlixParam)
    before = bits(model)
    parts = [np.array([[0, 4], [0, 4]]), np.array([[1, 5], [1, 5]])]
    for ids in parts:
        optimizer.update(model, nnx.grad(loss, argnums=of)(model, ids, X))
    moved = {key[1] for key, value in bits(model).items() if value != before[key]}
    registry = model.flix_config.registry
    assert moved == {registry.features[i] for i in (0, 1, 4, 5)}
    both = lambda m: sum(loss(m, ids, X) for ids in parts) / 2  # noqa: E731
    whole.update(one, nnx.grad(both, argnums=of)(one))
    jax.tree.map(
        lambda a, b: assert_close(a, b, times=30), *(nnx.state(m, FlixParam) for m in (model, one))
    )

"""Features whose values are not finite are named in a warning, once, wherever their values can be looked at."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flix.backends.jax import embed, finite, linear
from flix.backends.jax.adapt import flix_layers
from tests.helpers.jax import TOKENS, adapted, random_bank
from tests.helpers.registry import IDS, config

SWA = r"^values of language=swa are NaN or infinite"


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def broken_model(value: float = np.nan) -> Any:
    model = adapted(target_modules=["embed", "back"])
    for _, layer in flix_layers(model):
        rows = layer.flix_spec.row_range(("language", "swa"))
        layer.flix_B[...] = layer.flix_B[...].at[rows].set(value)
    return model


def test_a_call_at_once_names_what_the_batch_uses() -> None:
    model = broken_model()
    with silent():
        model(TOKENS, flix_features=np.where(IDS == 1, 0, IDS))
        model(TOKENS, flix_features=IDS, flix_weights=np.where(IDS == 1, 0.0, 1.0))
    with pytest.warns(UserWarning, match=SWA) as found:
        model(TOKENS, flix_features=IDS)
    assert len(found) == 1  # of two layers
    with silent():
        model(TOKENS, flix_features=IDS)


@nnx.jit
def compiled(model: Any, ids: Any) -> Any:
    return model(TOKENS, flix_features=ids)


def test_a_model_in_evaluation_is_looked_at_where_it_is_handed_in() -> None:
    for _ in range(2):  # an equal model, too, of which the compiled function's cache knows
        model = broken_model(np.inf)
        with silent():
            compiled(model, IDS)  # in training a look at every step would wait for the device
        model.eval()
        with pytest.warns(UserWarning, match=SWA):
            compiled(model, IDS)
        with silent():
            compiled(model, IDS)


def test_it_is_looked_at_once_until_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    own = finite._look
    monkeypatch.setattr(finite, "_look", lambda *given: (looks.append(given), own(*given))[1])
    model = adapted(target_modules=["embed", "back"])
    model.eval()
    for _ in range(3):
        compiled(model, IDS)
    assert len(looks) == 2
    model.train()
    compiled(model, IDS)
    model.eval()
    compiled(model, IDS)
    assert len(looks) == 4


def closed_over(x: Any, *rest: Any) -> Any:
    return jax.jit(lambda x: linear(x, *rest))(x)


def test_functional_layers_and_what_is_closed_over() -> None:
    for call in (linear, closed_over):
        bank = random_bank(config(), {"q": (5, 7)})["q"]
        rows = bank.spec.row_range(("language", "swa"))
        bank = type(bank)(bank.A.at[rows].set(np.nan), bank.B, bank.spec)
        x, kernel = jnp.ones((5, 5)), jnp.ones((5, 7))
        with pytest.warns(UserWarning, match=SWA):
            call(x, kernel, bank, IDS)
        with silent():
            call(x, kernel, bank, IDS)
    table = random_bank(config(), {"e": (11, 6, "embedding")})["e"]
    table = type(table)(table.A.at[0, 3].set(np.inf), table.B, table.spec)
    with pytest.warns(UserWarning, match="values of language=hau are"):
        embed(TOKENS, jnp.ones((11, 6)), table, IDS)


def test_values_that_overflow_in_their_sum_are_finite() -> None:
    bank = random_bank(config(), {"q": (5, 7)})["q"]
    large = type(bank)(bank.A, jnp.full_like(bank.B, 3e38), bank.spec)
    with silent():
        linear(jnp.ones((5, 5)), jnp.ones((5, 7)), large, IDS)


def test_nothing_is_kept_of_tables_that_are_gone() -> None:
    before = len(finite._looks)
    bank = random_bank(config(), {"q": (5, 7)})
    linear(jnp.ones((5, 5)), jnp.ones((5, 7)), bank["q"], IDS)
    assert len(finite._looks) == before + 1
    del bank
    gc.collect()
    assert len(finite._looks) == before

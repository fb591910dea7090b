"""Which optax transformations can be run on the rows of a batch's features alone, and which on no tables at all."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flix.core.errors import ConfigError

WHOLE = object()
"""Stands for a leaf that is not a table of pairs."""

_REFUSED = {
    "MultiSteps": "it keeps the gradients of several batches, but only the last batch's features would move. Put it "
    "outside: nnx.Optimizer(model, optax.MultiSteps(mask_absent(tx, model), k), wrt=FlixParam)",
    "scale_by_sm3": "it keeps one value for a column of a table, which all features share. Use "
    "another optimizer for the tables, such as adamw",
    "scale_by_muon": "it makes all rows of a matrix orthogonal to each other, and the rows of a "
    "table belong to many features. Use another optimizer for the tables, such as adamw, and an "
    "nnx.Optimizer of their own for other parameters",
}

_SUMS = {"prodigy", "dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "cocob"}
"""These go by sums over all parameters that a few steps do not show."""


def check(tx: Any, what: str) -> None:
    """Refuse what cannot keep features apart.

    Raises:
        ConfigError: it is named, with the form that works.
    """
    for name in parts(tx):
        if name in _REFUSED:
            shown = name.removeprefix("scale_by_")
            raise ConfigError(f"{what} cannot take optax's {shown}: {_REFUSED[name]}")


def parts(tx: Any) -> set[str]:
    """The names of the optax functions and classes that a transformation was made by."""
    return {name for name, _ in _walk(tx, set())}


def _walk(value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        yield from _walk((value.func, *value.args), seen)
    elif isinstance(value, dict):
        yield from _walk(tuple(value.values()), seen)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _walk(item, seen)
    elif (owner := getattr(value, "__self__", None)) is not None and callable(value):
        yield from _walk(owner, seen)
    elif callable(value) and hasattr(value, "__closure__"):
        if str(value.__module__).startswith("optax"):
            yield value.__qualname__.split(".")[0], value
        for cell in value.__closure__ or ():
            yield from _walk(_content(cell), seen)
    elif type(value).__module__.startswith("optax"):
        yield type(value).__name__, value
        yield from _walk(tuple(getattr(value, "__dict__", {}).values()), seen)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set
        return None


def by_rows(tx: Any, params: Any, specs: Any) -> bool:
    """Whether a transformation treats the rows of a table as if the others were not there.

    Tried out on tables of four rows in the place of the parameters'. Norms of a whole table (``lamb``, ``lars``), its
    columns (``adaptive_grad_clip``) or of all parameters (``prodigy``) show it; ``clip_by_global_norm`` does not, since
    rows of absent features have no gradient.
    """
    if parts(tx) & _SUMS:
        return False
    leaves, structure = jax.tree.flatten(params)
    tables = tuple(None if spec is WHOLE else len(spec.lead) for spec in jax.tree.leaves(specs))
    return _tried(tx, structure, tuple((leaf.ndim, str(leaf.dtype)) for leaf in leaves), tables)


@functools.lru_cache(maxsize=64)
def _tried(tx: Any, structure: Any, forms: tuple[Any, ...], tables: tuple[int | None, ...]) -> bool:
    """See :func:`by_rows`; of each leaf its dimensions and dtype, and of tables how many axes stand before the rows."""
    tx = optax.with_extra_args_support(tx)

    def tree(step: int, rows: int, alive: int) -> Any:
        made = []
        for k, ((ndim, dtype), table) in enumerate(zip(forms, tables, strict=True)):
            size = [4, *[3] * (ndim - 1)] if ndim else []
            before = (slice(None),) * (table or 0)
            if table:
                size = [*[3] * table, 4, *[3] * (ndim - table - 1)]
            value = np.random.default_rng([step, k]).normal(size=size) + 1
            if table is not None:
                value[(*before, slice(alive, None))] = 0
                value = value[(*before, slice(rows))]
            made.append(jnp.asarray(value, dtype))
        return jax.tree.unflatten(structure, made)

    def run(rows: int) -> list[Any]:
        """The updates of the first two rows, in three steps: the other two act in the first one alone."""
        params, found = tree(0, rows, 4), []
        state = tx.init(params)
        for step, alive in ((1, 4), (2, 2), (3, 2)):
            if step == 1 and rows < 4:
                # What whole tables leave behind of this step, the rows' state has, too.
                whole = tree(0, 4, 4)
                _, full = tx.update(tree(1, 4, 4), tx.init(whole), whole)
                state = jax.tree.map(
                    lambda new, old: new[tuple(map(slice, old.shape))],
                    full,
                    state,
                )
                continue
            updates, state = tx.update(tree(step, rows, alive), state, params)
            if step > 1:
                found += [
                    u if t is None else u[(*[slice(None)] * t, slice(2))]
                    for u, t in zip(jax.tree.leaves(updates), tables, strict=True)
                ]
        return found

    try:
        with jax.ensure_compile_time_eval():
            whole, narrow = run(4), run(2)
    except (TypeError, ValueError, KeyError, AttributeError):
        return True  # it needs arguments of its own, or other shapes: what it keeps is looked at where it is used
    return len(whole) == len(narrow) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(whole, narrow, strict=True)
    )

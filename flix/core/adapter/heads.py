"""Trained heads: which of a base's parameters go with an adapter, and where they may lie."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter
from flix.core.adapter.described import Head
from flix.core.errors import AdapterError, listed, near


@dataclass(frozen=True)
class Place:
    """A parameter of a model's base.

    Attributes:
        shape: its shape.
        kernel_of: the layers whose kernel it is.
        takes: whether it can hold a head's values: floating-point numbers.
    """

    shape: tuple[int, ...]
    kernel_of: Collection[str] = ()
    takes: bool = True


def check_heads(adapter: Adapter, places: Mapping[str, Place], model: str) -> None:
    """Refuse heads that a model has no place for.

    Args:
        adapter: the adapter.
        places: the parameters of the model's base by name.
        model: the model's class.

    Raises:
        AdapterError: a parameter that the model lacks, or has in another shape or not as numbers of floating point, or
            one that is the kernel of an adapted layer.
    """
    for name, head in adapter.heads.items():
        if name not in places:
            raise AdapterError(
                f"the adapter holds the trained parameter {name!r}, which this {model} does not have"
                f"{near(name, places)}; load it into a model with the same head, or with heads=False to do without"
            )
        place = places[name]
        if tuple(place.shape) != head.shape:
            raise AdapterError(
                f"the trained parameter {name!r} has the shape {list(head.shape)} in the adapter, but this {model}'s has "
                f"{list(place.shape)}"
            )
        check_head(name, place, adapter.layers)


def check_head(name: str, place: Place, layers: Collection[str]) -> None:
    """Refuse a head that is an adapted layer's kernel, or that holds no floating-point numbers.

    Raises:
        AdapterError: it is.
    """
    if kernel_of := [path for path in place.kernel_of if path in layers]:
        raise AdapterError(
            f"the trained parameter {name!r} is the kernel of the adapted layer {kernel_of[0]!r}: a head is a parameter "
            "that the features do not adapt; freeze it, or leave the layer out of target_modules"
        )
    if not place.takes:
        raise _not_floating(name)


def as_heads(values: Mapping[str, NDArray[Any]]) -> dict[str, Head]:
    """Parameters' values by name, as files hold them.

    Raises:
        AdapterError: one that holds no floating-point numbers.
    """
    found = {}
    for name, array in values.items():
        head = Head.of(np.asarray(array))
        if head is None:
            raise _not_floating(name)
        found[name] = head
    return found


def _not_floating(name: str) -> AdapterError:
    return AdapterError(
        f"the trained parameter {name!r} is not float16, bfloat16, float32 or float64 in this model"
    )


def chosen_heads(
    places: Mapping[str, Place], names: Collection[str], layers: Collection[str]
) -> list[str]:
    """Parameters by their own names or by those of modules that hold them.

    Raises:
        AdapterError: a name that is neither, or a parameter that can be no head.
    """
    if isinstance(names, str):
        names = [names]
    found: dict[str, None] = {}
    for name in names:
        some = [p for p in places if p == name or p.startswith(f"{name}.")]
        if not some:
            raise AdapterError(
                f"heads: the model has no parameter or module {name!r}{near(name, places)}; parameters are: "
                f"{listed(places)}"
            )
        found.update(dict.fromkeys(some))
    for name in found:
        check_head(name, places[name], layers)
    return list(found)


def modules_of_heads(
    heads: Collection[str], parameters: Mapping[str, Any], adapted: Collection[str]
) -> list[str]:
    """The modules that hold trained heads, as PEFT has them (``modules_to_save``).

    A module as far up as all its parameters are trained, as users name heads (``classifier``).

    Args:
        heads: names of the trained parameters.
        parameters: what the model's parameters are, by all their names: equal where modules share one.
        adapted: the adapted layers.

    Raises:
        AdapterError: a trained parameter that no such module holds: it belongs to the model itself or to an adapted
            layer, or other modules share it.
    """
    trained = {parameters[name] for name in heads}
    found: dict[str, None] = {}
    for name in heads:
        path = _highest(name, parameters, trained)
        inside = path + "."
        users = {user for user, value in parameters.items() if value == parameters[name]}
        if not path:
            why = "it belongs to the model itself, not to a module"
        elif any(layer == path or layer.startswith(inside) for layer in adapted):
            why = f"its module {path!r} is adapted"
        elif not all(user.startswith(inside) for user in users):
            why = "other modules share it"
        else:
            found[path] = None
            continue
        raise AdapterError(
            f"PEFT's format cannot hold the trained parameter {name!r}: {why}; merge the composition instead"
        )
    return list(found)


def _highest(name: str, parameters: Mapping[str, Any], trained: Collection[Any]) -> str:
    path = name.rpartition(".")[0]
    while above := path.rpartition(".")[0]:
        inside = above + "."
        if any(n.startswith(inside) and p not in trained for n, p in parameters.items()):
            break
        path = above
    return path

"""Trained heads: which of a base's parameters go with an adapter, in a file of their own, and where they may lie."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flix.core.adapter.adapter import Rename
from flix.core.errors import AdapterError, near

HEADS_FILE = "trained.safetensors"


def renamed(name: str, rename: Rename) -> str:
    """A parameter's name with its module's path translated."""
    module, dot, own = name.rpartition(".")
    if rename is None or not dot:
        return name
    return f"{rename(module) if callable(rename) else rename.get(module, module)}.{own}"


def check_heads(
    file: Any, found: Mapping[str, Any], parameters: Mapping[str, Any], model: str
) -> None:
    """Refuse heads that a model has no place for.

    Args:
        file: where they were read, for messages.
        found: the heads, of which the shape is looked at.
        parameters: the model's parameters.
        model: the model's class.

    Raises:
        AdapterError: a parameter that the model does not have, or has in another shape.
    """
    for name, value in found.items():
        if name not in parameters:
            raise AdapterError(
                f"{str(file)!r} holds the trained parameter {name!r}, which this "
                f"{model} does not have{near(name, parameters)}; load it into a model "
                "with the same head, or remove the file to do without"
            )
        if parameters[name].shape != value.shape:
            raise AdapterError(
                f"{str(file)!r}: the trained parameter {name!r} has the shape {list(value.shape)}, "
                f"but this {model}'s has {list(parameters[name].shape)}"
            )


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
            why = "it belongs to no module but the model"
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

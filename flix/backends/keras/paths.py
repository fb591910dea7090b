"""The layers of a Keras model by dotted path.

A path has one component a level, the model itself none. A component is the layer's name where a person gave it one.
Automatic names (``dense_3``) count all layers that a process has made, so they differ from run to run: such a layer
goes by the attribute that holds it in a subclassed model or layer (``self.q`` is ``q``, ``self.blocks[0]`` is
``blocks.0``), and in functional and sequential models its automatic name is counted afresh within its parent
(``dense``, ``dense_1``, in the model's order). So the same code gives the same paths, in every process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.utils.naming import to_snake_case

from flix.backends.keras.layers import FlixLayer


def named_layers(model: keras.layers.Layer) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer inside a model, parents before children; a shared layer once, by its first path."""
    yield from _walk(model, "", {id(model)})


def flix_layers(model: keras.layers.Layer) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every adapted layer inside a model, in the model's order."""
    return ((path, layer) for path, layer in named_layers(model) if isinstance(layer, FlixLayer))


def _walk(parent: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    for name, child in _children(parent):
        if id(child) not in seen:
            seen.add(id(child))
            yield f"{prefix}{name}", child
            yield from _walk(child, f"{prefix}{name}.", seen)


def _children(parent: Any) -> list[tuple[str, Any]]:
    """The direct sublayers with the components they go by."""
    graph = isinstance(parent, keras.Sequential) or hasattr(parent, "operations")
    children = list(parent.layers if graph else parent._layers)
    attributes = {} if graph else _attributes(parent)
    named: list[tuple[str, Any]] = []
    counts: dict[str, int] = {}
    taken: set[str] = set()
    for child in children:
        if isinstance(child, keras.layers.InputLayer):
            continue
        stem = _automatic(child)
        if stem is None:
            name = child.name
        elif id(child) in attributes:
            name = attributes[id(child)]
        else:
            number = counts.get(stem, 0)
            counts[stem] = number + 1
            name = f"{stem}_{number}" if number else stem
        base, again = name, 1
        while name in taken:
            name, again = f"{base}_{again}", again + 1
        taken.add(name)
        named.append((name, child))
    return named


def _automatic(layer: Any) -> str | None:
    """The stem of a layer's automatic name, or None if a person gave the name."""
    cls = type(layer)
    if issubclass(cls, FlixLayer):
        cls = cls.flix_base
    for stem in {to_snake_case(cls.__name__), to_snake_case(type(layer).__name__)}:
        if re.fullmatch(rf"{re.escape(stem)}(_\d+)?", layer.name):
            return str(to_snake_case(cls.__name__))
    return None


def _attributes(parent: Any) -> dict[int, str]:
    """Where a layer's attributes hold other layers, directly or in lists and dicts: name by object."""
    found: dict[int, str] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, keras.layers.Layer):
            found.setdefault(id(value), name)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                visit(item, f"{name}.{i}")
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{name}.{key}")

    for name, value in vars(parent).items():
        if name not in ("_layers", "_tracker", "_parent") and not name.startswith("_self_"):
            visit(value, name)
    return found

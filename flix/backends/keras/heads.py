"""Trained heads: variables of a Keras base that were unfrozen are saved with the features.

``adapt`` freezes the whole base. What is unfrozen afterwards (``model.base.get_layer("classifier").trainable = True``)
trains with the features, and goes into the adapter's file by its layer's path and its own name, ``classifier.kernel``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flix.backends.keras.adapt import FlixModel
from flix.backends.keras.base import forget_traces
from flix.backends.keras.layers import FlixLayer, adaptable
from flix.backends.keras.parameters import is_table, kernel_of, values_of
from flix.backends.keras.paths import named_layers
from flix.core.adapter.described import Head
from flix.core.adapter.heads import Place, as_heads


def base_parameters(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, variable, its layer) of what can train in a base, but the features' tables; running statistics cannot."""
    base = model.base if isinstance(model, FlixModel) else model
    taken: set[str] = set()
    for path, layer in (("", base), *named_layers(base)):
        for variable in layer._trainable_variables:
            if not is_table(variable):
                name, again = f"{path}.{variable.name}" if path else variable.name, 1
                while name in taken:
                    name, again = f"{path}.{variable.name}_{again}".lstrip("."), again + 1
                taken.add(name)
                yield name, variable, layer


def head_places(model: Any) -> dict[str, Place]:
    """The base's parameters by name, and the layers whose kernel each is."""
    base = model.base if isinstance(model, FlixModel) else model
    kernels: dict[int, list[str]] = {}
    for path, layer in named_layers(base):
        if isinstance(layer, FlixLayer) or adaptable(layer)[0] is not None:
            kernels.setdefault(id(kernel_of(layer)), []).append(path)
    return {
        name: Place(tuple(v.shape), kernels.get(id(v), ()), Head.holds(v.dtype))
        for name, v, _ in base_parameters(model)
    }


def heads(model: Any, names: Collection[str] | None = None) -> dict[str, Head]:
    """Those that are named; otherwise those that train, and those that did when the model was last saved or loaded."""
    training = {id(v) for v in model.trainable_variables}
    known = {name: v for name, v, _ in base_parameters(model)}
    if names is None:
        held = model.flix_state.heads
        names = [name for name, v in known.items() if id(v) in training or name in held]
    # An adapted kernel is refused as a head; frozen then, as the message says, it is to be none.
    kernels = {
        id(kernel_of(layer)) for _, layer in named_layers(model) if isinstance(layer, FlixLayer)
    }
    model.flix_state.heads = tuple(name for name in names if id(known[name]) not in kernels)
    return as_heads({name: values_of(known[name]) for name in names})


def put_heads(model: Any, heads: Mapping[str, Head]) -> Any:
    """Give variables these values and let them train; others of their layers stay as they are."""
    for name, variable, layer in base_parameters(model):
        if name in heads:
            variable.assign(heads[name].array())
            variable.trainable = True
            layer._trainable = True
    state = model.flix_state
    state.heads = tuple({**dict.fromkeys(state.heads), **heads})
    state.version += 1
    forget_traces(model)
    return model

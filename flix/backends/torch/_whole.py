"""Trained heads as PEFT holds them: whole modules beside a LoRA (its ``modules_to_save``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from flix.backends.torch.heads import _whole, trained_heads
from flix.backends.torch.model import flix_layers
from flix.core.errors import AdapterError


def whole_modules(model: nn.Module) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The modules that hold a model's trained heads, and all that is in them.

    A module as far up as all its parameters are trained, as users name heads (``classifier``).

    Returns:
        The values of each module's state, by the module's path and by their names inside it.

    Raises:
        AdapterError: a trained parameter that no such module holds: it belongs to the model itself or to an adapted
            layer, or other modules share it.
    """
    heads = trained_heads(model)
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(path)
    adapted = [path for path, _ in flix_layers(model)]
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, parameter in heads.items():
        path = _module_of(model, name, set(heads))
        inside = path + "."
        if not path:
            why = "it belongs to no module but the model"
        elif any(layer == path or layer.startswith(inside) for layer in adapted):
            why = f"its module {path!r} is adapted"
        elif any(p != path and not p.startswith(inside) for p in owners[id(parameter)]):
            why = "other modules share it"
        else:
            state = model.get_submodule(path).state_dict()
            found[path] = {key: _whole(value).float().numpy() for key, value in state.items()}
            continue
        raise AdapterError(
            f"PEFT's format cannot hold the trained parameter {name!r}: {why}; merge the composition instead"
        )
    return found


def _module_of(model: nn.Module, name: str, heads: set[str]) -> str:
    path = name.rpartition(".")[0]
    while above := path.rpartition(".")[0]:
        inside = model.get_submodule(above).named_parameters()
        if any(f"{above}.{own}" not in heads for own, _ in inside):
            break
        path = above
    return path

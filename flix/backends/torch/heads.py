"""Trained heads: parameters of the base that were unfrozen are saved beside the features.

``adapt`` freezes the whole base. A classifier head, which starts from random values, is unfrozen by hand and trains
with the features; an adapter without it would be of no use. It goes into a file of its own, ``trained.safetensors``,
under the names of ``model.named_parameters()``, so that the adapter's own file stays the same for every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch.layer import flix_layers
from flix.backends.torch.parameters import BANK, whole
from flix.backends.torch.patches.models import RoutedModel
from flix.core.adapter.adapter import Rename
from flix.core.errors import AdapterError, near
from flix.core.files import Path_, write_file

HEADS_FILE = "trained.safetensors"


def trained_heads(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that belong to an adapted model's adapter, by name.

    Those that require gradients, and those that did when the model was last saved or loaded: a head that is frozen
    while a new language is added stays part of the adapter. A parameter that several modules share has one name, the
    first.

    Raises:
        TargetError: the model is not adapted.
    """
    if not isinstance(model, RoutedModel):
        raise messages.not_adapted("trained_heads", model)
    known = set(model.flix_state.heads)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in base_parameters(model):
        if id(parameter) not in seen and (parameter.requires_grad or name in known):
            found[name] = parameter
        seen.add(id(parameter))
    return found


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter but the features', under every name that it has."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(BANK + "."):
            yield name, parameter


def remove_heads(folder: Path_) -> None:
    """Remove the heads of an earlier save from a folder, if it has any."""
    (Path(folder) / HEADS_FILE).unlink(missing_ok=True)


def save_heads(model: nn.Module, folder: Path_) -> None:
    """Write the trained heads of an adapted model into an adapter's folder, in their own dtypes.

    The file is written aside and moved into place. Without trained heads there is none, and one of an earlier save is
    removed. Buffers (running statistics) are not saved.

    Args:
        model: an adapted model.
        folder: the adapter's folder; made if it does not exist.
    """
    from safetensors.torch import save

    heads = trained_heads(model)
    model.flix_state.heads = tuple(heads)  # type: ignore[union-attr]
    place = Path(folder)
    if not heads:
        remove_heads(folder)
        return
    place.mkdir(parents=True, exist_ok=True)
    data = save({name: on_host(p) for name, p in heads.items()}, metadata={"format": "pt"})
    write_file(place / HEADS_FILE, data)


def read_heads(model: nn.Module, folder: Path_, rename: Rename) -> dict[str, Tensor]:
    """The trained heads of an adapter's folder, checked against a model, which is not changed.

    Args:
        model: a plain or adapted model.
        folder: the adapter's folder.
        rename: translates the paths of modules, as it does those of adapted layers.

    Raises:
        AdapterError: a damaged file, or a parameter that the model does not have, or has in another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / HEADS_FILE
    if not path.is_file():
        return {}
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} is damaged (truncated or altered): {error}") from error
    parameters = dict(base_parameters(model))
    heads = {}
    for old, value in found.items():
        name = _renamed(old, rename)
        if name not in parameters:
            raise AdapterError(
                f"{str(path)!r} holds the trained parameter {name!r}, which this "
                f"{type(model).__name__} does not have{near(name, parameters)}; load it into a model "
                "with the same head, or remove the file to do without"
            )
        if parameters[name].shape != value.shape:
            raise AdapterError(
                f"{str(path)!r}: the trained parameter {name!r} has the shape {list(value.shape)}, "
                f"but this {type(model).__name__}'s has {list(parameters[name].shape)}"
            )
        heads[name] = value
    return heads


def put_heads(model: nn.Module, heads: dict[str, Tensor]) -> None:
    """Give parameters the values of :func:`read_heads` and let them train."""
    if not heads:
        return
    parameters = dict(base_parameters(model))
    with torch.no_grad():
        for name, value in heads.items():
            parameters[name].copy_(value)
            parameters[name].requires_grad_(True)
    put = {id(parameters[name]) for name in heads}
    state = model.flix_state
    names = (name for name, p in parameters.items() if id(p) in put)
    state.heads = tuple({*state.heads, *names})  # type: ignore[union-attr, misc]


def _renamed(name: str, rename: Rename) -> str:
    """A parameter's name with its module's path translated."""
    module, dot, own = name.rpartition(".")
    if rename is None or not dot:
        return name
    return f"{rename(module) if callable(rename) else rename.get(module, module)}.{own}"


def on_host(parameter: Tensor) -> Tensor:
    """A copy of a parameter's values on the host, gathered if it is sharded."""
    return whole(parameter.detach()).cpu().clone().contiguous()


def whole_modules(model: nn.Module) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The modules that hold a model's trained heads, and all that is in them, as PEFT has them (``modules_to_save``).

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
            found[path] = {key: on_host(value).float().numpy() for key, value in state.items()}
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

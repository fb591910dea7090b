"""Trained heads: parameters of the base that were unfrozen are saved beside the features.

``adapt`` freezes the whole base. A classifier head, which starts from random values, is unfrozen by hand and trains
with the features; an adapter without it would be of no use. It goes into a file of its own, ``trained.safetensors``,
under the names of ``model.named_parameters()``, so that the adapter's own file stays the same for every backend.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flix.backends.torch.layer import flix_layers
from flix.backends.torch.parameters import BANK, whole
from flix.backends.torch.patches.models import state_of
from flix.core.adapter.adapter import Rename
from flix.core.adapter.heads import HEADS_FILE, check_heads, modules_of_heads, renamed
from flix.core.errors import AdapterError
from flix.core.files import Path_, write_file


def trained_heads(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that belong to an adapted model's adapter, by name.

    Those that require gradients, and those that did when the model was last saved or loaded: a head that is frozen
    while a new language is added stays part of the adapter. A parameter that several modules share has one name, the
    first.

    Raises:
        TargetError: the model is not adapted.
    """
    known = set(state_of("trained_heads", model).heads)
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
    state_of("save", model).heads = tuple(heads)
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
    heads = {renamed(name, rename): value for name, value in found.items()}
    check_heads(path, heads, dict(base_parameters(model)), type(model).__name__)
    return heads


def put_heads(model: nn.Module, heads: dict[str, Tensor]) -> None:
    """Give parameters the values of :func:`read_heads` and let them train."""
    if not heads:
        return
    for name in heads:
        _make_own(model, name)
    parameters = dict(base_parameters(model))
    with torch.no_grad():
        for name, value in heads.items():
            parameters[name].copy_(value)
            parameters[name].requires_grad_(True)
    put = {id(parameters[name]) for name in heads}
    state = state_of("load", model)
    names = (name for name, p in parameters.items() if id(p) in put)
    state.heads = tuple({*state.heads, *names})


_sharing: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def shares(*models: nn.Module) -> None:
    """Note that the parameters of these models' bases may be those of others."""
    _sharing.update(models)


def shared_heads(model: nn.Module) -> list[str]:
    """Names of the base's parameters that train, and that another model has, too."""
    others = {id(p) for other in _sharing if other is not model for p in other.parameters()}
    if model not in _sharing or not others:
        return []
    return [n for n, p in base_parameters(model) if p.requires_grad and id(p) in others]


def _make_own(model: nn.Module, name: str) -> None:
    """Give a model a parameter of its own where another model has the same one, under all names that it has."""
    parameters = dict(base_parameters(model))
    shared = parameters[name]
    if model not in _sharing or not any(
        p is shared for other in _sharing if other is not model for p in other.parameters()
    ):
        return
    own = nn.Parameter(shared.detach().clone(), shared.requires_grad)
    for path in [other for other, p in parameters.items() if p is shared]:
        module, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(module), attribute, own)


def on_host(parameter: Tensor) -> Tensor:
    """A copy of a parameter's values on the host, gathered if it is sharded."""
    return whole(parameter.detach()).cpu().clone().contiguous()


def whole_modules(model: nn.Module) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The modules that hold a model's trained heads, and all that is in them, as PEFT has them (``modules_to_save``).

    Returns:
        The values of each module's state, by the module's path and by their names inside it.

    Raises:
        AdapterError: a trained parameter that no such module holds.
    """
    parameters = {name: id(parameter) for name, parameter in base_parameters(model)}
    adapted = [path for path, _ in flix_layers(model)]
    return {
        path: {
            name: on_host(value).float().numpy()
            for name, value in model.get_submodule(path).state_dict().items()
        }
        for path in modules_of_heads(trained_heads(model), parameters, adapted)
    }

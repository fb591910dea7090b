"""Trained heads: parameters of the base that were unfrozen are saved beside the features.

``adapt`` freezes the whole base. A classifier head, which starts from random values, is unfrozen by hand and trains
with the features; an adapter without it would be of no use. It goes into a file of its own, ``trained.safetensors``,
under the names of ``model.named_parameters()``, so that the adapter's own file stays the same for every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from flix.backends.torch._layer import FeatureParameters
from flix.backends.torch.model import require_adapted
from flix.core.adapter.adapter import Rename
from flix.core.errors import AdapterError, near
from flix.core.files import Path_, write_file

HEADS_FILE = "trained.safetensors"


def trained_heads(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that belong to the adapter, by name.

    Those that require gradients, and those that did when the model was last saved or loaded: a head that is frozen
    while a new language is added stays part of the adapter. A parameter that several modules share has one name, the
    first.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "trained_heads")
    known = set(vars(model).get("flix_trained", ()))
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in _base_parameters(model):
        if id(parameter) not in seen and (parameter.requires_grad or name in known):
            found[name] = parameter
        seen.add(id(parameter))
    return found


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter but the features', under every name that it has; features may be many, and are not visited."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FeatureParameters):
            continue
        yield from module.named_parameters(path, recurse=False, remove_duplicate=False)


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

    Raises:
        TargetError: the model is not adapted.
    """
    from safetensors.torch import save

    heads = trained_heads(model)
    model.flix_trained = tuple(heads)  # type: ignore[assignment]
    place = Path(folder)
    if not heads:
        remove_heads(folder)
        return
    place.mkdir(parents=True, exist_ok=True)
    data = save({name: _whole(p) for name, p in heads.items()}, metadata={"format": "pt"})
    write_file(place / HEADS_FILE, data)


def load_heads(model: nn.Module, folder: Path_, rename: Rename = None) -> None:
    """Put the trained heads of an adapter's folder into a model; a folder without them changes nothing.

    The parameters get the file's values and require gradients, as they did when they were saved.

    Args:
        model: a plain or adapted model.
        folder: the adapter's folder.
        rename: translates the paths of modules, as it does those of adapted layers.

    Raises:
        AdapterError: a damaged file, or a parameter that the model does not have, or has in another shape.
    """
    put_heads(model, read_heads(model, folder, rename))


def read_heads(model: nn.Module, folder: Path_, rename: Rename = None) -> dict[str, Tensor]:
    """The trained heads of an adapter's folder, checked against a model, which is not changed.

    Raises:
        AdapterError: as :func:`load_heads`.
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
    parameters = dict(_base_parameters(model))
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
    parameters = dict(_base_parameters(model))
    with torch.no_grad():
        for name, value in heads.items():
            parameters[name].copy_(value)
            parameters[name].requires_grad_(True)
    put = {id(parameters[name]) for name in heads}
    known = set(vars(model).get("flix_trained", ()))
    names = (name for name, p in parameters.items() if id(p) in put)
    model.flix_trained = tuple(known.union(names))  # type: ignore[assignment]


def _renamed(name: str, rename: Rename) -> str:
    """A parameter's name with its module's path translated."""
    module, dot, own = name.rpartition(".")
    if rename is None or not dot:
        return name
    return f"{rename(module) if callable(rename) else rename.get(module, module)}.{own}"


def _whole(parameter: Tensor) -> Tensor:
    """A parameter's values on the host, gathered if it is sharded."""
    value = parameter.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu().clone().contiguous()

"""A tenant's training in a file: values, optimizer, schedule and steps, all of one moment."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flix.backends.torch.state import FlixState
from flix.core.errors import AdapterError, ConfigError, shown
from flix.core.features.names import Feature, written
from flix.core.files import Path_, make_folder, write_file

TENANT_FILE = "flix_tenant.pt"
_FORMAT, _VERSION = "flix tenant", 1
_KINDS: dict[str, Any] = {
    "feature": list,
    "layers": list,
    "values": Tensor,
    "optimizer": str,
    "optimizer_state": dict,
    "schedule": str,
    "schedule_state": dict,
    "taken": int,
    "limit": int | None,
    "stopped": bool,
}


def layers_of(state: FlixState, feature: Feature) -> list[list[Any]]:
    """Where and how a feature acts, in its vector's order: [path, rank, scale, d_in, d_out, experts] by layer."""
    layout, i = state.bank.layout, state.bank.ids[feature]
    return [
        [path, rank, float(layout.layouts[place].scales[i]), shape.d_in, shape.d_out, shape.experts]
        for (path, place), shape in zip(layout.places.items(), layout.shapes, strict=True)
        if (rank := layout.rank(i, place))
    ]


def save_tenant(folder: Path_, tenant: Any, state: FlixState) -> None:
    """Write a tenant's file, whole or not at all.

    Raises:
        ConfigError: a state that such a file cannot hold.
        AdapterError: the path is a file.
    """
    schedule = tenant.schedule
    said = {
        "format": _FORMAT,
        "version": _VERSION,
        "feature": list(tenant.feature),
        "layers": layers_of(state, tenant.feature),
        "values": tenant.parameter.detach(),
        "optimizer": type(tenant.optimizer).__name__,
        "optimizer_state": tenant.optimizer.state_dict(),
        "schedule": "" if schedule is None else type(schedule).__name__,
        "schedule_state": {} if schedule is None else schedule.state_dict(),
        "taken": tenant.taken,
        "limit": tenant.limit,
        "stopped": tenant.stopped,
    }
    file = io.BytesIO()
    try:
        torch.save(said, file)
        file.seek(0)
        torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the state of {written(tenant.feature)} ({said['optimizer']}, {said['schedule'] or 'no schedule'}) holds "
            f"more than tensors, numbers and texts, and cannot be saved: {str(error).splitlines()[0]}"
        ) from error
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{str(path)!r} is a file; a tenant is saved as a folder")
    make_folder(path)
    write_file(path / TENANT_FILE, file.getvalue())


@dataclass
class SavedTenant:
    """What a tenant's file says: see :class:`flix.backends.torch.tenants.Tenant`."""

    path: Path
    feature: Feature
    layers: list[Any]
    values: Tensor
    optimizer: str
    optimizer_state: dict[str, Any]
    schedule: str
    schedule_state: dict[str, Any]
    taken: int
    limit: int | None
    stopped: bool

    def check(self, state: FlixState) -> None:
        """Refuse a model in which the tenant would be another.

        Raises:
            AdapterError: another layer, rank, scale, size or dtype; the first is named.
        """
        found, name = layers_of(state, self.feature), written(self.feature)
        for mine, saved in zip(found, self.layers, strict=False):
            if mine != saved:
                raise AdapterError(
                    f"{str(self.path)!r} is of another model: {name} has [layer, rank, scale, d_in, d_out, experts] = "
                    f"{shown(saved)} there, {mine} here"
                )
        if len(found) != len(self.layers):
            raise AdapterError(
                f"{str(self.path)!r} is of another model: {name} acts in {len(self.layers)} layers there, in "
                f"{len(found)} here"
            )
        parameter = state.bank.parameter(self.feature)
        assert parameter is not None
        if parameter.shape != self.values.shape or parameter.dtype != self.values.dtype:
            raise AdapterError(
                f"{str(self.path)!r} holds {name} as {list(self.values.shape)} of {self.values.dtype}, the model as "
                f"{list(parameter.shape)} of {parameter.dtype}"
            )

    def put(self, tenant: Any) -> None:
        """Give a tenant what was saved.

        Raises:
            ConfigError: another class of optimizer or schedule, or a state that does not fit.
        """
        kinds = {
            "optimizer": (self.optimizer, type(tenant.optimizer).__name__),
            "schedule": (
                self.schedule or "none",
                "none" if tenant.schedule is None else type(tenant.schedule).__name__,
            ),
        }
        for what, (saved, given) in kinds.items():
            if saved != given:
                raise ConfigError(
                    f"the {what} of {written(self.feature)} was {saved} when it was saved, and is {given} here"
                )
        try:
            tenant.optimizer.load_state_dict(self.optimizer_state)
            if tenant.schedule is not None:
                tenant.schedule.load_state_dict(self.schedule_state)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the state of {written(self.feature)} in {str(self.path)!r} does not fit its {self.optimizer}: {error}"
            ) from error
        with torch.no_grad():
            tenant.parameter.copy_(self.values)
        tenant.taken = self.taken


def read_tenant(folder: Path_, feature: Feature) -> SavedTenant:
    """Read a tenant's file.

    Raises:
        AdapterError: there is none, it is damaged, or another tenant's.
    """
    path = Path(folder) / TENANT_FILE
    if not path.is_file():
        raise AdapterError(f"{str(folder)!r} is not a tenant's folder: it has no {TENANT_FILE}")
    try:
        said = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever torch makes of a file that anybody may have written
        raise AdapterError(f"{str(path)!r} cannot be read: {shown(error)}") from error
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise AdapterError(f"{str(path)!r} is not a tenant's file")
    if said.get("version") != _VERSION:
        raise AdapterError(
            f"{str(path)!r} is of version {shown(said.get('version'))}; this flix reads version {_VERSION}"
        )
    for key, kind in _KINDS.items():
        if key not in said or not isinstance(said[key], kind):
            raise AdapterError(f"{str(path)!r} is damaged: {key} is {shown(said.get(key))}")
    if tuple(said["feature"]) != feature:
        raise AdapterError(
            f"{str(path)!r} is {shown('='.join(map(str, said['feature'])))}, not {written(feature)}"
        )
    return SavedTenant(path, feature, **{key: said[key] for key in _KINDS if key != "feature"})

"""Checkpoints that several processes write and read together, whole or not at all (docs/distributed.md).

``torch.distributed.checkpoint`` lets each process write its own part of what is sharded, and any number of processes
read it again. What is written is what trains and what training needs: the features, trained heads, the optimizer's
state of those that have one, settings, and each process's random numbers; not the base. A checkpoint is written into a
folder aside, and takes its name in one step when all of it is there, so that no folder of that name is ever half
written, whenever processes are killed.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flix.backends.torch.distributed.writing import one_writes, rank, size, together, told
from flix.backends.torch.heads import trained_heads
from flix.backends.torch.patches.models import state_of
from flix.core.errors import AdapterError, ConfigError, listed, shown
from flix.core.features.names import written
from flix.core.files import Path_, write_file
from flix.core.folders import whole_folder
from flix.core.strictjson import parsed

MANIFEST = "flix_step.json"
"""The file that is written last into a checkpoint's folder; it names the others."""

_NAME = re.compile(r"step-(\d+)")
_FORMAT = "flix step"


def save_checkpoint(
    folder: Path_,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    extra: Any = None,
    *,
    keep: int | None = None,
) -> Path:
    """Write ``<folder>/step-<step>``; all processes call it together::

        save_checkpoint("checkpoints", model, optimizer, step, {"schedule": schedule.state_dict()}, keep=3)

    Args:
        folder: where checkpoints are kept; all processes must see it.
        model: an adapted model; its features may be sharded.
        optimizer: the optimizer that trains it.
        step: the number of the step, which names the checkpoint.
        extra: JSON-able settings of the loop: its place in the data, a schedule's state.
        keep: how many of the latest complete checkpoints to keep; default: all.

    Returns:
        The checkpoint's folder.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: an optimizer with parameters that are not the model's; settings that are not JSON-able; ``keep``
            below 1; a folder or file that is no checkpoint where this one would be.
        AdapterError: in the other processes, if the first one could not write.
    """
    dcp: Any = import_module("torch.distributed.checkpoint")

    state_of("save_checkpoint", model)
    if keep is not None and keep < 1:
        raise ConfigError(f"keep= must be at least 1, got {keep}")
    _reshard(model)
    tensors, plain = _optimizer_state(model, optimizer)
    tensors |= {**_values(model), **_random()}
    said = {
        "format": _FORMAT, "version": 1, "step": step, "processes": size(), "features": _sizes(model),
        "groups": _settings(model, optimizer), "state": plain, "extra": extra,
    }  # fmt: skip
    try:
        json.dumps(said, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"extra= and the optimizer's settings must be JSON-able: {error}"
        ) from error
    target = Path(folder) / f"step-{step}"
    with ExitStack() as held:
        stage = ""
        with one_writes() as first:
            if first:
                if target.exists() and not _is_ours(target):
                    raise ConfigError(f"{shown(str(target))} holds no checkpoint, and one would take its place; name another folder")  # fmt: skip
                stage = str(held.enter_context(whole_folder(target, MANIFEST, lambda _: False)))
        writer = dcp.FileSystemWriter(told(stage))
        dcp.save(tensors, storage_writer=writer, no_dist=not together())
        with one_writes() as first:
            if first:
                files = {p.name: p.stat().st_size for p in sorted(Path(stage).iterdir())}
                text = json.dumps({**said, "files": files}, indent=1) + "\n"
                write_file(Path(stage) / MANIFEST, text.encode())
                held.close()  # all of it is there: it takes its name
                if keep is not None:
                    _thin(Path(folder), keep)
    return target


def load_checkpoint(
    folder: Path_, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, Any]:
    """Read the latest complete checkpoint of a folder, or a given checkpoint; all processes call it together.

    Any number of processes may have written it; each process reads the part that it holds. If as many processes read
    as wrote, each also gets its random numbers back.

    Args:
        folder: the folder that you gave to :func:`save_checkpoint`, or one of the folders that it made.
        model: the model, adapted with the same configuration; its features may be sharded.
        optimizer: a new optimizer over its parameters.

    Returns:
        The step and the value of ``extra``; ``(0, None)`` if there is no complete checkpoint.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: a checkpoint of other features, or of an optimizer with other groups.
    """
    dcp: Any = import_module("torch.distributed.checkpoint")

    state_of("load_checkpoint", model)
    _reshard(model)
    last = last_checkpoint(folder)
    found = told(None if last is None else str(last))
    if found is None:
        return 0, None
    place = Path(found)
    said = _manifest(place)
    if said is None:
        raise ConfigError(f"the checkpoint {shown(found)} is complete in another process, but "
            f"not in this one; all processes must see it")  # fmt: skip
    _check_features(found, said["features"], _sizes(model))
    reader = dcp.FileSystemReader(place)
    there: dict[str, Any] = reader.read_metadata().state_dict_metadata
    values = _values(model)
    if missing := [name for name in values if name not in there]:
        raise ConfigError(f"the checkpoint {shown(found)} lacks {listed(missing, 5)}")
    own = f"random/{rank()}/" if said["processes"] == size() else "none"
    state = _places(model, optimizer, there)
    into = {name: value.clone() for name, value in values.items()}
    into |= {name: value for entries in state.values() for name, value in entries.items()}
    into |= {n: torch.empty(tuple(m.size), dtype=torch.uint8) for n, m in there.items() if n.startswith(own)}  # fmt: skip
    dcp.load(into, storage_reader=reader, no_dist=not together())
    _put_state(model, optimizer, said, {key: {n: into[n] for n in some} for key, some in state.items()})  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            value.copy_(into[name])
    for name in into:
        if name == f"{own}cpu":
            torch.set_rng_state(into[name])
        elif name == f"{own}cuda":
            torch.cuda.set_rng_state(into[name])
    return int(said["step"]), said["extra"]


def last_checkpoint(folder: Path_) -> Path | None:
    """The latest complete checkpoint of a folder, or the folder itself if it is one; None if there is none.

    A folder in which a file is missing or has another size, as after an interrupted copy, is skipped.
    """
    place = Path(folder)
    if _manifest(place) is not None:
        return place
    for _, path in sorted(_steps(place), reverse=True):
        if _manifest(path) is not None:
            return path
    return None


def _manifest(place: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where it is not whole."""
    try:
        said = parsed((place / MANIFEST).read_bytes(), shown(str(place)))
        whole = said["format"] == _FORMAT and all(
            (place / name).stat().st_size == size for name, size in said["files"].items()
        )
    except (OSError, AdapterError, KeyError, TypeError, AttributeError):
        return None
    return said if whole else None


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    if folder.is_dir():
        for path in folder.iterdir():
            if found := _NAME.fullmatch(path.name):
                yield int(found[1]), path


def _is_ours(place: Path) -> bool:
    """Whether a folder holds a checkpoint or what is left of one; a folder of this name may be somebody else's."""
    names = [path.name for path in place.iterdir()] if place.is_dir() else [""]
    return not names or any(n in (MANIFEST, ".metadata") or n.endswith(".distcp") for n in names)


def _thin(folder: Path, keep: int) -> None:
    """Remove all but the latest whole checkpoints, and what is left of others before them."""
    whole = sorted((n for n, path in _steps(folder) if _manifest(path) is not None), reverse=True)
    oldest = whole[:keep][-1]
    for step, path in _steps(folder):
        if step < oldest and _is_ours(path):
            (path / MANIFEST).unlink(missing_ok=True)  # first: without it, it is no checkpoint
            shutil.rmtree(path, ignore_errors=True)


def _keys(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, or trained: features and heads, by the names that checkpoints use."""
    bank = state_of("save_checkpoint", model).bank
    features = {f"feature/{bank.keys[i]}": p for i, p in bank.held().items()}
    return features | {f"head/{name}": p for name, p in trained_heads(model).items()}


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {f"value/{key}": parameter.detach() for key, parameter in _keys(model).items()}


def _sizes(model: nn.Module) -> dict[str, int]:
    """How long each feature's vector is, by its name."""
    bank = state_of("save_checkpoint", model).bank
    return {written(bank.features[i]): p.numel() for i, p in bank.held().items()}


def _check_features(place: str, there: Mapping[str, int], here: Mapping[str, int]) -> None:
    """Refuse a checkpoint of other features.

    Raises:
        ConfigError: it is.
    """
    unlike = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if unlike:
        said = [f"{n} ({there.get(n, 'none')} values there, {here.get(n, 'none')} here)" for n in unlike]  # fmt: skip
        raise ConfigError(
            f"the checkpoint {shown(place)} has other features: {listed(said, 5)}; adapt the "
            f"model with the configuration "
            "that it was trained with"
        )


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of an optimizer's parameters, by group."""
    names = {id(parameter): key for key, parameter in _keys(model).items()}
    unknown = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in names]  # fmt: skip
    if unknown:
        raise ConfigError(
            f"the optimizer has {len(unknown)} parameters that are neither features nor trained "
            f"heads of this model, of the shapes {listed(unknown, 3)}; make it from "
            f"trainable_parameters(model), after shard_features and fully_shard"
        )
    found = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    flat = [name for group in found for name in group]
    if twice := sorted({name for name in flat if flat.count(name) > 1}):
        raise ConfigError(f"the optimizer has {listed(twice, 5)} twice")
    return found


def _settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """An optimizer's groups: settings, and the names of their parameters."""
    made = []
    for group, names in zip(optimizer.param_groups, _names(model, optimizer), strict=True):
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in settings.items()}
        made.append({**plain, "params": names})
    return made


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The state of an optimizer's parameters: tensors by name, and what is no tensor by parameter."""
    tensors: dict[str, Any] = {}
    plain: dict[str, dict[str, Any]] = {}
    for group, names in zip(optimizer.param_groups, _names(model, optimizer), strict=True):
        for parameter, key in zip(group["params"], names, strict=True):
            for entry, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"state/{key}/{entry}"] = value.detach()
                else:
                    plain.setdefault(key, {})[entry] = value
    return tensors, plain


def _places(
    model: nn.Module, optimizer: torch.optim.Optimizer, there: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Where the tensors of an optimizer's state are read to, by parameter and by their names in the checkpoint.

    Parameters that had none, for their features were never active, get none.
    """
    parameters = _keys(model)
    found: dict[str, dict[str, Tensor]] = {}
    for key in (key for group in _names(model, optimizer) for key in group):
        like = parameters[key].detach()
        for name in [name for name in there if name.startswith(f"state/{key}/")]:
            said, dtype = there[name], there[name].properties.dtype
            if tuple(said.size) == tuple(like.shape):
                made = torch.zeros_like(like, dtype=dtype)
            else:
                made = torch.zeros(tuple(said.size), dtype=dtype)
            found.setdefault(key, {})[name] = made
    return found


def _put_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    said: Mapping[str, Any],
    state: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give an optimizer the settings and the state of a checkpoint.

    Raises:
        ConfigError: it has other groups.
    """
    names = _names(model, optimizer)
    there = [group["params"] for group in said["groups"]]
    if [set(group) for group in there] != [set(group) for group in names]:
        unlike = {n for g in there for n in g} ^ {n for g in names for n in g}
        raise ConfigError(
            f"the checkpoint's optimizer has {len(there)} groups of parameters and this one {len(names)}, or other "
            f"parameters in them: {listed(sorted(unlike), 5)}; make it like the one that was saved"
        )
    numbers = {name: i for i, name in enumerate(name for group in names for name in group)}
    groups = []
    for group, own, settings in zip(optimizer.param_groups, names, said["groups"], strict=True):
        kept = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in settings.items()}
        groups.append({**kept, "params": [numbers[name] for name in own]})
    whole = {
        number: {name.rpartition("/")[2]: v for name, v in state.get(key, {}).items()} | said["state"].get(key, {})
        for key, number in numbers.items()
        if key in state or key in said["state"]
    }  # fmt: skip
    optimizer.load_state_dict({"state": whole, "param_groups": groups})


def _random() -> dict[str, Tensor]:
    """This process's random numbers."""
    found = {f"random/{rank()}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found[f"random/{rank()}/cuda"] = torch.cuda.get_rng_state()
    return found


def _reshard(model: nn.Module) -> None:
    """Give the parameters of a model under FSDP2 back their shards: a forward without backward leaves some whole."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for module in model.modules():
        if isinstance(module, fsdp):
            module.reshard()  # type: ignore[attr-defined]


__all__ = ["MANIFEST", "last_checkpoint", "load_checkpoint", "save_checkpoint"]

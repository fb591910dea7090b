"""Where the rows of a data set are: its files, or a dataset of a hub, and by what a change of them is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flix.data.errors import DataError
from flix.data.files import Found, find_files, groups_of
from flix.data.loading import digest


def files_of(patterns: Sequence[str], folder: Path, groups: Iterable[str], name: str) -> list[Found]:  # fmt: skip
    """The files of a data set. One that several patterns match, or that has several names, counts once.

    Args:
        patterns: as for :func:`flix.data.files.find_files`.
        folder: the configuration's.
        groups: those whose features the names of files tell.
        name: the data set's, for messages.

    Raises:
        DataError: a pattern that matches nothing, or does not tell a group.
    """
    found: dict[Any, Found] = {}
    for pattern in patterns:
        for group in groups:
            if group not in groups_of(pattern):
                raise DataError(
                    f"dataset {name!r}: the name {pattern!r} does not contain the {group}, which "
                    f"other files' names do; write {{{group}}} in it"
                )
        try:
            for file in find_files(pattern, folder):
                key = os.path.realpath(file.path), tuple(sorted(file.features.items()))
                found.setdefault(key, file)
        except DataError as error:
            raise DataError(f"dataset {name!r}: {error}") from None
    return [*found.values()]


def hub_place(name: str, folder: Path) -> str:
    """Where a hub's dataset is: a folder beside the configuration, or the hub."""
    given = os.path.expanduser(name)
    place = folder / given
    return str(place) if place.exists() else given


def described(file: Found, *, streamed: bool = False) -> dict[str, Any]:
    """A file as ``run.json`` has it. One that is streamed is too large to be read for its digest alone."""
    found = file.path.stat()
    said: dict[str, Any] = {"name": str(file.path), "bytes": found.st_size, "sha256": None}
    said |= {"modified": found.st_mtime_ns} if streamed else {"sha256": digest(file.path)}
    return {**said, "features": dict(file.features)} if file.features else said


def described_split(hub: str, subset: str | None, split: str, state: str) -> dict[str, Any]:
    """A split of a hub's dataset as ``run.json`` has it; ``state`` changes with its rows."""
    name = f"{hub}/{subset} [{split}]" if subset else f"{hub} [{split}]"
    return {"name": name, "bytes": None, "sha256": None, "state": state}

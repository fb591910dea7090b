"""Adapters on a hub (extra ``hub``): fetch them by name into the hub's cache, and push them with a card.

``load(model, "org/name")`` fetches by itself. A revision is one commit, so all files that are read are of one
version. Adapters in the cache need no network (``HF_HUB_OFFLINE=1``).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flix.core.adapter.files import (
    CONFIG_FILE,
    HEADS_FILE,
    RECIPE_FILE,
    TENSOR_FILE,
    goes_on,
    stored_adapter,
)
from flix.core.errors import AdapterError, MissingFrameworkError, shown
from flix.core.files import Path_
from flix.hub.card import card

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FILES = (TENSOR_FILE, CONFIG_FILE, HEADS_FILE, RECIPE_FILE)
# The last is there if a run wrote the adapter.


def is_name(given: Path_) -> bool:
    """Whether this is a name on a hub, ``org/name``, and not a local path (there is no folder ``org``)."""
    return (
        isinstance(given, str)
        and _NAME.fullmatch(given) is not None
        and not os.path.exists(given)
        and not os.path.isdir(given.partition("/")[0])
    )


def place(given: Path_, revision: str | None = None) -> Path_:
    """An adapter's folder: the given one, or, for a name on a hub, the folder in the cache.

    Args:
        given: a folder, or ``org/name``.
        revision: a branch, tag or commit of the hub.

    Raises:
        AdapterError: the hub cannot provide it, or a revision is given for a folder.
        MissingFrameworkError: ``huggingface_hub`` is needed and not installed.
    """
    if is_name(given):
        return fetch(str(given), revision)
    if revision is not None:
        raise AdapterError(
            f"revision= is for adapters of a hub, named org/name; {shown(str(given))} is a folder, or none"
        )
    return given


def fetch(name: str, revision: str | None = None) -> Path:
    """Fetch an adapter from a hub, and return its folder in the hub's cache.

    Args:
        name: ``org/name``.
        revision: a branch, tag or commit; default: the main branch as it is now.

    Raises:
        AdapterError: there is no such repository or revision, it holds no adapter, or the hub cannot be reached and the
            cache does not have it.
        MissingFrameworkError: ``huggingface_hub`` is not installed.
    """
    hub = _hub()
    try:
        found = hub.snapshot_download(name, revision=revision, allow_patterns=list(_FILES))
    except Exception as error:
        raise _told(hub, error, f"the adapter {name!r} cannot be fetched", revision) from error
    folder = Path(found)
    if not any((folder / file).is_file() for file in (TENSOR_FILE, CONFIG_FILE)):
        raise AdapterError(f"{name!r} on the hub holds no adapter of flix: it has no {TENSOR_FILE}")
    return folder


def push(
    folder: Path_,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "",
    run: Mapping[str, Any] | None = None,
) -> str:
    """Push an adapter's folder to a hub, with a card, as one commit. The repository is created if it does not exist.

    If the folder has no ``recipe.json`` and the repository has the one of another adapter, that one is removed.

    Args:
        folder: the adapter's folder.
        name: ``org/name``.
        private: whether a new repository is private; default: the organisation's setting.
        revision: the branch; default: the main one.
        message: the commit message.
        run: what a run measured, as in ``metrics.json``; the card shows its scores.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: there is no adapter, the name is ill-formed, or the hub refuses.
        MissingFrameworkError: ``huggingface_hub`` is not installed.
    """
    if not _NAME.fullmatch(name):
        raise AdapterError(f"adapters on a hub are named org/name, got {shown(name)}")
    hub = _hub()
    with stored_adapter(folder) as adapter:  # what is damaged stays here
        text = card(name, adapter.config, adapter.layers, adapter.base, run)
        of = adapter.config, adapter.base
    with tempfile.TemporaryDirectory() as aside:
        readme = Path(aside, "README.md")
        readme.write_text(text, encoding="utf-8")
        files = [Path(folder, file) for file in _FILES if Path(folder, file).is_file()]
        added = [hub.CommitOperationAdd(path.name, str(path)) for path in (*files, readme)]
        try:
            api = hub.HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            left = {*api.list_repo_files(name, revision=revision)} - {path.name for path in files}
            if RECIPE_FILE in left and goes_on(fetch(name, revision), *of):
                left.remove(RECIPE_FILE)
            stale = [hub.CommitOperationDelete(n) for n in (HEADS_FILE, RECIPE_FILE) if n in left]
            done = api.create_commit(
                name,
                [*added, *stale],
                commit_message=message or "An adapter of flix",
                revision=revision,
            )
        except Exception as error:
            raise _told(
                hub, error, f"the adapter cannot be pushed to {name!r}", revision
            ) from error
    return str(done.commit_url)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingFrameworkError(
            "adapters of a hub need huggingface_hub, which is not installed; install it with: "
            'pip install "flix-peft[hub]"'
        ) from error
    return huggingface_hub


def _told(hub: Any, error: Exception, what: str, revision: str | None) -> AdapterError:
    """A hub's error in a line, with the way out."""
    errors = hub.errors
    if isinstance(error, errors.RevisionNotFoundError):
        why = f"there is no revision {revision!r}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = "there is no such repository, or it is private and you are not logged in (hf auth login)"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        why = "the hub cannot be reached, and the cache does not have it"
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = " ".join([f"{type(error).__name__}:", *lines[:2]])
    return AdapterError(f"{what}: {why}")


__all__ = ["card", "fetch", "is_name", "place", "push"]

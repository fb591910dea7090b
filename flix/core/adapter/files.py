"""An adapter's folder (docs/specification.md §4.2): one file that counts, no pickle, no framework.

``flix.safetensors`` holds everything, the description in its metadata. ``flix_config.json`` is a copy of the
description for people, which nothing reads where the file is of version 2. Folders of version 1 have their description
in ``flix_config.json``, and trained heads in ``trained.safetensors``; they are read, and become version 2 when saved.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from flix.core.adapter.adapter import (
    Adapter,
    LayerShape,
    Pair,
    Rename,
    check_tensors,
    checked_pairs,
    expected_tensors,
)
from flix.core.adapter.base import differing
from flix.core.adapter.described import DTYPES, Base, Head
from flix.core.adapter.description import (
    VERSION,
    Description,
    as_metadata,
    described,
    from_metadata,
    read,
)
from flix.core.adapter.stored import StoredTensors
from flix.core.adapter.stream import write_tensors
from flix.core.config.config import FlixConfig
from flix.core.errors import AdapterError
from flix.core.features.names import Feature
from flix.core.files import Path_, make_folder, sweep, write_file
from flix.core.garbage import uncollected
from flix.core.strictjson import parsed

TENSOR_FILE = "flix.safetensors"
CONFIG_FILE = "flix_config.json"
HEADS_FILE = "trained.safetensors"
"""Of version 1."""
RECIPE_FILE = "recipe.json"
"""What ``flix train`` writes beside them: how the adapter is asked (:mod:`flix.tasks.recipe`)."""
_HEAD = "trained."


@uncollected
def save_adapter(adapter: Adapter, directory: Path_) -> None:
    """Write an adapter's folder. At any moment, a reader sees the complete old version or the complete new one.

    Tensors are stored as float32 (or as float64, if they are float64), and heads in their own dtypes. A ``recipe.json``
    that ``flix train`` wrote for another adapter is removed: it stays if this one has every feature of the adapter
    that is replaced, and its base.

    Raises:
        AdapterError: the path exists and is not a folder.
    """
    tensors = list(adapter.tensors.items())
    _write(adapter.config, adapter.layers, tensors, directory, adapter.heads, adapter.base)


@uncollected
def save_new_adapter(adapter: Adapter, directory: Path_) -> None:
    """The same of an adapter that goes on with none that the folder may hold: an earlier one's recipe goes with it.

    Raises:
        AdapterError: the path exists and is not a folder.
    """
    tensors = list(adapter.tensors.items())
    _write(
        adapter.config, adapter.layers, tensors, directory, adapter.heads, adapter.base, new=True
    )


@uncollected
def save_pairs(
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    pairs: Mapping[str, Mapping[Feature, Pair]],
    directory: Path_,
    heads: Mapping[str, Head] | None = None,
    base: Base | None = None,
) -> None:
    """The same of pairs by layer and feature, which need not become an adapter first.

    Raises:
        AdapterError: the path exists and is not a folder; a pair is missing or has another shape.
    """
    _write(config, layers, checked_pairs(config, layers, pairs), directory, heads or {}, base)


def _write(
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    tensors: Sequence[tuple[str, NDArray[Any]]],
    directory: Path_,
    heads: Mapping[str, Head],
    base: Base | None,
    new: bool = False,
) -> None:
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"an adapter is saved as a folder, but {str(folder)!r} is a file")
    named_heads = {_HEAD + name: head for name, head in heads.items()}
    if len({*named_heads, *(name for name, _ in tensors)}) < len(named_heads) + len(tensors):
        raise AdapterError(
            "two layers, features or heads give a tensor the same name in the file; rename one"
        )
    make_folder(folder)
    sweep(folder, TENSOR_FILE, CONFIG_FILE, HEADS_FILE)
    description = described(config, layers, heads, base)
    recipe = folder / RECIPE_FILE
    stale = recipe.is_file() and (new or not goes_on(folder, config, base))

    def write(file: BinaryIO) -> None:
        metadata = as_metadata(description)
        description["sha256"] = write_tensors(file, tensors, metadata, named_heads)
        if (
            stale
        ):  # just before the new file takes its place: a kill leaves either adapter without one
            recipe.unlink(missing_ok=True)

    write_file(folder / TENSOR_FILE, write)
    # The save has landed. What follows is for people, and tidies up after version 1.
    (folder / HEADS_FILE).unlink(missing_ok=True)
    copy = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    write_file(folder / CONFIG_FILE, copy.encode())


def goes_on(folder: Path, config: FlixConfig, base: Base | None) -> bool:
    """Whether an adapter may be a later state of the one in a folder, so that what was said of that one holds for it.

    A feature that was removed is still known by its name; one that was renamed is another. Heads are not compared: a
    recipe whose heads are not there is refused when it is read.

    Args:
        folder: the folder.
        config, base: of the adapter.
    """
    try:
        old = _description(folder)
    except AdapterError:
        return not any((folder / name).exists() for name in (TENSOR_FILE, CONFIG_FILE))
    known = {*config.registry.features}
    return known.issuperset(old.config.registry.features) and not differing(old.base, base)


@uncollected
def load_adapter(directory: Path_, rename: Rename = None, *, finite: bool = True) -> Adapter:
    """Read an adapter's folder into numpy; no framework is needed.

    Args:
        directory: the folder that :func:`save_adapter`, or a backend's ``save``, wrote.
        rename: translates layer paths, see :meth:`Adapter.renamed`.
        finite: refuse NaN and infinite values; False reads them, so that you can look for what is broken.

    Raises:
        AdapterError: a missing or damaged file, another version, or tensors that do not fit the configuration;
            the file or tensor is named.
    """
    with stored_adapter(directory, finite=finite) as stored:
        tensors = dict(stored.tensors)
    # The tensors were checked as they were read; with many, checking again would show.
    whole = Adapter.partial(stored.config, stored.layers, tensors, stored.heads, stored.base)
    return whole.renamed(rename)


@contextmanager
def stored_adapter(
    directory: Path_, rename: Rename = None, *, finite: bool = True
) -> Iterator[Adapter]:
    """The same while its file is open: each tensor is read when it is asked for, and belongs to who asked."""
    folder = Path(directory)
    path = folder / TENSOR_FILE
    if not path.is_file():
        kind = "a complete adapter" if (folder / CONFIG_FILE).is_file() else "an adapter"
        raise AdapterError(f"{str(folder)!r} is not {kind}: it has no {TENSOR_FILE}")
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from error
    with file:
        try:
            found = _checked(path, file, finite)
        except (OSError, ValueError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(
                f"{str(path)!r} is damaged (truncated or altered): {error}"
            ) from error
        yield found.renamed(rename)


def read_description(path: Path_) -> tuple[FlixConfig, dict[str, LayerShape]]:
    """An adapter's configuration and layers, without its tensors.

    Args:
        path: the folder, or a ``flix_config.json`` alone.

    Raises:
        AdapterError: a missing or damaged file, or another version.
    """
    found = _description(Path(path))
    return found.config, found.layers


def _description(given: Path) -> Description:
    folder = given if given.is_dir() else given.parent
    tensors = folder / TENSOR_FILE
    found = None
    if (given.is_dir() or given.name == CONFIG_FILE) and tensors.is_file():
        where = repr(str(tensors))
        try:
            with open(tensors, "rb", buffering=0) as file:
                found = from_metadata(StoredTensors(file).metadata, where)
        except (OSError, ValueError) as error:
            if isinstance(error, AdapterError):
                raise
            # Not from the copy: nobody knows whether it is one of this file.
            raise AdapterError(f"{where} is damaged (truncated or altered): {error}") from error
    if found is None:
        found = _read_copy(given / CONFIG_FILE if given.is_dir() else given)
    return found


def _read_copy(file: Path) -> Description:
    """A description in a file of its own: of version 1, or a copy."""
    if not file.is_file():
        if file.name == CONFIG_FILE:
            raise AdapterError(f"{str(file.parent)!r} is not an adapter: it has no {CONFIG_FILE}")
        raise AdapterError(f"{str(file)!r} does not exist")
    try:
        text = file.read_bytes()
    except OSError as error:
        raise AdapterError(f"{str(file)!r} cannot be read: {error}") from error
    return read(parsed(text, repr(str(file))), repr(str(file)))


@uncollected
def _checked(path: Path, file: BinaryIO, finite: bool) -> Adapter:
    """What a file holds, once it was found to be an adapter's; its pairs are read when they are asked for."""
    stored = StoredTensors(file)
    where = repr(str(path))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stored.digest)
        said = from_metadata(stored.metadata, where)
        version = 1 if said is None else VERSION
        if said is None:
            said = _read_copy(path.parent / CONFIG_FILE)
        heads = {name: _HEAD + name for name in said.heads} if version > 1 else {}
        pairs = _Pairs(stored, heads.values(), _spellings(stored, said))
        check_tensors(said.config, said.layers, pairs.shapes, pairs.dtypes, where)
        found, broken = reading.result()
    if said.digest is not None and found != said.digest:
        other = f", {CONFIG_FILE} says" if version == 1 else ", and should be"
        raise AdapterError(
            f"{where} was altered: its SHA-256 is {found[:12]}...{other} {said.digest[:12]}..."
            + ("; the two files must come from one save" if version == 1 else "")
        )
    if broken is not None and finite:
        raise AdapterError(
            f"{where}: tensor {broken!r} holds values that are NaN or infinite; load_adapter(..., finite=False) reads "
            "them"
        )
    if version == 1:
        held = _heads_of_version_1(path.parent / HEADS_FILE, finite)
    else:
        held = _heads(stored, heads, where)
    return Adapter.partial(said.config, said.layers, pairs, held, said.base)


class _Pairs(Mapping[str, NDArray[Any]]):
    """A file's tensors without its heads, and under the names that registries keep."""

    def __init__(
        self, stored: StoredTensors, heads: Collection[str], spellings: Mapping[str, str]
    ) -> None:
        self._stored, self._spellings = stored, spellings
        self.shapes, self.dtypes = stored.shapes, stored.dtypes
        if heads or spellings:
            kept = {given: name for name, given in spellings.items()}
            gone = {*heads}
            self.shapes = {kept.get(n, n): s for n, s in stored.shapes.items() if n not in gone}
            self.dtypes = {kept.get(n, n): d for n, d in stored.dtypes.items() if n not in gone}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.shapes:
            raise KeyError(name)
        return self._stored[self._spellings.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _spellings(stored: StoredTensors, said: Description) -> dict[str, str]:
    """How the file writes tensors of features whose names it holds in another Unicode form than NFC."""
    odd = {
        unicodedata.normalize("NFC", name): name
        for name in stored.shapes
        # Normalising costs the square of a length: what is longer is not looked for.
        if not name.isascii() and len(name) < 400 and not unicodedata.is_normalized("NFC", name)
    }
    if not odd:
        return {}
    found = {}
    for name, _ in expected_tensors(said.config, said.layers):
        given = odd.get(unicodedata.normalize("NFC", name)) if len(name) < 400 else None
        if given is not None and name not in stored.shapes:
            found[name] = given
    return found


def _heads(stored: StoredTensors, names: Mapping[str, str], where: str) -> dict[str, Head]:
    """The heads of a file, by the names of their tensors."""
    found = {}
    for name, tensor in names.items():
        if tensor not in stored.shapes:
            raise AdapterError(f"{where} lacks the tensor {tensor!r}")
        if stored.dtypes[tensor] not in DTYPES:
            raise AdapterError(
                f"{where}: tensor {tensor!r} must be one of {', '.join(DTYPES)}, got {stored.dtypes[tensor]}"
            )
        found[name] = Head(stored.dtypes[tensor], stored[tensor])
    return found


def _heads_of_version_1(path: Path, finite: bool) -> dict[str, Head]:
    if not path.is_file():
        return {}
    where = repr(str(path))
    try:
        with open(path, "rb", buffering=0) as file:
            stored = StoredTensors(file)
            _, broken = stored.digest()
            if broken is not None and finite:
                raise AdapterError(f"{where}: tensor {broken!r} holds values that are NaN or infinite")  # fmt: skip
            return _heads(stored, {name: name for name in stored}, where)
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{where} is damaged (truncated or altered): {error}") from error

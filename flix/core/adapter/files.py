"""An adapter's files (docs/specification.md §4.2): JSON and safetensors, no pickle, no framework."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from mmap import ACCESS_READ, mmap
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
)
from flix.core.adapter.stream import StoredTensors, write_tensors
from flix.core.checks import is_whole
from flix.core.config.config import FlixConfig
from flix.core.errors import AdapterError, FlixError
from flix.core.features.names import Feature
from flix.core.files import Path_, write_files
from flix.core.garbage import uncollected

CONFIG_FILE = "flix_config.json"
TENSOR_FILE = "flix.safetensors"
FORMAT = "flix"
VERSION = 1


@uncollected
def save_adapter(adapter: Adapter, directory: Path_) -> None:
    """Write an adapter's folder. Each file is written aside, synced and moved into place.

    Tensors are stored as float32 (float64 where they are float64).

    Raises:
        AdapterError: the path exists and is not a folder.
    """
    _write(adapter.config, adapter.layers, list(adapter.tensors.items()), directory)


@uncollected
def save_pairs(
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    pairs: Mapping[str, Mapping[Feature, Pair]],
    directory: Path_,
) -> None:
    """The same of pairs by layer and feature, which need not become an adapter first.

    Raises:
        AdapterError: the path exists and is not a folder; a pair is missing or has another shape.
    """
    _write(config, layers, checked_pairs(config, layers, pairs), directory)


def _write(
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    tensors: Sequence[tuple[str, NDArray[Any]]],
    directory: Path_,
) -> None:
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"an adapter is saved as a folder, but {str(folder)!r} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "layers": {
            path: {"kind": shape.kind, "d_in": shape.d_in, "d_out": shape.d_out}
            for path, shape in layers.items()
        },
    }

    def write(file: BinaryIO) -> None:
        description["sha256"] = write_tensors(file, tensors, {"format": FORMAT})

    def describe(file: BinaryIO) -> None:  # after the tensors, whose digest it holds
        file.write((json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode())

    write_files(folder, {TENSOR_FILE: write, CONFIG_FILE: describe})


@uncollected
def load_adapter(directory: Path_, rename: Rename = None) -> Adapter:
    """Read an adapter's folder into numpy; no framework is needed.

    Args:
        directory: the folder that :func:`save_adapter`, or a backend's ``save``, wrote.
        rename: translates layer paths, see :meth:`Adapter.renamed`.

    Raises:
        AdapterError: a missing or damaged file, another version, or tensors that do not fit the configuration;
            the file or tensor is named.
    """
    with stored_adapter(directory) as stored:
        tensors = dict(stored.tensors)
    # The tensors were checked as they were read; with many, checking again would show.
    return Adapter.partial(stored.config, stored.layers, tensors).renamed(rename)


@contextmanager
def stored_adapter(directory: Path_, rename: Rename = None) -> Iterator[Adapter]:
    """The same while its file is open: each tensor is read when it is asked for, and belongs to who asked."""
    folder = Path(directory)
    config, layers, digest = _described(folder / CONFIG_FILE)
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise AdapterError(f"{str(folder)!r} is not a complete adapter: it has no {TENSOR_FILE}")
    with ExitStack() as stack:
        try:
            tensors = stack.enter_context(_opened(path, config, layers, digest))
        except (OSError, ValueError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(
                f"{str(path)!r} is damaged (truncated or altered): {error}"
            ) from error
        yield Adapter.partial(config, layers, tensors).renamed(rename)


def read_description(path: Path_) -> tuple[FlixConfig, dict[str, LayerShape]]:
    """An adapter's configuration and layers, without its tensors.

    Args:
        path: the folder, or its ``flix_config.json`` alone.

    Raises:
        AdapterError: a missing or damaged file, or another version.
    """
    file = Path(path)
    return _described(file / CONFIG_FILE if file.is_dir() else file)[:2]


def _described(file: Path) -> tuple[FlixConfig, dict[str, LayerShape], str | None]:
    """Configuration, layers and the digest of the tensors."""
    if not file.is_file():
        if file.name == CONFIG_FILE:
            raise AdapterError(f"{str(file.parent)!r} is not an adapter: it has no {CONFIG_FILE}")
        raise AdapterError(f"{str(file)!r} does not exist")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise AdapterError(f"{str(file)!r} does not describe a flix adapter (no 'format': 'flix')")
    if data.get("version") != VERSION:
        raise AdapterError(
            f"{str(file)!r} has format version {data.get('version')!r}; this flix reads "
            f"version {VERSION}"
        )
    try:
        config = FlixConfig.from_dict(data["config"])
        layers = {
            name: LayerShape(d_in=entry["d_in"], d_out=entry["d_out"], kind=entry["kind"])
            for name, entry in data["layers"].items()
        }
    except (FlixError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{str(file)!r} is damaged or was altered: {error}") from error
    for name, shape in layers.items():
        sizes = (shape.d_in, shape.d_out)
        if shape.kind not in ("linear", "embedding") or any(
            not is_whole(size) or size < 0 for size in sizes
        ):
            raise AdapterError(f"{str(file)!r} describes the layer {name!r} wrongly: {shape}")
    return config, layers, data.get("sha256")


@contextmanager
def _opened(
    path: Path, config: FlixConfig, layers: Mapping[str, LayerShape], digest: str | None
) -> Iterator[StoredTensors]:
    """A file's tensors, once they were found to be those of the adapter."""
    with open(path, "rb", buffering=0) as file:
        with ThreadPoolExecutor(1) as pool:  # hashing takes no turn at Python's lock
            hashing = pool.submit(_digest, path)
            tensors = _checked(path, file, config, layers)
            found = hashing.result()
        if digest is not None and found != digest:
            raise AdapterError(
                f"{str(path)!r} was altered: its SHA-256 is {found[:12]}..., {CONFIG_FILE} says "
                f"{str(digest)[:12]}...; the two files must come from one save"
            )
        yield tensors


@uncollected
def _checked(
    path: Path, file: BinaryIO, config: FlixConfig, layers: Mapping[str, LayerShape]
) -> StoredTensors:
    tensors = StoredTensors(file)
    check_tensors(config, layers, tensors.shapes, tensors.dtypes, repr(str(path)))
    return tensors


def _digest(path: Path) -> str:
    # Mapped, so that hashing is one call, which never waits for Python's lock.
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()

"""An adapter's files (docs/specification.md §4.2): JSON and safetensors, no pickle, no framework."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter, LayerShape, Rename, check_tensors
from flix.core.checks import is_whole
from flix.core.config.config import FlixConfig
from flix.core.errors import AdapterError, FlixError
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
    from safetensors.numpy import save

    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"an adapter is saved as a folder, but {str(folder)!r} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: np.ascontiguousarray(
            tensor, dtype=np.float64 if tensor.dtype == np.float64 else np.float32
        )
        for name, tensor in adapter.tensors.items()
    }
    # One key: the library writes several in no fixed order, and equal adapters should be equal bytes.
    data = save(tensors, metadata={"format": FORMAT})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "config": adapter.config.to_dict(),
        "layers": {
            path: {"kind": shape.kind, "d_in": shape.d_in, "d_out": shape.d_out}
            for path, shape in adapter.layers.items()
        },
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    write_files(folder, {TENSOR_FILE: data, CONFIG_FILE: text.encode()})


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
    folder = Path(directory)
    config, layers, digest = _described(folder / CONFIG_FILE)
    tensors = _read_tensors(folder, config, layers, digest)
    # The tensors were checked as they were read; with many, checking again would show.
    return Adapter.partial(config, layers, tensors).renamed(rename)


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


def _read_tensors(
    folder: Path, config: FlixConfig, layers: Mapping[str, LayerShape], digest: str | None
) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError, safe_open

    path = folder / TENSOR_FILE
    if not path.is_file():
        raise AdapterError(f"{str(folder)!r} is not a complete adapter: it has no {TENSOR_FILE}")
    try:
        with safe_open(path, framework="numpy") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
            dtypes = {name: header.get_dtype() for name, header in headers.items()}
            check_tensors(config, layers, shapes, dtypes, repr(str(path)))
            if digest is not None:
                _check_digest(path, digest)
            return {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{str(path)!r} is damaged (truncated or altered): {error}") from error


def _check_digest(path: Path, digest: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise AdapterError(
            f"{str(path)!r} was altered: its SHA-256 is {found[:12]}..., {CONFIG_FILE} says "
            f"{str(digest)[:12]}...; the two files must come from one save"
        )

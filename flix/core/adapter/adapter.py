"""Adapters as data, and their files (docs/specification.md §4.2): JSON and safetensors, no pickle, no framework."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from flix.core.config.config import FlixConfig, nested
from flix.core.config.targets import exactly
from flix.core.errors import AdapterError, FlixError, listed, near
from flix.core.features.registry import Feature
from flix.core.garbage import uncollected

CONFIG_FILE = "flix_config.json"
TENSOR_FILE = "flix.safetensors"
FORMAT = "flix"
VERSION = 1

Rename = Union[Mapping[str, str], Callable[[str], str], None]
Path_ = Union[str, "os.PathLike[str]"]
_ALLOWED = ("F16", "F32", "F64", "float16", "float32", "float64")


@dataclass(frozen=True)
class LayerShape:
    """An adapted layer's kind and sizes.

    Attributes:
        d_in: input size (of an embedding: the vocabulary's).
        d_out: output size.
        kind: ``"linear"`` or ``"embedding"``.
    """

    d_in: int
    d_out: int
    kind: str = "linear"


@dataclass(frozen=True, eq=False)
class Adapter:
    """A configuration, the adapted layers, and the low-rank pairs of every feature.

    Attributes:
        config: the configuration.
        layers: the adapted layers by path, in the model's order.
        tensors: ``<path>.A.<group>.<feature>`` ``[r, d_in]`` and ``<path>.B.<group>.<feature>`` ``[d_out, r]``.

    Raises:
        AdapterError: a missing or unexpected tensor, or one of the wrong shape or dtype; it is named.
    """

    config: FlixConfig
    layers: Mapping[str, LayerShape]
    tensors: Mapping[str, NDArray[Any]] = field(repr=False)

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        # A dtype's name is worked out anew at every asking, which shows with many tensors.
        names = {dtype: str(dtype) for dtype in {t.dtype for t in self.tensors.values()}}
        dtypes = {name: names[tensor.dtype] for name, tensor in self.tensors.items()}
        _check_tensors(self.config, self.layers, shapes, dtypes, "the adapter")

    @classmethod
    def partial(
        cls,
        config: FlixConfig,
        layers: Mapping[str, LayerShape],
        tensors: Mapping[str, NDArray[Any]],
    ) -> Adapter:
        """An adapter whose tensors are taken as they are: checked already, or of some of the features alone."""
        adapter = object.__new__(cls)
        vars(adapter).update(config=config, layers=layers, tensors=tensors)
        return adapter

    def pair(self, layer: str, feature: Feature) -> tuple[NDArray[Any], NDArray[Any]]:
        """A_f ``[r, d_in]`` and B_f ``[d_out, r]`` of a feature in a layer; empty where its rank is 0.

        Raises:
            AdapterError: the layer is not adapted.
            FeatureError: no such feature.
        """
        self.config.registry.id(*feature)
        if layer not in self.layers:
            raise AdapterError(
                f"layer {layer!r} is not adapted{near(layer, self.layers)}; adapted layers: "
                f"{listed(self.layers)}"
            )
        shape = self.layers[layer]
        if self.config.rank(layer, feature) == 0:
            return np.zeros((0, shape.d_in), np.float32), np.zeros((shape.d_out, 0), np.float32)
        return (
            self.tensors[tensor_name(layer, "A", feature)],
            self.tensors[tensor_name(layer, "B", feature)],
        )

    def renamed(self, rename: Rename) -> Adapter:
        """The same adapter with other layer paths.

        Args:
            rename: a mapping (paths it does not name stay) or a callable, from this adapter's paths to the new.

        Raises:
            AdapterError: two layers get one name, a mapping names an unknown layer, or no string comes back.
        """
        if rename is None:
            return self
        renamer = _renamer(rename, self.layers)
        layers: dict[str, LayerShape] = {}
        tensors: dict[str, NDArray[Any]] = {}
        for old, shape in self.layers.items():
            new = renamer(old)
            if not isinstance(new, str) or not new:
                raise AdapterError(f"rename must give a layer path, got {new!r} for {old!r}")
            if new in layers:
                raise AdapterError(f"rename gives the path {new!r} to two layers, {old!r} is one")
            layers[new] = shape
            for feature in self.config.registry.features:
                if self.config.rank(old, feature) == 0:
                    continue
                for part in "AB":
                    tensors[tensor_name(new, part, feature)] = self.tensors[
                        tensor_name(old, part, feature)
                    ]
        return Adapter(_with_ranks_of(self.config, self.layers, layers), layers, tensors)


def _renamer(rename: Rename, layers: Mapping[str, LayerShape]) -> Callable[[str], str]:
    if callable(rename):
        return rename
    if not isinstance(rename, Mapping):
        raise AdapterError(f"rename must be a mapping of layer paths or a callable, got {rename!r}")
    table: Mapping[str, str] = rename
    for old in table:
        if old not in layers:
            raise AdapterError(
                f"rename names the layer {old!r}, which is not adapted{near(old, layers)}; "
                f"adapted layers: {listed(layers)}"
            )
    return lambda path: table.get(path, path)


def _with_ranks_of(
    config: FlixConfig, old: Mapping[str, LayerShape], new: Mapping[str, LayerShape]
) -> FlixConfig:
    """The configuration for renamed layers: rank patterns may not match the new paths, so they are spelled out."""
    if not config.rank_pattern:
        return config
    groups: dict[tuple[tuple[Feature, int], ...], list[str]] = {}
    for before, path in zip(old, new, strict=True):
        ranks = tuple((f, config.rank(before, f)) for f in config.registry.live)
        groups.setdefault(ranks, []).append(path)
    pattern = {exactly(paths): nested(dict(ranks)) for ranks, paths in groups.items()}
    return replace(config, rank_pattern=pattern)


def tensor_name(layer: str, part: str, feature: Feature) -> str:
    """The name of a tensor in the file; ``part`` is ``"A"`` or ``"B"``."""
    return f"{layer}.{part}.{feature[0]}.{feature[1]}"


def expected_tensors(
    config: FlixConfig, layers: Mapping[str, LayerShape]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and shape of every tensor that an adapter of these layers has."""
    for path, shape in layers.items():
        for feature in config.registry.features:
            rank = config.rank(path, feature)
            if rank:
                yield tensor_name(path, "A", feature), (rank, shape.d_in)
                yield tensor_name(path, "B", feature), (shape.d_out, rank)


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
    pending = [
        (write_aside(folder, TENSOR_FILE, data), folder / TENSOR_FILE),
        (write_aside(folder, CONFIG_FILE, text.encode()), folder / CONFIG_FILE),
    ]
    for temporary, final in pending:
        os.replace(temporary, final)


def write_aside(folder: Path, name: str, data: bytes) -> str:
    """Write and sync a file under another name in its folder; the path to move into place."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


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
    description = _read_description(folder)
    config, layers = _read_config(folder, description)
    tensors = _read_tensors(folder, config, layers, description.get("sha256"))
    # The tensors were checked as they were read; with many, checking again would show.
    return Adapter.partial(config, layers, tensors).renamed(rename)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{str(folder)!r} is not an adapter: it has no {CONFIG_FILE}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{str(path)!r} does not describe a flix adapter (no 'format': 'flix')")
    if description.get("version") != VERSION:
        raise AdapterError(
            f"{str(path)!r} has format version {description.get('version')!r}; this flix reads "
            f"version {VERSION}"
        )
    return description


def _read_config(
    folder: Path, description: Mapping[str, Any]
) -> tuple[FlixConfig, dict[str, LayerShape]]:
    path = folder / CONFIG_FILE
    try:
        config = FlixConfig.from_dict(description["config"])
        layers = {
            name: LayerShape(d_in=entry["d_in"], d_out=entry["d_out"], kind=entry["kind"])
            for name, entry in description["layers"].items()
        }
    except (FlixError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{str(path)!r} is damaged or was altered: {error}") from error
    for name, shape in layers.items():
        sizes = (shape.d_in, shape.d_out)
        if shape.kind not in ("linear", "embedding") or any(
            isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes
        ):
            raise AdapterError(f"{str(path)!r} describes the layer {name!r} wrongly: {shape}")
    return config, layers


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
            _check_tensors(config, layers, shapes, dtypes, repr(str(path)))
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


def _check_tensors(
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    where: str,
) -> None:
    expected = dict(expected_tensors(config, layers))
    for name, shape in expected.items():
        if name not in shapes:
            raise AdapterError(f"{where} lacks the tensor {name!r}{near(name, shapes, limit=1)}")
        if shapes[name] != shape:
            raise AdapterError(
                f"{where}: tensor {name!r} must have the shape {list(shape)}, got "
                f"{list(shapes[name])}"
            )
        if dtypes[name] not in _ALLOWED:
            raise AdapterError(
                f"{where}: tensor {name!r} must be float16, float32 or float64, got {dtypes[name]}"
            )
    if surplus := [name for name in shapes if name not in expected]:
        raise AdapterError(f"{where} has tensors that do not belong to it: {listed(surplus, 5)}")

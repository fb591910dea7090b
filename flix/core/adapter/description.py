"""What an adapter's file says of the adapter, beside the tensors (docs/specification.md §4.2)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.described import Base
from flix.core.checks import is_whole
from flix.core.config.config import FlixConfig
from flix.core.errors import AdapterError, FlixError, shown
from flix.core.strictjson import parsed

FORMAT = "flix"
VERSION = 2
_LARGEST = 1 << 53
_PARTS = ("config", "layers", "heads", "base")


@dataclass(frozen=True)
class Description:
    """What a file says of its adapter.

    Attributes:
        config: the configuration.
        layers: the adapted layers by path.
        heads: the parameters that were trained with the features, by name.
        base: what it was trained on, if the file says so.
        digest: what the file's digest should be, if it says so.
    """

    config: FlixConfig
    layers: dict[str, LayerShape]
    heads: tuple[str, ...] = ()
    base: Base | None = None
    digest: str | None = None


def described(
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    heads: Iterable[str],
    base: Base | None,
) -> dict[str, Any]:
    """A description, JSON-able; :func:`read` reads it."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "layers": {path: as_dict(shape) for path, shape in layers.items()},
        "heads": list(heads),
        "base": None if base is None else vars(base),
    }


def as_dict(shape: LayerShape) -> dict[str, Any]:
    """A layer as descriptions have it; ``experts`` is there where it has an axis of them."""
    said = {"kind": shape.kind, "d_in": shape.d_in, "d_out": shape.d_out}
    return {**said, "experts": shape.experts} if shape.experts else said


def as_metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """A description as a safetensors file's metadata, which holds texts alone."""
    return {
        name: json.dumps(value, ensure_ascii=False) if name in _PARTS else str(value)
        for name, value in description.items()
    }


def from_metadata(metadata: Mapping[str, str], where: str) -> Description | None:
    """The description in a file's metadata; None for one of version 1, which holds none.

    Raises:
        AdapterError: another version, or what is damaged.
    """
    version = metadata.get("version")
    if metadata.get("format") != FORMAT or version is None:
        return None
    if version != str(VERSION):
        raise _other_version(version[:40], where)
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for name in _PARTS:
        if name in metadata:
            data[name] = parsed(metadata[name], f"{where}: {name}")
    data["sha256"] = metadata.get("digest", "none")
    return read(data, where)


def read(data: Any, where: str) -> Description:
    """A description of version 1 or 2.

    Args:
        data: what JSON said.
        where: where, for messages.

    Raises:
        AdapterError: another version, or what is damaged.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise AdapterError(f"{where} does not describe a flix adapter (no 'format': 'flix')")
    version = data.get("version")
    if not is_whole(version) or version not in (1, VERSION):
        raise _other_version(shown(version, 40), where)
    try:
        config = FlixConfig.from_dict(data["config"])
        layers = {
            name: LayerShape(entry["d_in"], entry["d_out"], entry["kind"], entry.get("experts", 0))
            for name, entry in data["layers"].items()
        }
        config.check_size(layers)
        heads = data.get("heads", [])
        if not isinstance(heads, list) or not all(isinstance(name, str) for name in heads):
            raise TypeError("its heads are not a list of names")
        if len({*heads}) != len(heads):
            raise TypeError("it names a head twice")
        base = _base(data.get("base"))
        digest = data.get("sha256")
        if not isinstance(digest, str | None):
            raise TypeError(f"its digest is {type(digest).__name__}")
    except (FlixError, KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise AdapterError(f"{where} is damaged or was altered: {str(error)[:2000]}") from error
    except RecursionError:
        raise AdapterError(f"{where} is damaged or was altered: it nests too deeply") from None
    for name, shape in layers.items():
        sizes = (shape.d_in, shape.d_out, shape.experts)
        if (
            shape.kind not in ("linear", "embedding")
            or any(not is_whole(size) or not 0 <= size <= _LARGEST for size in sizes)
            or (shape.experts and shape.kind != "linear")
        ):
            said = zip(("kind", "d_in", "d_out", "experts"), (shape.kind, *sizes), strict=True)
            raise AdapterError(
                f"{where} describes the layer {name[:200]!r} wrongly: "
                + ", ".join(f"{part} {shown(value, 40)}" for part, value in said)
            )
    return Description(config, layers, tuple(heads), base, digest)


def _other_version(version: str, where: str) -> AdapterError:
    return AdapterError(
        f"{where} has format version {version}; this flix reads versions 1 and {VERSION}"
    )


def _base(data: Any) -> Base | None:
    if data is None:
        return None
    known = {name: data.get(name) for name in ("name", "revision", "fingerprint")}
    if not all(isinstance(value, str | None) for value in known.values()):
        raise TypeError("its base is described by something other than texts")
    return Base(**known)

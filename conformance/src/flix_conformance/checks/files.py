"""Adapter files: read back by the kit's own reader, damage refused, and one version at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import flix
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.compare import same_pairs
from flix_conformance.harness import Array, Case, Pairs
from flix_conformance.strategies import Draw

CONFIG_FILE, TENSOR_FILE = "flix_config.json", "flix.safetensors"
_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_DROPOUT = flix.FeatureDropout(0.25, keep_one=True, rescale=True)
_TEXTS = ("format", "version", "digest")


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def unpack(data: bytes) -> dict[str, Array]:
    """The tensors of a safetensors file."""
    header, values = _header(data)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(values[first:last], _TYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def description(data: bytes) -> dict[str, Any]:
    """What an adapter's file says of itself: its metadata, in which all but three texts are JSON."""
    said = _header(data)[0]["__metadata__"]
    return {k: v if k in _TEXTS else json.loads(v) for k, v in said.items()}


def digest(data: bytes) -> str:
    """What the file's digest must be: SHA-256 of the file, with zeros where its digits are."""
    digits = _header(data)[0]["__metadata__"]["digest"].encode()
    assert data.count(digits) == 1, "the digest's digits stand in the file more than once"
    return hashlib.sha256(data.replace(digits, b"0" * 64)).hexdigest()


def pack(tensors: dict[str, Array], said: dict[str, Any] | None = None) -> bytes:
    """A safetensors file of float32 tensors; with a description, an adapter's."""
    header: dict[str, Any] = {}
    values = b""
    if said is not None:
        said = {**said, "digest": "0" * 64}
        header["__metadata__"] = {
            k: str(v) if k in _TEXTS else json.dumps(v) for k, v in said.items()
        }
    for name, tensor in tensors.items():
        end = len(values) + 4 * tensor.size
        entry = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [len(values), end]}
        header[name], values = entry, values + tensor.astype("<f4").tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    data = len(text).to_bytes(8, "little") + text + values
    return data if said is None else data.replace(b"0" * 64, digest(data).encode(), 1)


def stored_pairs(case: Case, folder: Path) -> Pairs:
    """The pairs that a folder holds under the names of the format; refuses missing and surplus tensors."""
    tensors = unpack((folder / TENSOR_FILE).read_bytes())
    pairs: Pairs = {}
    for group, name in case.pairs:
        names = [f"{case.path}.{part}.{group}.{name}" for part in "AB"]
        for tensor in names:
            assert tensor in tensors, f"{TENSOR_FILE} lacks {tensor!r}, it has {sorted(tensors)}"
        pairs[group, name] = (tensors.pop(names[0]), tensors.pop(names[1]))
    assert not tensors, f"{TENSOR_FILE} has tensors that belong to nothing: {sorted(tensors)}"
    return pairs


def check_description(case: Case, folder: Path) -> None:
    """Hold what the file says of itself, and the copy of it for people, to what was saved."""
    data = (folder / TENSOR_FILE).read_bytes()
    found = description(data)
    assert (found["format"], found["version"]) == ("flix", "2"), "another format or version"
    assert found["digest"] == digest(data), "the digest is not that of the file"
    layer = {"kind": case.kind, "d_in": case.d_in, "d_out": case.d_out}
    assert found["layers"] == {case.path: layer}, f"layers are {found['layers']}"
    features = [tuple(pair) for pair in found["config"]["registry"]["features"]]
    assert features == list(case.table.features), f"features are {features}"
    for name, value in case.config.to_dict().items():
        if name != "target_modules":  # the layers that were found may stand there
            assert found["config"][name] == json.loads(json.dumps(value)), f"{name} was not kept"
    for name in ("scaling", "seed"):
        assert found["config"][name] == getattr(case.table, name), f"{name} was not kept"
    copy = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for name in ("config", "layers"):
        assert copy[name] == found[name], f"{name} of {CONFIG_FILE} are not those of the file"


def saved_case(draw: Draw, kinds: tuple[str, ...]) -> Case:
    """A case in float32 or float64."""
    case = draw.case(kind=any_kind(draw, kinds), pool=16)
    return case.but(dtype="float32") if case.dtype == "bfloat16" else case


@check(
    "a saved adapter holds the format's tensors, bit by bit, and loads with them", uses=("files",)
)
def files_round_trip(draw: Draw, backend: Backend) -> None:
    case = saved_case(draw, backend.kinds)
    told = {"unknown": draw.one_of(["skip", "mean"]), "feature_dropout": _DROPOUT}
    case = case.but(config=replace(case.config, **told))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        backend.save(case, folder)
        found = {path.name for path in folder.iterdir()}
        assert found == {CONFIG_FILE, TENSOR_FILE}, f"the folder holds {sorted(found)}"
        check_description(case, folder)
        same_pairs(stored_pairs(case, folder), case.pairs, "the file")
        same_pairs(backend.load(_forgotten(case), folder), case.pairs, "the loaded adapter")
        (folder / CONFIG_FILE).write_text("stale", encoding="utf-8")
        loaded = _loads(backend, case, folder, "beside a stale copy of its description")
        same_pairs(loaded, case.pairs, "loaded beside a stale copy")


def _loads(backend: Backend, case: Case, folder: Path, when: str) -> Pairs:
    try:
        return backend.load(_forgotten(case), folder)
    except ValueError as error:
        raise AssertionError(f"{when} nothing loads: {error}") from error


def _forgotten(case: Case) -> Case:
    """The case with other values: what is loaded must come from the file."""
    return case.but(pairs={f: (0 * a, 0 * b) for f, (a, b) in case.pairs.items()})


def _damages(case: Case, folder: Path) -> list[tuple[str, bytes, str]]:
    """(what, the file, what the message must name) for each kind of damage."""
    data = (folder / TENSOR_FILE).read_bytes()
    said, tensors = description(data), unpack(data)
    group, name = next(iter(case.pairs))
    tensor = f"{case.path}.A.{group}.{name}"
    fewer = {k: v for k, v in tensors.items() if k != tensor}
    renamed = {("odd" if k == tensor else k): v for k, v in tensors.items()}
    wrong = {**tensors, tensor: np.zeros((1, *tensors[tensor].shape))}
    broken = {**tensors, tensor: np.full(tensors[tensor].shape, np.nan)}
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    sizes = {case.path: {"kind": case.kind, "d_in": case.d_in + 1, "d_out": case.d_out}}
    head = {**tensors, f"trained.{case.path}.kernel": np.ones(2)}
    return [
        ("a truncated file", data[: len(data) - 3], TENSOR_FILE),
        ("a missing tensor", pack(fewer, said), tensor),
        ("a tensor of another name", pack(renamed, said), tensor),
        ("a surplus tensor", pack({**tensors, "odd": np.ones(2)}, said), "odd"),
        ("a tensor of another shape", pack(wrong, said), tensor),
        ("a value that is not finite", pack(broken, said), tensor),
        ("a flipped bit", flipped, TENSOR_FILE),
        ("a changed description", data.replace(b'\\"seed\\": ', b'\\"seed\\":1', 1), TENSOR_FILE),
        ("another version", pack(tensors, {**said, "version": "3"}), "version 3"),
        ("another format", pack(tensors, {**said, "format": "other"}), "flix"),
        ("a layer of other sizes", pack(tensors, {**said, "layers": sizes}), case.path),
        (
            "a head that nobody has",
            pack(head, {**said, "heads": [f"{case.path}.kernel"]}),
            case.path,
        ),
    ]


@check(
    "a damaged or unfitting adapter is refused with an error that names the file or the tensor",
    examples=4,
    uses=("files",),
)
def files_refused(draw: Draw, backend: Backend) -> None:
    case = draw.trainable("linear", 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        backend.save(case, folder)
        for what, data, named in _damages(case, folder):
            (folder / TENSOR_FILE).write_bytes(data)
            try:
                backend.load(_forgotten(case), folder)
            except ValueError as error:
                assert named in str(error), f"{what}: the message does not name {named!r}: {error}"
            else:
                raise AssertionError(f"{what} was loaded without an error")


class _StoppedError(BaseException):
    """The process ends here."""


_OPERATIONS = ("replace", "rename", "unlink", "fsync", "mkdir", "chmod", "link")


@contextmanager
def _stopping(at: int) -> Iterator[list[str]]:
    """Let nothing happen to files from some operation on, as if the process had been killed."""
    begun: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) >= at:
                raise _StoppedError(name)
            return call(*args, **kwargs)

        return operation

    wrapped: dict[str, Any] = {name: counted(name, getattr(os, name)) for name in _OPERATIONS}
    with mock.patch.multiple(os, **wrapped):
        yield begun


@check(
    "a save that is stopped at any file operation leaves the old adapter or the new one, whole, and at most one other file",
    examples=2,
    uses=("files",),
)
def files_one_version(draw: Draw, backend: Backend) -> None:
    case = draw.trainable("linear", 4)
    old = case.but(pairs={f: (a + 1, b - 1) for f, (a, b) in case.pairs.items()})
    with tempfile.TemporaryDirectory() as name:
        folder, stopped, at, seen = Path(name) / "adapter", True, 0, set()
        while stopped:
            at += 1
            backend.save(old, folder)
            with _stopping(at):
                try:
                    backend.save(case, folder)
                    stopped = False
                except _StoppedError:
                    pass
            found = _loads(backend, case, folder, f"after a stop at operation {at}")
            values = next(iter(case.pairs))
            is_new = np.array_equal(found[values][0], case.pairs[values][0])
            wanted = case.pairs if is_new else old.pairs
            same_pairs(found, wanted, f"what loads after a stop at operation {at}")
            more = {path.name for path in folder.iterdir()} - {CONFIG_FILE, TENSOR_FILE}
            assert len(more) <= 1, f"a stop at operation {at} leaves {sorted(more)}"
            seen.add(is_new)
            assert at < 200, "the save never ends"
        assert seen == {True, False} and is_new, "a save that ran through is not what loads"

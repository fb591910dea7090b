"""Adapter files: read back by the kit's own reader, and damage refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.compare import same_pairs
from flix_conformance.harness import Array, Case, Pairs
from flix_conformance.signatures import Signature, trainable_signature
from flix_conformance.strategies import Draw

CONFIG_FILE, TENSOR_FILE = "flix_config.json", "flix.safetensors"
_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def unpack(data: bytes) -> dict[str, Array]:
    """The tensors of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(values[first:last], _TYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def pack(tensors: dict[str, Array]) -> bytes:
    """A safetensors file of float32 tensors."""
    header, values = {}, b""
    for name, tensor in tensors.items():
        end = len(values) + 4 * tensor.size
        entry = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [len(values), end]}
        header[name], values = entry, values + tensor.astype("<f4").tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


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
    """Hold the JSON file to what was saved."""
    found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    assert (found["format"], found["version"]) == ("flix", 1), "another format or version"
    layer = {"kind": case.kind, "d_in": case.d_in, "d_out": case.d_out}
    assert found["layers"] == {case.path: layer}, f"layers are {found['layers']}"
    features = [tuple(pair) for pair in found["config"]["registry"]["features"]]
    assert features == list(case.registry.features), f"features are {features}"
    for name in ("scaling", "seed"):
        assert found["config"][name] == getattr(case.config, name), f"{name} was not kept"


def saved_case(draw: Draw, kinds: tuple[str, ...]) -> Case:
    """A case in float32 or float64."""
    case = draw.case(kind=any_kind(draw, kinds), pool=16)
    return case.but(dtype="float32") if case.dtype == "bfloat16" else case


@check("a saved adapter holds the format's tensors, bit by bit, and loads with them")
def files_round_trip(draw: Draw, backend: Backend) -> None:
    case = saved_case(draw, backend.kinds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        backend.save(case, folder)
        found = {path.name for path in folder.iterdir()}
        assert found == {CONFIG_FILE, TENSOR_FILE}, f"the folder holds {sorted(found)}"
        check_description(case, folder)
        same_pairs(stored_pairs(case, folder), case.pairs, "the file")
        same_pairs(backend.load(_forgotten(case), folder), case.pairs, "the loaded adapter")


def _forgotten(case: Case) -> Case:
    """The case with other values: what is loaded must come from the file."""
    return case.but(pairs={f: (0 * a, 0 * b) for f, (a, b) in case.pairs.items()})


def _damages(case: Case, folder: Path) -> list[tuple[str, bytes, dict[str, object], str]]:
    """(what, the tensor file, the JSON file, what the message must name) for each kind of damage."""
    data = (folder / TENSOR_FILE).read_bytes()
    text = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    plain = {k: v for k, v in text.items() if k != "sha256"}
    group, name = next(iter(case.pairs))
    tensor = f"{case.path}.A.{group}.{name}"
    tensors = unpack(data)
    fewer = {k: v for k, v in tensors.items() if k != tensor}
    renamed = {("odd" if k == tensor else k): v for k, v in tensors.items()}
    wrong = {**tensors, tensor: np.zeros((1, *tensors[tensor].shape))}
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    sizes = {case.path: {"kind": case.kind, "d_in": case.d_in + 1, "d_out": case.d_out}}
    return [
        ("a truncated file", data[: len(data) - 3], text, TENSOR_FILE),
        ("a missing tensor", pack(fewer), plain, tensor),
        ("a tensor of another name", pack(renamed), plain, tensor),
        ("a surplus tensor", pack({**tensors, "odd": np.ones(2)}), plain, "odd"),
        ("a tensor of another shape", pack(wrong), plain, tensor),
        ("a flipped bit", flipped, text, TENSOR_FILE),
        ("another version", data, {**text, "version": 2}, "version 2"),
        ("another format", data, {**text, "format": "other"}, "flix"),
        ("a layer of other sizes", data, {**text, "layers": sizes}, case.path),
    ]


@check(
    "a damaged or unfitting adapter is refused with an error that names the file or the tensor",
    examples=4,
)
def files_refused(draw: Draw, backend: Backend) -> None:
    case = draw.fill(_with_update(draw), "float32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        backend.save(case, folder)
        for what, tensors, text, named in _damages(case, folder):
            (folder / TENSOR_FILE).write_bytes(tensors)
            (folder / CONFIG_FILE).write_text(json.dumps(text), encoding="utf-8")
            try:
                backend.load(_forgotten(case), folder)
            except ValueError as error:
                assert named in str(error), f"{what}: the message does not name {named!r}: {error}"
            else:
                raise AssertionError(f"{what} was loaded without an error")


def _with_update(draw: Draw) -> Signature:
    return trainable_signature(draw.of_turn(range(4)))

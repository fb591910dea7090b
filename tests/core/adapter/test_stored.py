"""Tensors out of safetensors files, held to the safetensors library; what is no such file is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import save

from flix.core.adapter import stored as module
from flix.core.adapter.described import Head
from flix.core.adapter.stored import StoredTensors
from flix.core.adapter.stream import write_tensors
from tests.core.adapter.test_stream import drawn


@pytest.fixture(params=[16, 1 << 20], ids=["small buffers", "one buffer"])
def buffers(request, monkeypatch):
    monkeypatch.setattr(module, "_BUFFER", request.param)
    monkeypatch.setattr(module, "_PIECE", request.param)


@pytest.mark.usefixtures("buffers")
def test_what_the_library_writes_is_read(tmp_path):
    given = {name: np.ascontiguousarray(tensor) for name, tensor in drawn()}
    (tmp_path / "x").write_bytes(save(given, metadata={"format": "flix"}))
    with open(tmp_path / "x", "rb", buffering=0) as file:
        stored = StoredTensors(file)
        assert stored.keys() == given.keys()
        names = [*given, *reversed(given)]  # forwards and backwards
        found = [(name, stored[name]) for name in names]
    for name, tensor in found:  # the file's next window must not change what was handed out
        assert tensor.dtype == given[name].dtype
        np.testing.assert_array_equal(tensor, given[name])


@pytest.mark.usefixtures("buffers")
def test_a_digest_is_that_of_the_writer_or_the_files_own(tmp_path):
    heads = {"trained.x": Head("BF16", np.arange(5, dtype="u2"))}
    with open(tmp_path / "x", "wb", buffering=0) as file:
        digest = write_tensors(file, drawn(), {"format": "flix"}, heads)
    with open(tmp_path / "x", "rb", buffering=0) as file:
        stored = StoredTensors(file)
        assert stored.metadata == {"digest": digest, "format": "flix"}
        assert stored.digest() == (digest, None)
        np.testing.assert_array_equal(stored["trained.x"], heads["trained.x"].values)
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in drawn()})
    (tmp_path / "y").write_bytes(data)
    with open(tmp_path / "y", "rb", buffering=0) as file:
        assert StoredTensors(file).digest() == (hashlib.sha256(data).hexdigest(), None)


@pytest.mark.usefixtures("buffers")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["a.A", "wide", "strided", "number"])
def test_values_that_are_not_finite_are_found(tmp_path, which, value):
    tensors = [(name, np.array(tensor)) for name, tensor in drawn()]
    dict(tensors)[which].reshape(-1)[-1:] = value
    with open(tmp_path / "x", "w+b", buffering=0) as file:
        write_tensors(file, tensors, {})
        assert StoredTensors(file).digest()[1] == which


@pytest.mark.parametrize(("bits", "broken"), [(0x7F80, True), (0xFF81, True), (0x7F7F, False)])
def test_bits_of_bfloat16_that_are_not_finite_are_found(tmp_path, bits, broken):
    heads = {"x": Head("BF16", np.array([0, bits], "u2"))}
    with open(tmp_path / "x", "w+b", buffering=0) as file:
        write_tensors(file, [], {}, heads)
        assert StoredTensors(file).digest()[1] == ("x" if broken else None)


def header(**entry) -> bytes:
    text = json.dumps(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}
    ).encode()
    return len(text).to_bytes(8, "little") + text


def _text(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _several(**places) -> bytes:
    entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": p} for n, p in places.items()}
    return _text(json.dumps(entries).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 7,
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{]",
        (1 << 17).to_bytes(8, "little") + b"[" * (1 << 17),
        (8).to_bytes(8, "little") + b'{"a": 1}',
        header() + b"1234567",
        header() + b"123456789",
        header(data_offsets=[0, 4]) + b"1234",
        header(data_offsets=[-8, 0]),
        header(data_offsets=[0.0, 8.0]) + b"12345678",
        header(data_offsets=[0, "8"]) + b"12345678",
        header(data_offsets=[0, 8, 8]) + b"12345678",
        header(shape=[2.0]) + b"12345678",
        header(shape=[-2]) + b"12345678",
        header(shape=[True, 2]) + b"12345678",
        header(shape=2) + b"12345678",
        header(dtype=["F32"]) + b"12345678",
        header(dtype=7) + b"12345678",
        header(shape=[1] * 99) + b"12345678",
        header(shape=[1 << 60, 1 << 60, 0], data_offsets=[0, 0]),
        header(shape=[10**400, 0], data_offsets=[0, 0]),
        header(data_offsets=[10**400, 10**400 + 8]) + b"12345678",
        header(data_offsets=[8, 16]) + b"1234567812345678",
        _several(a=[0, 8], b=[0, 8]) + b"12345678",
        _several(a=[0, 8], b=[4, 12]) + b"123456781234",
        _several(a=[0, 8], b=[12, 20]) + b"12345678123456781234",
        _text(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}') + b"1" * 16,
        _text(b'{"__metadata__":{"a":1}}'),
        _text(b'{"__metadata__":["a"]}'),
        _text(b'{"__metadata__":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        _text(b"{}\xff"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with open(tmp_path / "x", "rb", buffering=0) as file, pytest.raises(ValueError):
        StoredTensors(file)


def test_a_file_that_shrinks_afterwards_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(header() + b"12345678")
    with open(tmp_path / "x", "r+b", buffering=0) as file:
        stored = StoredTensors(file)
        file.truncate(len(header()) + 4)
        with pytest.raises(ValueError, match="ends within"):
            stored["a"]


@pytest.mark.timed
def test_a_large_header_that_is_refused_takes_no_longer_than_one_that_is_read(tmp_path):
    entries = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(50_000)}  # fmt: skip
    for first in ([0, 4], [4, 8]):
        entries["t0"]["data_offsets"] = first
        (tmp_path / "x").write_bytes(_text(json.dumps(entries).encode()) + bytes(200_000))
        began = time.process_time()
        with open(tmp_path / "x", "rb", buffering=0) as file:
            if first[0]:
                with pytest.raises(ValueError, match="overlap"):
                    StoredTensors(file)
            else:
                assert len(StoredTensors(file)) == 50_000
        assert time.process_time() - began < 5


def test_what_is_no_file_is_refused():
    with pytest.raises((ValueError, io.UnsupportedOperation)):
        StoredTensors(io.BytesIO(b""))


def test_what_is_no_regular_file_is_refused(tmp_path):
    with (
        open(os.devnull, "rb", buffering=0) as file,
        pytest.raises(ValueError, match="it is not a regular file"),
    ):
        StoredTensors(file)


def test_a_large_tensor_of_a_file_that_shrinks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BUFFER", 16)
    data = save({"a": np.arange(1000, dtype="f4")})
    (tmp_path / "x").write_bytes(data)
    with open(tmp_path / "x", "r+b", buffering=0) as file:
        stored = StoredTensors(file)
        file.truncate(len(data) - 400)
        for read in (lambda: stored["a"], stored.digest):
            with pytest.raises(ValueError, match="the file ends within a tensor"):
                read()

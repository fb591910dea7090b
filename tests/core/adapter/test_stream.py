"""Tensors into safetensors files and out of them, held to the safetensors library both ways."""

from __future__ import annotations

import hashlib
import json
import threading

import numpy as np
import pytest
from safetensors.numpy import load, save

from flix.core.adapter import stream
from flix.core.adapter.stream import StoredTensors, write_tensors


def drawn() -> list[tuple[str, np.ndarray]]:
    """Views, transposed and strided ones, several dtypes, names that JSON must escape, nothing at all."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 6)).astype(np.float32)
    return [
        ("a.A", base[:5]),
        ('b "quoted" \\ ñ', base.T),
        ("wide", rng.normal(size=(3, 3))),
        ("half", rng.normal(size=(2, 9)).astype(np.float16)),
        ("strided", base[::3, ::2]),
        ("empty", np.zeros((0, 4), np.float32)),
        ("number", np.float32(3.5).reshape(())),
    ]


@pytest.fixture(params=[16, 1 << 20], ids=["small buffers", "one buffer"])
def buffers(request, monkeypatch):
    monkeypatch.setattr(stream, "_BUFFER", request.param)


def written(path, tensors=None) -> str:
    with open(path, "wb", buffering=0) as file:
        return write_tensors(file, drawn() if tensors is None else tensors, {"format": "flix"})


@pytest.mark.usefixtures("buffers")
def test_the_library_reads_what_is_written(tmp_path):
    digest = written(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    found = load(data)
    assert found.keys() == {name for name, _ in drawn()}
    for name, tensor in drawn():
        assert found[name].dtype == (np.float64 if name == "wide" else np.float32)
        np.testing.assert_array_equal(found[name], tensor)


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


def test_a_write_that_fails_is_raised_and_leaves_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BUFFER", 16)
    before = threading.active_count()

    class Full:
        def write(self, data):
            raise OSError("no space left on the device")

    with pytest.raises(OSError, match="no space"):
        write_tensors(Full(), drawn(), {})
    assert threading.active_count() == before


def test_a_file_that_takes_a_part_at_a_time_gets_all(tmp_path):
    class Slow:
        def __init__(self):
            self.data = b""

        def write(self, data):
            self.data += bytes(data[:7])
            return min(7, len(data))

    slow = Slow()
    digest = write_tensors(slow, drawn(), {})
    assert hashlib.sha256(slow.data).hexdigest() == digest and len(load(slow.data)) == len(drawn())


def header(**entry) -> bytes:
    text = json.dumps(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}
    ).encode()
    return len(text).to_bytes(8, "little") + text


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

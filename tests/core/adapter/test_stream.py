"""Tensors into safetensors files, held to the safetensors library."""

from __future__ import annotations

import hashlib
import io
import threading

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load

from flix.core.adapter import stream
from flix.core.adapter.described import Head
from flix.core.adapter.stream import BLANK, write_tensors


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
    assert data.count(digest.encode()) == 1
    assert digest == hashlib.sha256(data.replace(digest.encode(), BLANK.encode())).hexdigest()
    with safe_open(tmp_path / "x", framework="numpy") as file:
        assert file.metadata() == {"digest": digest, "format": "flix"}
    found = load(data)
    assert found.keys() == {name for name, _ in drawn()}
    for name, tensor in drawn():
        assert found[name].dtype == (np.float64 if name == "wide" else np.float32)
        np.testing.assert_array_equal(found[name], tensor)


def test_a_write_that_fails_is_raised_and_leaves_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BUFFER", 16)
    before = threading.active_count()

    class Full(io.RawIOBase):
        def write(self, data):
            raise OSError("no space left on the device")

    with pytest.raises(OSError, match="no space"):
        write_tensors(Full(), drawn(), {})
    assert threading.active_count() == before


def test_a_file_that_takes_a_part_at_a_time_gets_all(tmp_path):
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data[:7]))

    slow, whole = Slow(), io.BytesIO()
    assert write_tensors(slow, drawn(), {}) == write_tensors(whole, drawn(), {})
    assert slow.getvalue() == whole.getvalue() and len(load(slow.getvalue())) == len(drawn())


@pytest.mark.usefixtures("buffers")
def test_heads_keep_their_dtypes(tmp_path):
    rng = np.random.default_rng(1)
    heads = {
        "trained.whole": Head("F64", rng.normal(size=(2, 3))),
        "trained.single": Head("F32", np.asfortranarray(rng.normal(size=(2, 3)).astype("f4"))),
        "trained.half": Head("F16", rng.normal(size=3).astype("f2")),
        "trained.brain": Head("BF16", np.float32(-1.5).reshape(1).view("u4").astype("u8").__rshift__(16).astype("u2")),
        "trained.number": Head("F16", np.float16(2.0).reshape(())),
    }  # fmt: skip
    with open(tmp_path / "x", "wb", buffering=0) as file:
        write_tensors(file, drawn(), {"a": "b"}, heads)
    with safe_open(tmp_path / "x", framework="numpy") as file:
        for name, head in heads.items():
            assert file.get_slice(name).get_dtype() == head.dtype
            assert file.get_slice(name).get_shape() == list(head.shape)
            if head.dtype != "BF16":  # numpy has none
                np.testing.assert_array_equal(file.get_tensor(name), head.values)
        assert len(file.keys()) == len(heads) + len(drawn())

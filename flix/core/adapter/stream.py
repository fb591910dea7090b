"""Tensors into a safetensors file and out of it, piece by piece (docs/specification.md §4.2).

The safetensors library writes contiguous tensors that are all in memory at once. A model's pairs are views, half of
them transposed: making them contiguous costs their size in memory once more, and more time than writing them. So they
go through two buffers in turn: while one is filled, the other is hashed and written. And where hundreds of thousands of
tensors are read, asking the library for each, its shape and its dtype takes longer than reading the whole file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from json.encoder import encode_basestring_ascii
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_BUFFER = 1 << 25
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}
_NAMES = {_DTYPES[name]: name for name in ("F64", "F32")}


def write_tensors(
    file: BinaryIO, tensors: Sequence[tuple[str, NDArray[Any]]], metadata: Mapping[str, str]
) -> str:
    """Write a whole safetensors file.

    Args:
        file: an unbuffered file, at its start.
        tensors: with their names, in any layout; stored as float32, float64 where they are float64. Wider ones come
            first, as their alignment wants it, otherwise in the order given.
        metadata: of the file.

    Returns:
        The file's SHA-256, in hexadecimal digits.
    """
    wide, narrow = _NAMES
    parts = [
        (wide, [item for item in tensors if item[1].dtype == np.float64]),
        (narrow, [item for item in tensors if item[1].dtype != np.float64]),
    ]
    header, largest = _header(parts, metadata)
    with ThreadPoolExecutor(2) as pool:
        sink = _Sink(file, max(_BUFFER, len(header), largest), pool)
        memory, _ = sink.room(len(header))
        memory[: len(header)] = header
        for dtype, items in parts:
            for _, tensor in items:
                memory, start = sink.room(tensor.size * dtype.itemsize)
                np.ndarray(tensor.shape, dtype, memory, start)[...] = tensor
        return sink.close()


def _header(
    parts: Sequence[tuple[np.dtype[Any], Sequence[tuple[str, NDArray[Any]]]]],
    metadata: Mapping[str, str],
) -> tuple[bytes, int]:
    """The file's first bytes, and the size of its largest tensor."""
    entries = [f'{{"__metadata__":{json.dumps(dict(metadata))}']
    start = largest = 0
    for dtype, items in parts:
        # By hand: with hundreds of thousands of tensors, encoding a dictionary for each would show.
        known: dict[tuple[int, ...], tuple[str, int]] = {}
        for name, tensor in items:
            shape = tensor.shape
            if shape not in known:
                text = f':{{"dtype":"{_NAMES[dtype]}","shape":{list(shape)},"data_offsets":['
                known[shape] = text, tensor.size * dtype.itemsize
            middle, size = known[shape]
            entries.append(f"{encode_basestring_ascii(name)}{middle}{start},{start + size}]}}")
            largest, start = max(largest, size), start + size
    header = (",".join(entries) + "}").encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, largest


class StoredTensors(Mapping[str, NDArray[Any]]):
    """A file's tensors, each read when it is asked for, and its own; fast in the file's order.

    Args:
        file: an unbuffered file at its start; it stays open while tensors are asked for.

    Attributes:
        shapes: of the tensors, by name.
        dtypes: of the tensors, as safetensors names them: ``"F32"``.

    Raises:
        ValueError: what is no safetensors file, or is not whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        whole = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        self._first = 8 + size
        if self._first > whole:
            raise ValueError("its header is longer than the file")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        try:
            last = self._read(json.loads(file.read(size)))
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"its header is none of safetensors ({error!r})") from error
        if self._first + last != whole:
            raise ValueError(f"it has {whole} bytes, and should have {self._first + last}")
        self._window, self._start, self._end = bytearray(), 0, 0

    def _read(self, entries: dict[str, Any]) -> int:
        """Take the tensors' names, shapes, dtypes and places from a header; where the last one ends."""
        entries.pop("__metadata__", None)
        known: dict[Any, tuple[tuple[int, ...], int | None]] = {}
        last = 0
        for name, entry in entries.items():
            dtype, given = entry["dtype"], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            if (dtype, given) not in known:
                known[dtype, given] = given, _size(dtype, given)
            shape, size = known[dtype, given]
            if not (type(start) is type(end) is int and 0 <= start <= end):
                raise TypeError(f"{name!r} lies from {start!r} to {end!r}")
            if size is not None and end - start != size:
                raise TypeError(f"{name!r} has {end - start} bytes, not the {size} of its shape")
            self.shapes[name], self.dtypes[name] = shape, dtype
            self._places[name] = start, end
            last = max(last, end)
        return last

    def __getitem__(self, name: str) -> NDArray[Any]:
        start, end = self._places[name]
        if start < self._start or end > self._end:
            self._fill(start, end)
        dtype = _DTYPES[self.dtypes[name]]
        return np.ndarray(self.shapes[name], dtype, self._window, start - self._start).copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _fill(self, start: int, end: int) -> None:
        if len(self._window) < max(_BUFFER, end - start):
            self._window = bytearray(max(_BUFFER, end - start))
        self._file.seek(self._first + start)
        self._start = self._end = start
        window = memoryview(self._window)
        while self._end < end:
            count = self._file.readinto(window[self._end - start :])  # type: ignore[attr-defined]
            if not count:
                raise ValueError("the file ends within a tensor")
            self._end += count


def _size(dtype: str, shape: tuple[Any, ...]) -> int | None:
    """A tensor's bytes; None for a dtype that adapters do not have."""
    if not all(type(length) is int and length >= 0 for length in shape):
        raise TypeError(f"shape {list(shape)}")
    return math.prod(shape) * _DTYPES[dtype].itemsize if dtype in _DTYPES else None


class _Sink:
    """Two buffers in turn: one is filled, the other is hashed and written."""

    def __init__(self, file: BinaryIO, size: int, pool: ThreadPoolExecutor) -> None:
        self._file, self._pool, self._digest = file, pool, hashlib.sha256()
        self._size = size
        self._filled, self._idle = memoryview(bytearray(size)), memoryview(bytearray(size))
        self._used = 0
        self._working: tuple[Future[Any], ...] = ()

    def room(self, size: int) -> tuple[memoryview, int]:
        """A buffer, and where in it the next ``size`` bytes go."""
        if self._used + size > self._size:
            self._turn()
        start = self._used
        self._used += size
        return self._filled, start

    def close(self) -> str:
        """Write what is left; the digest."""
        self._turn()
        self._wait()
        return self._digest.hexdigest()

    def _turn(self) -> None:
        self._wait()
        data = self._filled[: self._used]
        self._working = (
            self._pool.submit(self._digest.update, data),
            self._pool.submit(self._write, data),
        )
        self._filled, self._idle, self._used = self._idle, self._filled, 0

    def _wait(self) -> None:
        for work in self._working:
            work.result()

    def _write(self, data: memoryview) -> None:
        while data:  # an unbuffered file may take a part at a time
            data = data[self._file.write(data) :]

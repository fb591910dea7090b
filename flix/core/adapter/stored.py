"""Tensors out of a safetensors file that anybody may have written (docs/specification.md §4.4).

Where hundreds of thousands of tensors are read, asking the safetensors library for each, its shape and its dtype takes
longer than reading the whole file. And a file is opened once: all that is read of it comes from one handle, so that a
writer that moves another into its place meanwhile changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.described import DTYPES
from flix.core.adapter.stream import BLANK

_BUFFER = 1 << 25
_PIECE = 1 << 22
_MOST_AXES, _LONGEST_AXIS = 16, 1 << 53


class StoredTensors(Mapping[str, NDArray[Any]]):
    """A file's tensors, each read when it is asked for, and its own; fast in the file's order.

    Args:
        file: an unbuffered file at its start; it stays open while tensors are asked for.

    Attributes:
        shapes: of the tensors, by name.
        dtypes: of the tensors, as safetensors names them: ``"F32"``.
        metadata: of the file.

    Raises:
        ValueError: what is no safetensors file, or is not whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        whole = found.st_size
        size = int.from_bytes(self._exactly(0, min(8, whole)), "little")
        self._first = 8 + size
        if self._first > whole:
            raise ValueError("its header is longer than the file")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._header = bytes(self._exactly(0, self._first))
        try:
            entries = json.loads(self._header[8:])
            self.metadata = _metadata(entries.pop("__metadata__", None))
            last = self._read(entries)
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            why = "it nests too deeply" if isinstance(error, RecursionError) else repr(error)
            raise ValueError(f"its header is not one of safetensors ({why[:200]})") from error
        if self._first + last != whole:
            raise ValueError(f"it has {whole} bytes, and should have {self._first + last}")
        self._size = last
        self._window, self._start, self._end = bytearray(), 0, 0

    def _read(self, entries: dict[str, Any]) -> int:
        """Take the tensors' names, shapes, dtypes and places from a header; where the last one ends."""
        known: dict[Any, tuple[tuple[int, ...], int | None]] = {}
        last, self._in_order = 0, True
        for name, entry in entries.items():
            dtype, given = entry["dtype"], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            if (dtype, given) not in known:
                known[dtype, given] = given, _size(dtype, given)
            shape, size = known[dtype, given]
            if not (type(start) is type(end) is int and 0 <= start <= end):
                raise TypeError(f"{name[:100]!r} does not lie from one place to a later one")
            if size is not None and end - start != size:
                raise TypeError(
                    f"{name[:100]!r} has {end - start} bytes, not the {size} of its shape"
                )
            self.shapes[name], self.dtypes[name] = shape, dtype
            self._places[name] = start, end
            if start != last:
                self._in_order = False
            last = end
        if not self._in_order:
            last = 0
            for start, end in sorted(self._places.values()):
                if start != last:
                    raise TypeError("tensors overlap, or leave a gap")
                last = end
        return last

    def __getitem__(self, name: str) -> NDArray[Any]:
        start, end = self._places[name]
        if start < self._start or end > self._end:
            self._fill(start, end)
        dtype = DTYPES[self.dtypes[name]]
        return np.ndarray(self.shapes[name], dtype, self._window, start - self._start).copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _fill(self, start: int, end: int) -> None:
        if len(self._window) < (size := max(min(_BUFFER, self._size), end - start)):
            self._window = bytearray(size)
        self._start = self._end = start
        window = memoryview(self._window)
        self._file.seek(self._first + start)
        while self._end < end:
            count = self._file.readinto(window[self._end - start :])  # type: ignore[attr-defined]
            if not count:
                raise ValueError("the file ends within a tensor")
            self._end += count

    def _exactly(self, start: int, size: int) -> bytearray:
        memory = bytearray(size)
        self._file.seek(start)
        _fill(self._file, memoryview(memory))
        return memory

    def digest(self) -> tuple[str, str | None]:
        """Read all of the file: its digest, and the first tensor whose values are not all finite.

        Nothing else may be read of it meanwhile. The digest is that of
        :func:`flix.core.adapter.stream.write_tensors`; a file that says none has its plain SHA-256.
        """
        found = hashlib.sha256(_blanked(self._header, self.metadata.get("digest")))
        piece, broken = memoryview(bytearray(min(_PIECE, self._size))), None
        names = (
            self._places if self._in_order else sorted(self._places, key=self._places.__getitem__)
        )  # type: ignore[arg-type]
        # Tensors of one dtype that lie side by side are looked at together.
        for dtype, run in groupby(names, self.dtypes.__getitem__):
            side_by_side = list(run)
            start, end = self._places[side_by_side[0]][0], self._places[side_by_side[-1]][1]
            while start < end:
                part = piece[: min(_PIECE, end - start)]
                self._file.seek(self._first + start)
                _fill(self._file, part)
                found.update(part)
                if broken is None and (at := _not_finite(part, dtype)) is not None:
                    broken = next(n for n in side_by_side if self._places[n][1] > start + at)
                start += len(part)
        return found.hexdigest(), broken


def _metadata(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if not all(isinstance(value, str) for value in given.values()):
        raise TypeError("its metadata holds more than texts")
    return dict(given)


def _size(dtype: Any, shape: tuple[Any, ...]) -> int | None:
    """A tensor's bytes; None for a dtype that adapters do not have."""
    if not isinstance(dtype, str) or len(shape) > _MOST_AXES:
        raise TypeError(f"dtype {str(dtype)[:20]!r}, {len(shape)} axes")
    if not all(type(length) is int and 0 <= length <= _LONGEST_AXIS for length in shape):
        raise TypeError("a shape has an impossible length")
    return math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else None


def _blanked(header: bytes, digest: str | None) -> bytes:
    """The header with zeros where its digest's digits are."""
    said = f'"digest":"{digest}"'.encode()
    if digest is None or len(digest) != len(BLANK) or header.count(said) != 1:
        return header
    return header.replace(said, f'"digest":"{BLANK}"'.encode())


def _fill(file: BinaryIO, memory: memoryview) -> None:
    """Fill a memory from where an unbuffered file is, which may give a part at a time."""
    while memory:
        count = file.readinto(memory)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("the file ends within a tensor")
        memory = memory[count:]


def _not_finite(part: memoryview, dtype: str) -> int | None:
    """Where in a part of the file the first value is that is not finite; None where all are."""
    if dtype not in DTYPES:
        return None
    values = np.frombuffer(part, DTYPES[dtype])
    if dtype == "BF16":
        finite = (values & 0x7F80) != 0x7F80
    else:
        finite = np.isfinite(values)
    return None if finite.all() else int(np.argmin(finite)) * values.dtype.itemsize

"""Tensors into a safetensors file, piece by piece (docs/specification.md §4.2); :mod:`flix.core.adapter.stored` reads.

The safetensors library writes contiguous tensors that are all in memory at once. A model's pairs are views, half of
them transposed: making them contiguous costs their size in memory once more, and more time than writing them. So they
go through two buffers in turn: while one is filled, the other is hashed and written.

The file holds its own digest: the SHA-256 of all its bytes, with 64 zeros where the digest's digits are. They come
first in the header, and are put there when everything else was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from json.encoder import encode_basestring_ascii
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.described import DTYPES, Head
from flix.core.files import write_all

_BUFFER = 1 << 25
BLANK = "0" * 64
"""What stands in a file's digest while it is computed."""
_START = '{"__metadata__":{"digest":"'

_Part = tuple[str, np.dtype[Any], Sequence[tuple[str, NDArray[Any]]]]


def write_tensors(
    file: BinaryIO,
    tensors: Sequence[tuple[str, NDArray[Any]]],
    metadata: Mapping[str, str],
    heads: Mapping[str, Head] | None = None,
) -> str:
    """Write a whole safetensors file.

    Args:
        file: an unbuffered file, at its start.
        tensors: with their names, in any layout; stored as float32, float64 where they are float64. Wider ones come
            first, as their alignment wants it, otherwise in the order given.
        metadata: of the file; ``digest`` is added.
        heads: by their names in the file, stored as they are.

    Returns:
        The file's digest, in hexadecimal digits.
    """
    held = list((heads or {}).items())
    kept = {"F64": [t for t in tensors if t[1].dtype == np.float64], "F32": tensors}
    if kept["F64"]:
        kept["F32"] = [t for t in tensors if t[1].dtype != np.float64]
    parts: list[_Part] = [
        (name, dtype, [*kept.get(name, ()), *((n, h.values) for n, h in held if h.dtype == name)])
        for name, dtype in DTYPES.items()
    ]
    header, largest, whole = _header(parts, metadata)
    with ThreadPoolExecutor(2) as pool:
        sink = _Sink(file, max(min(_BUFFER, whole), len(header), largest), pool)
        memory, _ = sink.room(len(header))
        memory[: len(header)] = header
        for _, dtype, items in parts:
            for _, tensor in items:
                memory, start = sink.room(tensor.size * dtype.itemsize)
                np.ndarray(tensor.shape, dtype, memory, start)[...] = tensor
        digest = sink.close()
    file.seek(8 + len(_START))
    write_all(file, digest.encode())
    return digest


def _header(parts: Sequence[_Part], metadata: Mapping[str, str]) -> tuple[bytes, int, int]:
    """The file's first bytes, the size of its largest tensor, and its own."""
    said = json.dumps(dict(metadata))
    entries = [f'{_START}{BLANK}"{"," if metadata else ""}{said[1:]}']
    start = largest = 0
    for dtype_name, dtype, items in parts:
        # By hand: with hundreds of thousands of tensors, encoding a dictionary for each would show.
        known: dict[tuple[int, ...], tuple[str, int]] = {}
        for name, tensor in items:
            shape = tensor.shape
            if shape not in known:
                text = f':{{"dtype":"{dtype_name}","shape":{list(shape)},"data_offsets":['
                known[shape] = text, tensor.size * dtype.itemsize
            middle, size = known[shape]
            entries.append(f"{encode_basestring_ascii(name)}{middle}{start},{start + size}]}}")
            largest, start = max(largest, size), start + size
    header = (",".join(entries) + "}").encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, largest, 8 + len(header) + start


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
            self._pool.submit(write_all, self._file, data),
        )
        self._filled, self._idle, self._used = self._idle, self._filled, 0

    def _wait(self) -> None:
        for work in self._working:
            work.result()

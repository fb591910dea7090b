"""A counter-based generator: pseudo-random bits as a pure function of a key and a position.

Initial values and dropout masks must have the same bytes in every backend, must not depend on the order in
which layers, features or batches are visited, and must be the same in a resumed run. A stateful generator
cannot promise that; a keyed hash of the position can. The hash is two rounds of the SplitMix64 finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), vectorised over numpy
arrays; keys come from BLAKE2b over the length-prefixed parts, so ("a", "bc") and ("ab", "c") differ.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)

Bits = NDArray[np.uint64]


def key(*parts: int | str) -> tuple[np.uint64, np.uint64]:
    """Two 64-bit words that identify the sequence of ``parts``."""
    digest = hashlib.blake2b(b"".join(map(_prefixed, parts)), digest_size=16)
    words = np.frombuffer(digest.digest(), dtype="<u8")
    return np.uint64(words[0]), np.uint64(words[1])


def keys(prefix: Sequence[int | str], endings: Iterable[Sequence[int | str]]) -> tuple[Bits, Bits]:
    """The keys of ``(*prefix, *ending)`` for many endings: the first words ``[n]``, and the second ones."""
    start = hashlib.blake2b(b"".join(map(_prefixed, prefix)), digest_size=16)
    found = bytearray()
    for ending in endings:
        digest = start.copy()
        digest.update(b"".join(map(_prefixed, ending)))
        found += digest.digest()
    words = np.frombuffer(bytes(found), dtype="<u8").reshape(-1, 2)
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)


@functools.lru_cache(maxsize=1 << 14)
def _prefixed(part: int | str) -> bytes:
    data = str(part).encode()
    return f"{type(part).__name__}:{len(data)}:".encode() + data


def _mix(z: Bits) -> Bits:
    # In place where it can be: a large model's initial values are tens of millions of these.
    mixed = z >> _S30
    mixed ^= z
    mixed *= _MIX_1
    shifted = mixed >> _S27
    mixed ^= shifted
    mixed *= _MIX_2
    shifted = mixed >> _S31
    mixed ^= shifted
    return mixed


def bits(words: tuple[np.uint64 | Bits, np.uint64 | Bits], *positions: NDArray[np.integer]) -> Bits:
    """64 random bits at each position.

    Args:
        words: a key made by :func:`key`, or keys as arrays that broadcast with the positions.
        positions: one or more integer arrays that broadcast together: the coordinates of the position.

    Returns:
        uint64, in the broadcast shape of ``positions``.
    """
    first, second = words
    with np.errstate(over="ignore"):
        state: Bits = np.asarray(first, dtype=np.uint64)
        for position in positions:
            state = _mix(state + (np.asarray(position).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        return _mix(state ^ second)


def uniform(
    words: tuple[np.uint64, np.uint64], *positions: NDArray[np.integer]
) -> NDArray[np.float64]:
    """float64 in [0, 1) at each position, from the 53 leading bits."""
    return (bits(words, *positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53

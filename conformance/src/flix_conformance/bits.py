"""Where bytes are promised: initial values, dropout masks, and the encoding of rows, from their written definition.

The generator (docs/conformance.md): a key is the BLAKE2b digest, 16 bytes, of its parts, each written as
``<type>:<length in bytes>:<text>``, read as two little-endian words k0, k1. With M the finaliser of SplitMix64 and
G = 0x9E3779B97F4A7C15, all modulo 2^64, the bits at the position (p1, p2, ...) are

    s = k0;  s = M(s + (p + 1) G) for each p;  bits = M(s xor k1)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flix_conformance.harness import Array, Case, Pairs
from flix_conformance.table import Feature, Table

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def _words(*parts: int | str) -> tuple[int, int]:
    text = b"".join(
        f"{type(part).__name__}:{len(str(part).encode())}:".encode() + str(part).encode()
        for part in parts
    )
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def random_bits(words: tuple[int, int], *position: int) -> int:
    """64 bits at a position."""
    state = words[0]
    for coordinate in position:
        state = _finalise((state + (coordinate + 1) * _GOLDEN) & _WORD)
    return _finalise(state ^ words[1])


def _unit(words: tuple[int, int], *position: int) -> float:
    return (random_bits(words, *position) >> 11) * 2.0**-53


def initial_pairs(case: Case) -> Pairs:
    """A uniform in ±1/sqrt(d_in) from 24 leading bits, in float32; B zero."""
    pairs: Pairs = {}
    bound = np.float32(1.0 / math.sqrt(max(case.d_in, 1)))
    for (group, name), (like_a, like_b) in case.pairs.items():
        words = _words("A", case.table.seed, case.path, group, name)
        flat = [random_bits(words, i) >> 40 for i in range(like_a.size)]
        unit = np.array(flat, np.float32).reshape(like_a.shape) * np.float32(2.0**-23)
        pairs[group, name] = (
            (unit - np.float32(1.0)) * bound,
            np.zeros(like_b.shape, np.float32),
        )
    return pairs


@dataclass(frozen=True)
class Rates:
    """What feature dropout is made of (docs/specification.md §2.5)."""

    p: float
    per_group: Mapping[str, float]
    keep_one: bool
    rescale: bool


def dropped(
    table: Table, rates: Rates, ids: Array, weights: Array, *, seed: int, step: int, first_row: int
) -> tuple[Array, Array]:
    """Routing after feature dropout: dropped entries hold -1 and 0."""
    features = table.features
    words, revival = _words("dropout", seed, step), _words("dropout keep one", seed, step)
    new_ids, new_weights = ids.copy(), weights.copy()
    for row in range(len(ids)):
        active = sorted({int(i) for i in ids[row].ravel() if i >= 0})
        rate = {i: rates.per_group.get(features[i][0], rates.p) for i in active}
        kept = {i for i in active if _unit(words, first_row + row, i + 1) >= rate[i]}
        if rates.keep_one and active and not kept:
            kept = {active[int(_unit(revival, first_row + row) * len(active))]}
        for place in np.ndindex(*ids[row].shape):
            number = int(ids[row][place])
            if number not in kept:
                new_ids[row][place], new_weights[row][place] = -1, 0.0
            elif rates.rescale and rate[number] < 1.0:
                value = float(weights[row][place]) / (1.0 - rate[number])
                new_weights[row][place] = np.float32(value)
    return new_ids, new_weights


def active_features(table: Table, row: Mapping[str, Any]) -> dict[int, float]:
    """What one row activates, by id: names add up, and what they imply acts once with weight 1 unless it is named."""
    named: dict[Feature, float] = {}
    for group, value in row.items():
        if value is None:
            continue
        if isinstance(value, str):
            value = [value]
        weights = value.items() if isinstance(value, Mapping) else [(name, 1.0) for name in value]
        for name, weight in weights:
            named[group, name] = named.get((group, name), 0.0) + weight
    pending, implied = list(named), []
    while pending:
        group, name = pending.pop()
        for source in ((group, name), (group, "*")):
            for target in table.implies.get(source, ()):
                if target not in implied:
                    implied.append(target)
                    pending.append(target)
    acting = dict.fromkeys(implied, 1.0) | named
    return {table.ids[feature]: float(np.float32(w)) for feature, w in acting.items()}


def by_row(ids: Array, weights: Array) -> Sequence[dict[int, float]]:
    """Encoded routing as one {id: weight} a row."""
    return [
        {int(i): float(w) for i, w in zip(row.tolist(), factors.tolist(), strict=True) if i >= 0}
        for row, factors in zip(ids, weights, strict=True)
    ]

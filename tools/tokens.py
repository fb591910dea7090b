"""Bytes as tokens, numbered as ByT5 numbers them, a whole batch at a time.

Ids 0, 1 and 2 are padding, end and unknown; byte b is b + 3; sentinels for span corruption follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

PAD, EOS, UNK = 0, 1, 2
BYTE_OFFSET = 3
FIRST_SENTINEL = BYTE_OFFSET + 256
VOCABULARY = 288
SENTINELS = VOCABULARY - FIRST_SENTINEL
#: The label that torch's cross entropy leaves out.
IGNORED = -100


def encode(texts: Sequence[str], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, both int64 ``[batch, width]``, with the end token after each text.

    Longer texts are cut so that the end token still fits in ``max_length``.
    """
    limit = None if max_length is None else max_length - 1
    raw = [text.encode("utf-8")[:limit] for text in texts]
    lengths = np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))
    width = int(lengths.max(initial=0)) + 1
    columns = np.arange(width)
    ids = np.zeros((len(raw), width), dtype=np.int64)
    inside = columns < lengths[:, None]
    ids[inside] = np.frombuffer(b"".join(raw), dtype=np.uint8).astype(np.int64) + BYTE_OFFSET
    ids[np.arange(len(raw)), lengths] = EOS
    mask = (columns <= lengths[:, None]).astype(np.int64)
    return ids, mask


def labels(texts: Sequence[str], max_length: int | None = None) -> np.ndarray:
    """Ids as labels: padding is :data:`IGNORED`."""
    ids, mask = encode(texts, max_length)
    return np.where(mask == 1, ids, IGNORED)


def pad(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of ids of unequal lengths as one array, padded at the end."""
    out = np.full((len(rows), max(map(len, rows), default=0)), PAD, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def decode(ids: np.ndarray | Iterable[Sequence[int]]) -> list[str]:
    """Texts of rows of ids, up to each row's end token; invalid UTF-8 becomes U+FFFD."""
    texts = []
    for row in ids:
        values = np.asarray(row, dtype=np.int64)
        ends = np.flatnonzero(values == EOS)
        if ends.size:
            values = values[: ends[0]]
        held = values[(values >= BYTE_OFFSET) & (values < FIRST_SENTINEL)] - BYTE_OFFSET
        texts.append(held.astype(np.uint8).tobytes().decode("utf-8", errors="replace"))
    return texts

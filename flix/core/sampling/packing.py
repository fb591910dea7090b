"""Packing: several short examples in one row, without padding between them, each under its own features."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from flix.core.checks import whole
from flix.core.errors import RoutingError

IGNORED = -100
"""The label of tokens that count for no loss."""

SEGMENTS = "segments"
"""The column that holds the lengths of a packed row's segments, where ``position_ids`` do not tell them."""

_TOKENS = ("input_ids", "labels", "token_type_ids")


def pack(
    rows: Sequence[Mapping[str, Any]],
    length: int,
    *,
    causal: bool = True,
    pad_token_id: int = 0,
) -> list[dict[str, Any]]:
    """Pack tokenised rows into rows of exactly ``length`` tokens.

    Each row is put, uncut, into the fullest packed row that has room for it (best fit), in the order of arrival. A
    packed row has ``input_ids``, ``labels`` and ``position_ids``, which start at 0 again in every segment. From
    these, transformers' models read the boundaries, so no token attends to another segment, if there is no
    ``attention_mask`` and no cache. Every other column, including those of features, becomes a list with one entry
    for each segment. The rest of a packed row is a segment of padding whose entries are None. The loss ignores it,
    and it is routed to the base alone.

    Args:
        rows: rows with ``input_ids`` and, if causal is False, ``labels`` (one for each token); they are not changed.
            An ``attention_mask`` must be all ones.
        length: the number of tokens in a packed row.
        causal: the labels are those of a causal language model, which compares position t with label t + 1: missing
            labels are copied from ``input_ids``, and the first of each segment is ignored, because the segment before
            it cannot predict it. False: labels belong to their own positions.
        pad_token_id: fills the rest of a packed row.

    Returns:
        The packed rows.

    Raises:
        RoutingError: a row that is longer than ``length``, empty or padded, or does not have one label for each
            token; a number of columns that changes from row to row.
    """
    length = whole(length, "length", 1, RoutingError)
    segments = [_segment(row, number, length, causal) for number, row in enumerate(rows)]
    columns = _columns(rows)
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the packed row), ascending
    for number, segment in enumerate(segments):
        needed = len(segment["input_ids"])
        place = bisect.bisect_left(room, (needed, -1))
        left, into = room.pop(place) if place < len(room) else (length, len(bins))
        if into == len(bins):
            bins.append([])
        bins[into].append(number)
        if left > needed:
            bisect.insort(room, (left - needed, into))
    return [
        _joined([rows[n] for n in members], [segments[n] for n in members], columns, length, pad_token_id)
        for members in bins
    ]  # fmt: skip


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that become one entry a segment."""
    found = [{*row} for row in rows]
    for number, names in enumerate(found):
        if names != found[0]:
            odd = sorted(names ^ found[0])
            raise RoutingError(
                f"row {number}: packed rows need the same columns; {odd[0]!r} is not in all"
            )
    own = {*_TOKENS, "attention_mask", "position_ids", SEGMENTS}
    return [name for name in rows[0] if name not in own] if rows else []


def _segment(
    row: Mapping[str, Any], number: int, length: int, causal: bool
) -> dict[str, list[int]]:
    if "input_ids" not in row:
        raise RoutingError(f"row {number}: a row to pack has input_ids; got {sorted(row)}")
    ids = [int(i) for i in row["input_ids"]]
    if not 0 < len(ids) <= length:
        raise RoutingError(
            f"row {number} has {len(ids)} tokens; a packed row holds 1 to {length}: cut the row when it is "
            "tokenised, or pack into longer rows"
        )
    if not all(row.get("attention_mask", ())):
        raise RoutingError(f"row {number} is padded; rows are packed without padding")
    labels = row.get("labels")
    if labels is None and not causal:
        raise RoutingError(f"row {number}: with causal=False, a row to pack has labels")
    segment = {"input_ids": ids, "labels": ids if labels is None else [int(i) for i in labels]}
    if "token_type_ids" in row:
        segment["token_type_ids"] = [int(i) for i in row["token_type_ids"]]
    for name, values in segment.items():
        if len(values) != len(ids):
            raise RoutingError(
                f"row {number} has {len(ids)} tokens and {len(values)} {name}; one a token is needed"
            )
    if causal:
        segment["labels"] = [IGNORED, *segment["labels"][1:]]
    return segment


def _joined(
    rows: Sequence[Mapping[str, Any]],
    segments: Sequence[dict[str, list[int]]],
    columns: Sequence[str],
    length: int,
    pad: int,
) -> dict[str, Any]:
    lengths = [len(segment["input_ids"]) for segment in segments]
    rest = length - sum(lengths)
    filling = {"input_ids": pad, "labels": IGNORED, "token_type_ids": 0}
    joined: dict[str, Any] = {
        name: [value for segment in segments for value in segment[name]] + [filling[name]] * rest
        for name in segments[0]
    }
    lengths += [rest] if rest else []
    joined["position_ids"] = [place for n in lengths for place in range(n)]
    for name in columns:
        joined[name] = [row[name] for row in rows] + [None] * (1 if rest else 0)
    return joined


def segment_lengths(row: Mapping[str, Any]) -> list[int] | None:
    """The lengths of a packed row's segments, from its column ``segments`` or the restarts of its ``position_ids``.

    Returns:
        The lengths, or None for a row that has neither column.

    Raises:
        RoutingError: lengths that are not positive whole numbers.
    """
    if row.get(SEGMENTS) is not None:
        lengths = [int(n) for n in row[SEGMENTS]]
        if not lengths or min(lengths) < 1:
            raise RoutingError(f"{SEGMENTS} must be positive numbers of tokens, got {lengths}")
        return lengths
    if row.get("position_ids") is None:
        return None
    positions = [int(p) for p in row["position_ids"]]
    starts = [i for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1]
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]

"""Which of a batch's tokens, sorted by the expert that they are sent to, each feature acts on.

A token sent to an expert is an *entry*. Entries lie in groups of an expert, and in a group row after row, in an order
of rows that keeps those of one feature together: such features act on the entries as they lie. Others' entries
are gathered, feature after feature, and in groups of an expert again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flix.backends.torch.grouped import Groups

_MOST_GROUPS = 1023
"""What torch's grouped product takes on a CUDA device."""


@dataclass(frozen=True, eq=False)
class Sent:
    """A batch's tokens, one entry for each expert that a token is sent to, sorted by expert.

    Attributes:
        experts: the entries in groups of an expert.
        token: int64 ``[S]``: the token of each.
        row: int64 ``[S]``: its row in the routing.
    """

    experts: Groups
    token: Tensor
    row: Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """The entries of some features of one rank and one scale.

    Attributes:
        places: the features' among those whose values are given.
        entry: int64 ``[n]``: which of the sorted entries; None for all of them as they lie.
        groups: these in groups of an expert and a feature: group e F + f of E F.
        scale: s_f.
        span: which of the factors are theirs, where there are any.
    """

    places: tuple[int, ...]
    entry: Tensor | None
    groups: Groups
    scale: float
    span: Tensor | None


def row_order(ids: NDArray[Any]) -> NDArray[np.int64]:
    """An order of rows in which features keep together: by the column that has most features, then by the others.

    Args:
        ids: ``[N, W]`` on the host.
    """
    width = ids.shape[1]
    columns = sorted(range(width), key=lambda c: len(np.unique(ids[:, c])))
    if not columns:
        return np.arange(len(ids))
    return np.lexsort([ids[:, c] for c in columns])  # the last counts first


def together(ids: NDArray[Any], order: NDArray[Any] | None) -> list[list[int]]:
    """The features of each column that has one in every row, each in one stretch of rows, and in no other column.

    Args:
        ids: ``[N, W]`` on the host; -1 pads.
        order: of the rows; None as they are.
    """
    found = []
    sorted_ids = ids if order is None else ids[order]
    for c in range(ids.shape[1]):
        column = sorted_ids[:, c]
        if not len(column) or (column < 0).any():
            continue
        starts = np.flatnonzero(np.diff(column, prepend=-1))
        features = column[starts]
        others = np.delete(sorted_ids, c, axis=1)
        if len(np.unique(features)) == len(features) and not np.isin(features, others).any():
            found.append(features.tolist())
    return found


class Entries:
    """Which of a batch's sorted entries each feature acts on; each row has as many entries.

    Args:
        ids: integer ``[N, W]`` on the host; -1 pads.
        wanted: the features that are looked for; others do not act.
        sent: the batch's entries.
        order: of the rows in each group of an expert; None as they are.
    """

    def __init__(
        self,
        ids: NDArray[Any],
        wanted: Collection[int],
        sent: Sent,
        order: NDArray[Any] | None = None,
    ) -> None:
        rows, width = ids.shape
        present = np.unique(ids)
        self.features = [int(i) for i in present if int(i) in wanted]
        count = len(self.features)
        places = np.full(int(max(present.max(initial=0), 0)) + 2, count)  # the last is that of -1
        places[self.features] = np.arange(count)
        local = places[ids]
        each = len(sent.row) // max(rows, 1)
        ends = np.cumsum(np.bincount(local.ravel(), minlength=count + 1)[:count]) * each
        self._ends = [0, *ends.tolist()]
        table = torch.from_numpy(local).to(sent.row.device)
        sort = table[sent.row].reshape(-1).argsort(stable=True)
        sort = sort[: self._ends[-1]]
        self._entry, self._column = sort // max(width, 1), sort % max(width, 1)
        self._sent, self._ids, self._order = sent, ids, order
        self._together = [set(features) for features in together(ids, order)]
        self._made: dict[Any, tuple[Tensor | None, Groups, Tensor | None]] = {}

    def factors(self, weights: Tensor) -> Tensor:
        """The weight ``[N, W]`` of each feature's entries, feature after feature."""
        return weights[self._sent.row[self._entry], self._column]

    def scattered(self, factors: Tensor, like: Tensor) -> Tensor:
        """The way back from :meth:`factors`."""
        where = self._sent.row[self._entry], self._column
        return torch.zeros_like(like).index_put(where, factors.to(like.dtype), accumulate=True)

    def shares(
        self,
        active: Sequence[int],
        ranks: Sequence[int],
        scales: Sequence[float],
        weighted: bool,
    ) -> list[Share]:
        """The entries of some features.

        Args:
            active: the features, in the order of their values.
            ranks, scales: r_f and s_f of all features, by id.
            weighted: whether there are factors.
        """
        place = {feature: i for i, feature in enumerate(active)}
        left = [feature for feature in self.features if feature in place]
        sets: list[tuple[bool, list[int]]] = []
        if len(self._sent.row) < 2 * self._sent.experts.count * len(left):
            # So few entries that stacking all experts of the features would cost more than it saves.
            sets += [(False, [f]) for f in left]
        else:
            most = len(left)
            if self._entry.is_cuda:
                most = max(1, _MOST_GROUPS // self._sent.experts.count)
            for column in self._together:
                alike = len({(ranks[f], scales[f]) for f in column}) == 1
                if column <= place.keys() and alike and len(column) <= most:
                    sets.append((True, self._runs(column)))
                    left = [f for f in left if f not in column]
            kinds: dict[Any, list[int]] = {}
            for f in left:
                kinds.setdefault((ranks[f], scales[f]), []).append(f)
            for kind in kinds.values():
                sets += [(False, kind[i : i + most]) for i in range(0, len(kind), most)]
        found = []
        for whole, features in sets:
            key = whole, *features
            if key not in self._made:
                self._made[key] = (self._whole if whole else self._gathered)(features, weighted)
            entry, groups, span = self._made[key]
            places = tuple(place[f] for f in features)
            found.append(Share(places, entry, groups, scales[features[0]], span))
        return found

    def _runs(self, features: Collection[int]) -> list[int]:
        """Features that keep together, in the order of their rows."""
        ids = self._ids if self._order is None else self._ids[self._order]
        (column,) = (c for c in ids.T if int(c[0]) in features)
        return list(dict.fromkeys(column.tolist()))

    def _whole(self, features: Sequence[int], weighted: bool) -> tuple[None, Groups, Tensor | None]:
        """The groups of all entries as they lie, and where their factors are."""
        experts, count = self._sent.experts, len(features)
        groups = experts
        if count > 1:
            at = {f: i for i, f in enumerate(features)}
            (column,) = (c for c in self._ids.T if int(c[0]) in at)
            own = torch.tensor([at[f] for f in column.tolist()], device=self._sent.row.device)
            groups = Groups(experts.of * count + own[self._sent.row], experts.count * count)
        if not weighted:
            return None, groups, None
        span = self._span(features)
        return None, groups, span[self._entry[span].argsort()]

    def _gathered(
        self, features: Sequence[int], weighted: bool
    ) -> tuple[Tensor, Groups, Tensor | None]:
        """The entries of features, their groups, and where their factors are."""
        experts, count = self._sent.experts, len(features)
        span = self._span(features)
        entry = self._entry[span]
        if count == 1:
            return entry, Groups(experts.of[entry], experts.count), span
        sizes = [self._ends[i + 1] - self._ends[i] for i in map(self.features.index, features)]
        own = torch.arange(count).repeat_interleave(torch.tensor(sizes)).to(entry.device)
        keys, sort = (experts.of[entry] * count + own).sort(stable=True)
        return entry[sort], Groups(keys, experts.count * count), span[sort] if weighted else None

    def _span(self, features: Sequence[int]) -> Tensor:
        """Which of the factors are those of some features' entries."""
        device = self._entry.device
        spans = [
            torch.arange(self._ends[i], self._ends[i + 1], device=device)
            for i in map(self.features.index, features)
        ]
        return spans[0] if len(spans) == 1 else torch.cat(spans)

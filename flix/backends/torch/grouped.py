"""Rows that lie in groups, each with a matrix of its own: the products that layers of experts are made of.

torch multiplies all groups in one call where it has ``grouped_mm`` and the sizes suit it. Elsewhere groups are gone
through one by one, and where there are fewer rows than groups, each row fetches its own matrix.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUPED = getattr(F, "grouped_mm", None)
_FAST = (torch.float32, torch.bfloat16, torch.float16)


class Groups:
    """Which group each of some rows is in.

    Args:
        of: int64 ``[n]``, ascending: the group of each row.
        count: the number of groups, G.
        ends: int32 ``[G]``: where each group's rows end, if it is known.
    """

    def __init__(self, of: Tensor, count: int, ends: Tensor | None = None) -> None:
        self.of, self.count, self._ends = of, count, ends

    def __len__(self) -> int:
        return self.of.shape[0]

    @cached_property
    def ends(self) -> Tensor:
        """int32 ``[G]``: where each group's rows end."""
        if self._ends is not None:
            return self._ends
        groups = torch.arange(self.count, device=self.of.device)
        return torch.searchsorted(self.of, groups, right=True).to(torch.int32)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(group, start, end) of the groups that have rows, on the host."""
        ends = self.ends.tolist()
        found = zip(range(self.count), [0, *ends], ends, strict=False)
        return [(group, start, end) for group, start, end in found if start < end]

    def part(self, first: int, last: int) -> tuple[Groups, slice]:
        """Some groups by themselves, and which rows are theirs."""
        start = int(self.ends[first - 1]) if first else 0
        rows = slice(start, int(self.ends[last - 1]))
        ends = self.ends[first:last] - start
        return Groups(self.of[rows] - first, last - first, ends), rows

    @property
    def few(self) -> bool:
        """Whether there are fewer rows than groups."""
        return len(self) < self.count


def products(
    x: Tensor,
    matrices: Tensor,
    groups: Groups,
    *,
    small: bool = False,
    plain: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Each row times the matrix of its group.

    Args:
        x: ``[n, p]``.
        matrices: ``[G, p, q]``, any strides.
        groups: of the rows.
        small: whether a matrix is small enough to be copied for a row.
        plain: compute with operations that may be differentiated any number of times.
        out: where the result is written, if it has a place: for large matrices, and not where ``plain``.

    Returns:
        ``[n, q]``.
    """
    if small and groups.few:
        return torch.bmm(x.unsqueeze(1), matrices[groups.of]).squeeze(1)
    if not plain and out is None and _suits(x, matrices):
        return _GROUPED(x, matrices, offs=groups.ends)  # type: ignore[misc, no-any-return]
    if plain:
        parts = [x[start:end] @ matrices[group] for group, start, end in groups.spans]
        return torch.cat(parts) if parts else x.new_zeros(0, matrices.shape[2])
    made = x.new_empty(x.shape[0], matrices.shape[2]) if out is None else out
    for group, start, end in groups.spans:
        torch.mm(x[start:end], matrices[group], out=made[start:end])
    return made


def outer(a: Tensor, b: Tensor, groups: Groups, out: Tensor | None = None) -> Tensor:
    """The sum of the rows' outer products in each group: ``[G, p, q]`` of a ``[n, p]`` and b ``[n, q]``.

    Args:
        a, b: the rows.
        groups: of the rows.
        out: where the sums are written, if they have a place.
    """
    if not groups.few and _suits(a, b):
        made = _GROUPED(a.t(), b, offs=groups.ends)  # type: ignore[misc]
        return made if out is None else out.copy_(made)
    if out is None:
        out = a.new_empty(groups.count, a.shape[1], b.shape[1])
    out.zero_()
    for group, start, end in groups.spans:
        torch.mm(a[start:end].t(), b[start:end], out=out[group])
    return out


def _suits(*tensors: Tensor) -> bool:
    """Whether torch's grouped product takes tensors: rows of whole 16 bytes, in a dtype that it knows there."""
    first = tensors[0]
    if _GROUPED is None or first.dtype not in _FAST or first.device.type not in ("cpu", "cuda"):
        return False
    if any(t.dtype != first.dtype or 0 in t.shape for t in tensors):
        return False
    if any(
        size * t.element_size() % 16 for t in tensors for size in t.shape[-2 + (t.dim() == 2) :]
    ):
        return False
    if first.device.type == "cpu":
        return True
    # Others are gone through on the host, which waits for the device each time.
    capable = torch.cuda.get_device_capability(first.device) >= (8, 0)
    return (
        capable and first.dtype == torch.bfloat16 and all(t.data_ptr() % 16 == 0 for t in tensors)
    )

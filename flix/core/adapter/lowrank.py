"""Low-rank pairs made from other low-rank pairs, without ever forming the full matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def resized_mean(
    pairs: Sequence[Pair],
    scales: Sequence[float],
    fresh_a: NDArray[np.floating],
    scale: float,
    count: int,
) -> Pair:
    """A pair of a wanted rank that is as near as can be to the mean update of some pairs.

    One pair of the wanted rank is copied. Otherwise the mean, itself of low rank, is cut to the wanted rank by its
    singular values (Eckart and Young); where the wanted rank is larger, rows of fresh values with a zero B follow,
    which change nothing and can be trained.

    Args:
        pairs: A ``[r_i, d_in]`` and B ``[d_out, r_i]`` of each source.
        scales: s_i of each source.
        fresh_a: initial A of the wanted rank, ``[r, d_in]``.
        scale: s of the new pair.
        count: the number of sources the mean is over; those without an update count as zero.

    Returns:
        A ``[r, d_in]`` and B ``[d_out, r]`` with scale * B A nearest to (1 / count) Σ s_i B_i A_i.
    """
    rank = fresh_a.shape[0]
    if count == 1 and pairs[0][0].shape[0] == rank:
        a, b = pairs[0]
        return a.copy(), b * (scales[0] / scale)
    a = np.concatenate([pair[0] for pair in pairs])
    b = np.concatenate([p[1] * (s / count / scale) for p, s in zip(pairs, scales, strict=True)], 1)
    if a.shape[0] > rank:
        a, b, _ = nearest(a, b, rank)
    missing = rank - a.shape[0]
    if missing:
        a = np.concatenate([a, fresh_a[rank - missing :]])
        b = np.pad(b, ((0, 0), (0, missing)))
    return a, b


def nearest(
    a: NDArray[np.floating], b: NDArray[np.floating], rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The pair of a rank whose B A is nearest to another's (Eckart and Young).

    Args:
        a: ``[r, d_in]``.
        b: ``[d_out, r]``.
        rank: the rank wanted, at most r. A product of less rank gives a smaller pair.

    Returns:
        A ``[rank, d_in]``, B ``[d_out, rank]``, and the singular values of the product, the largest first.
    """
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    u, sigma, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    return (q_a @ v[:rank].T * root).T, q_b @ u[:, :rank] * root, sigma

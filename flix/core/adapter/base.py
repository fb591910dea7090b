"""The base that an adapter was trained on: its name, its revision, and a fingerprint of its kernels.

An adapter's updates mean something on the kernels that they were trained with. A name does not tell: folders move,
and a name on a hub may get other weights. So a file also holds a fingerprint of the kernels that are adapted: of each,
its kind, its sizes, and 64 of its values at places that depend on its sizes alone. Values are rounded twice, to
bfloat16 and to float16, and each gives a half of the fingerprint; two fingerprints are of one base if a half is the
same. So a checkpoint has one fingerprint in float32 and in bfloat16, and in float32 and in float16. Paths are not part
of it: every framework, and a model under other names, has the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.described import Base

SAMPLES = 64


@dataclass(frozen=True)
class Places:
    """Where a kernel is looked at: ``kernel[rows, columns]`` of ``[d_out, d_in]``.

    Of a layer of experts, ``kernel[experts, rows, columns]``; others have None there.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    experts: NDArray[np.int64] | None = None


def places(shape: LayerShape) -> Places:
    """The places of a kernel of these sizes that its fingerprint looks at."""
    each = shape.d_out * shape.d_in
    size = max(shape.experts, 1) * each
    step = size * 618_034 // 1_000_000 + 1  # by the golden ratio, so that they are spread
    while math.gcd(step, size) > 1:  # and differ
        step += 1
    flat = np.array([i * step % size for i in range(min(SAMPLES, size))], np.int64)
    experts, within = np.divmod(flat, max(each, 1))
    rows, columns = np.divmod(within, max(shape.d_in, 1))
    return Places(rows, columns, experts if shape.experts else None)


def fingerprint(
    layers: Mapping[str, LayerShape], samples: Mapping[str, NDArray[Any]] | None
) -> str | None:
    """The fingerprint of some layers' kernels; None where they cannot be read.

    Args:
        layers: the adapted layers by path.
        samples: each kernel's values at its :func:`places`.
    """
    if samples is None:
        return None
    halves = []
    for rounded in (_bfloat16, _float16):
        each = sorted(
            hashlib.sha256(
                f"{shape.kind} {_lead(shape)}{shape.d_in} {shape.d_out} ".encode()
                + rounded(samples[path])
            ).digest()
            for path, shape in layers.items()
        )
        halves.append(hashlib.sha256(b"".join(each)).hexdigest()[:16])
    return "-".join(halves)


def _lead(shape: LayerShape) -> str:
    return f"{shape.experts} " if shape.experts else ""


def _float16(values: NDArray[Any]) -> bytes:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.asarray(values, np.float32).astype("<f2").tobytes()


def _bfloat16(values: NDArray[Any]) -> bytes:
    """Rounded to the nearest, ties to even, as frameworks do."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return (
        ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16))
        .astype("<u2")
        .tobytes()
    )


def differing(adapter: Base | None, model: Base | None) -> str | None:
    """What to warn of where an adapter's base is not the model's; None where they are the same, or nobody can tell."""
    if adapter is None or model is None or not (adapter.fingerprint and model.fingerprint):
        return None
    halves = zip(adapter.fingerprint.split("-"), model.fingerprint.split("-"), strict=False)
    if any(one == other for one, other in halves):
        return None
    return (
        f"the adapter was trained on {adapter}, and is loaded onto {model}: the kernels that it adapts have other "
        "values, so its updates may mean nothing there"
    )

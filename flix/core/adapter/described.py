"""What an adapter says of itself beside its pairs: its trained heads and its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""What numpy keeps each of the format's dtypes in; bfloat16, which it lacks, as its bits."""
_OF = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, eq=False)
class Head:
    """A parameter of the base that was trained with the features, as files hold it.

    Attributes:
        dtype: as safetensors names it: ``"F64"``, ``"F32"``, ``"F16"`` or ``"BF16"``.
        values: the values; of bfloat16 their bits, as uint16.
    """

    dtype: str
    values: NDArray[Any]

    @classmethod
    def of(cls, values: NDArray[Any]) -> Head | None:
        """A head of an array's values, also one of ml_dtypes' bfloat16; None for other dtypes."""
        name = _OF.get(str(values.dtype))
        if name is None:
            return None
        return cls(name, values.view(np.uint16) if name == "BF16" else values)

    @staticmethod
    def holds(dtype: object) -> bool:
        """Whether :meth:`of` takes arrays of a dtype."""
        return str(dtype) in _OF

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.values.shape)

    def array(self) -> NDArray[Any]:
        """The values in a dtype that numpy computes in: bfloat16 becomes float32, and loses nothing."""
        return widened(self.values, self.dtype)


def widened(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values as numbers: the bits of bfloat16 are the upper half of a float32's."""
    if dtype != "BF16":
        return values
    return np.asarray(values.astype(np.uint32) << np.uint32(16), np.uint32).view(np.float32)


@dataclass(frozen=True)
class Base:
    """The base that an adapter was trained on; each may be unknown.

    Attributes:
        name: on a hub, or a folder.
        revision: the commit of that name.
        fingerprint: see :mod:`flix.core.adapter.base`.
    """

    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    def __str__(self) -> str:
        name = repr(self.name) if self.name else "a base without a name"
        at = f" at revision {self.revision}" if self.revision else ""
        return f"{name}{at} (fingerprint {self.fingerprint or 'unknown'})"

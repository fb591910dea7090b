"""How close two results must be: the only place that says so, and it follows from their dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Of the largest value that is expected. A whole model's error grows with its depth: the caller gives ``times``.
TOLERANCES = {
    "float64": 1e-10,
    "float32": 1e-5,
    "float16": 4e-3,
    "bfloat16": 3e-2,
}
_SMALLEST = 1e-3  # of what is expected: smaller values are held to the error that this one may have


def numpy_of(value: Any) -> np.ndarray:
    """Any framework's tensor as a numpy array in float64, or as integers or booleans if it holds those."""
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    found = np.asarray(value)
    return found if found.dtype.kind in "biu" else found.astype(np.float64)


def tolerance_of(*values: Any) -> float:
    """That of the coarsest dtype among some tensors; 0 if they hold no floating-point numbers.

    Values without a dtype (numbers, lists) count as float64.
    """
    return max(TOLERANCES.get(_dtype_of(value), 0.0) for value in values)


def assert_close(
    actual: Any, expected: Any, *, dtype: Any = None, times: float = 1.0, name: str = ""
) -> None:
    """Equal up to the dtype's tolerance, relative to the largest expected value.

    Args:
        actual: a tensor of any framework.
        expected: a tensor of the same shape, of any framework.
        dtype: what was computed in, where it is coarser than the dtype of both ("float32", torch.bfloat16, ...).
        times: a factor on the tolerance, for what adds up many roundings.
        name: said when they differ.
    """
    tolerance = tolerance_of(actual, expected)
    if dtype is not None:
        tolerance = max(tolerance, TOLERANCES[_name_of(dtype)])
    found, wanted = numpy_of(actual), numpy_of(expected)
    assert found.shape == wanted.shape, f"{name}: shape {found.shape}, expected {wanted.shape}"
    size = max(float(np.abs(wanted).max(initial=0.0)), _SMALLEST) if tolerance else 1.0
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=tolerance * times * size, err_msg=str(name)
    )


def assert_all_close(
    actual: Mapping[str, Any], expected: Mapping[str, Any], **options: Any
) -> None:
    """The same names, and values that are close by ``assert_close``."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, name=name, **options)


def assert_same_bits(actual: Any, expected: Any, name: str = "") -> None:
    """The same dtype, shape and bits: for copies, and for one compiled program run twice on the same shapes.

    Two programs, or one compiled for two shapes, may differ by a rounding: they are held to ``assert_close``.
    """
    assert same_bits(actual, expected), f"{name}: not the same bits:\n{actual}\n{expected}"


def assert_all_same_bits(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same names, and values of the same bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(actual[name], value, name)


def same_bits(left: Any, right: Any) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if _dtype_of(left) != _dtype_of(right):
        return False
    left, right = _raw(left), _raw(right)
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def relative(found: Any, expected: Any) -> float:
    """The norm of the difference over the norm of what is expected: to see that two results differ."""
    found, expected = numpy_of(found), numpy_of(expected)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_far(found: Any, other: Any, at_least: float = 1e-3) -> None:
    """Two results differ by more than any rounding, so that comparing them says something."""
    assert relative(found, other) > at_least


def _dtype_of(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return _name_of(np.asarray(value, np.float64).dtype if dtype is None else dtype)


def _name_of(dtype: Any) -> str:
    """``bfloat16`` of torch.bfloat16, of TensorFlow's and JAX's dtypes, or of the name."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def _raw(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().contiguous()
        if (
            value.dtype.is_floating_point
        ):  # numpy has no bfloat16; widening keeps values, and so tells them apart
            value = value.double()
    return np.asarray(value)

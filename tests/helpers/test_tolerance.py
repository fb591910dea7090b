"""The comparisons fail where they must."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.tolerance import (
    TOLERANCES,
    assert_all_close,
    assert_all_same_bits,
    assert_close,
    assert_far,
    assert_same_bits,
    same_bits,
    tolerance_of,
)

VALUES = np.array([1.0, -2.0, 0.5])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_dtype_decides(dtype: str) -> None:
    step = TOLERANCES[dtype] * 2.0  # of the largest value
    assert_close(VALUES + 0.9 * step, VALUES, dtype=dtype)
    assert_close((VALUES + 0.4 * step).astype(dtype), VALUES)
    with pytest.raises(AssertionError):
        assert_close(VALUES + 1.1 * step, VALUES, dtype=dtype)
    assert_close(VALUES + 1.9 * step, VALUES, dtype=dtype, times=2)
    assert tolerance_of(VALUES, VALUES.astype(dtype)) == TOLERANCES[dtype]


def test_shapes_integers_small_and_missing_values() -> None:
    with pytest.raises(AssertionError, match="x: shape"):
        assert_close(VALUES[None], VALUES, name="x")
    with pytest.raises(AssertionError):
        assert_close(np.array([1, 2]), np.array([1, 3]))
    with pytest.raises(AssertionError):
        assert_close([1e-12], [0.0])
    with pytest.raises(AssertionError):
        assert_close([np.nan], [1.0])
    with pytest.raises(AssertionError):
        assert_all_close({"a": 1.0}, {"b": 1.0})
    with pytest.raises(AssertionError, match="a"):
        assert_all_close({"a": 1.0}, {"a": 1.1})
    with pytest.raises(AssertionError):
        assert_far(VALUES * (1 + 1e-4), VALUES)
    assert_far(VALUES * (1 + 1e-2), VALUES)


def test_bits() -> None:
    assert_same_bits(VALUES, VALUES.copy())
    assert not same_bits(np.array(0.0), np.array(-0.0))
    assert not same_bits(VALUES, VALUES.astype("f4"))
    assert not same_bits(VALUES, VALUES[None])
    assert not same_bits(VALUES, np.nextafter(VALUES, 9))
    with pytest.raises(AssertionError, match="b: not the same bits"):
        assert_all_same_bits({"a": VALUES, "b": VALUES}, {"a": VALUES, "b": VALUES + 1})


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    half = torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16, requires_grad=True)
    assert_close(half * 1.01, VALUES)
    with pytest.raises(AssertionError):
        assert_close(half * 1.05, VALUES)
    with pytest.raises(AssertionError):
        assert_close(half.float() * 1.01, VALUES)
    assert same_bits(half, half.detach().clone()) and not same_bits(half, half.float())

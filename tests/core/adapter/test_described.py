"""Trained heads and bases as adapters describe them."""

from __future__ import annotations

import numpy as np
import pytest

from flix import AdapterError
from flix.core.adapter.described import Base, Head, widened
from flix.core.adapter.heads import as_heads


@pytest.mark.parametrize(
    ("dtype", "name"), [("float64", "F64"), ("float32", "F32"), ("float16", "F16")]
)
def test_a_head_keeps_values_and_dtype(dtype, name):
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    head = Head.of(values)
    assert head is not None and (head.dtype, head.shape) == (name, (2, 3))
    assert head.array().dtype == dtype and (head.array() == values).all()
    assert Head.holds(values.dtype) and Head.holds(dtype) and Head.holds("bfloat16")


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "uint16", "float8_e4m3fn"])
def test_other_dtypes_are_no_heads(dtype):
    assert not Head.holds(dtype)
    if not dtype.startswith("float8"):
        assert Head.of(np.ones(2, dtype)) is None
        with pytest.raises(AdapterError, match=r"'a\.weight' is not float16, bfloat16, float32 or"):
            as_heads({"b.weight": np.ones(2), "a.weight": np.ones(2, dtype)})


def test_heads_by_name():
    found = as_heads({"a": np.ones(2, np.float16), "b": [0.5, 2.0]})
    assert {name: (head.dtype, head.array().tolist()) for name, head in found.items()} == {
        "a": ("F16", [1.0, 1.0]),
        "b": ("F64", [0.5, 2.0]),
    }


def test_bfloat16_is_kept_as_its_bits_and_widened_without_loss():
    class Bfloat16(np.ndarray):
        """As ml_dtypes' arrays look: numpy itself has no such dtype."""

        dtype = "bfloat16"

    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], np.uint16)
    head = Head.of(bits.view(Bfloat16))
    assert head is not None and head.dtype == "BF16" and head.values.view(np.ndarray).tolist() == bits.tolist()  # fmt: skip
    assert widened(bits, "BF16").tolist() == [1.0, -2.0, float("inf"), 2.0**-133]
    assert widened(bits, "BF16").dtype == np.float32


def test_a_base_is_shown_with_what_is_known_of_it():
    assert str(Base("org/m", "abc", "f00")) == "'org/m' at revision abc (fingerprint f00)"
    assert str(Base()) == "a base without a name (fingerprint unknown)"

"""Equations as linear maps."""

import pytest

import flix
from flix.backends.tensorflow import FlixEinsumDense
from flix.backends.tensorflow.einsum import linear_einsum
from tests.helpers.registry import config


@pytest.mark.parametrize(
    "equation",
    ["abc,bcd->abd", "abc,c->ab", "ca,cd->da", "abc,cd->ad", "ab,bc,cd->ad", "abc,ccd->abd"],
)
def test_equations_that_are_no_linear_map_are_refused(equation):
    assert isinstance(linear_einsum(equation), str)
    with pytest.raises((flix.TargetError, ValueError), match=r"cannot be adapted"):
        FlixEinsumDense(equation, (4,), config=config())

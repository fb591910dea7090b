"""Kernels of several axes as one matrix, and which equations are linear maps."""

from __future__ import annotations

import numpy as np
import pytest

from flix.core.config.kernels import Form, LinearEinsum, linear_einsum

REFUSED = {
    "abc,bcd->abd": "gives each entry of the axis 'b' a kernel of its own",
    "abc,c->ab": "is not a map from one space to another",
    "ab,c->abc": "is not a map from one space to another",
    "abc,cd->ad": "sums the input over positions",
    "...c,cd->d": "sums the input over positions",
    "ac,cde->ad": "sums the kernel's axis 'e' alone",
    "ab,bc,cd->ad": "is not of the form input,kernel->output",
    "ab": "is not of the form input,kernel->output",
    "abc,ccd->abd": "repeats an axis",
    "aac,cd->ad": "repeats an axis",
    "ac,...cd->ad": "elides axes of the kernel",
}


@pytest.mark.parametrize("equation", REFUSED)
def test_equations_that_are_no_linear_map_say_why(equation):
    reason = linear_einsum(equation)
    assert isinstance(reason, str)
    assert repr(equation) in reason and REFUSED[equation] in reason


SIZES = {letter: size for size, letter in enumerate("abcde", 2)}
MAPS = {
    "abc,cde->abde": "ab",
    "abdc,cde->abe": "ab",
    "abc,dce->abed": "ab",
    "abc,cd->adb": "ab",
    "ca,cd->da": "a",
    "c,cd->d": "",
    "ab...c, cd -> a...db": "ab..",
    "...c,ec->e...": "..",
}


@pytest.mark.parametrize("equation", MAPS)
def test_an_einsum_is_a_product_with_one_matrix(equation):
    found = linear_einsum(equation)
    assert isinstance(found, LinearEinsum)
    inputs, kernel = equation.replace(" ", "").split("->")[0].split(",")
    rng = np.random.default_rng(0)
    axes = inputs.replace("...", ".")
    shape = [size for c in axes for size in ([3, 7] if c == "." else [SIZES[c]])]
    x, w = rng.normal(size=shape), rng.normal(size=[SIZES[c] for c in kernel])
    wanted = np.einsum(equation, x, w)

    form = found.form(w.shape)
    matrix = np.transpose(w, form.order).reshape(form.d_in, form.d_out)
    rows = np.transpose(x, found.input_order(x.ndim))
    lead = rows.shape[: x.ndim - len(form.contracted)]
    y = (rows.reshape(*lead, form.d_in) @ matrix).reshape(*lead, *form.sizes)
    np.testing.assert_allclose(np.transpose(y, found.output_order(y.ndim)), wanted, atol=1e-12)
    assert len(lead) == len(MAPS[equation])
    np.testing.assert_array_equal(form.unflatten(matrix), w)


@pytest.mark.parametrize(
    ("equation", "first"), [("abc,cd->abd", True), ("ca,cd->ad", False), ("ac,cd->da", False)]
)
def test_whether_the_batch_comes_first(equation, first):
    assert linear_einsum(equation).batch_first is first


def test_a_kernels_axes_are_flattened_in_its_own_order():
    form = Form((1, 3), (0, 2), (2, 3, 4, 5))
    assert (form.d_in, form.d_out, form.sizes, form.order) == (15, 8, (2, 4), (1, 3, 0, 2))
    matrix = np.arange(120).reshape(15, 8)
    assert form.unflatten(matrix)[1, 2, 3, 4] == matrix[2 * 5 + 4, 1 * 4 + 3]


@pytest.mark.parametrize("form", [Form((1, 3), (0, 2), (2, 3, 4, 5)), Form((0,), (1,), (6, 4))])
def test_entries_of_the_matrix_are_found_in_the_kernel(form):
    """Where a fingerprint of a base looks: the entry [row, column] of the matrix ``[d_out, d_in]``."""
    kernel = np.arange(np.prod(form.shape)).reshape(form.shape)
    matrix = kernel.transpose(form.order).reshape(form.d_in, form.d_out).T
    rows, columns = np.divmod(np.arange(matrix.size), form.d_in)
    np.testing.assert_array_equal(kernel[form.at(rows, columns)], matrix[rows, columns])

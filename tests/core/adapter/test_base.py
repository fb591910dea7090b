"""The fingerprint of a base: one for a checkpoint in any dtype and under any names, another for other kernels."""

from __future__ import annotations

import numpy as np
import pytest

from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.base import differing, fingerprint, places
from flix.core.adapter.described import Base

SHAPES = {"a.q": LayerShape(40, 30), "emb": LayerShape(100, 8, "embedding"), "tiny": LayerShape(2, 3)}  # fmt: skip


def kernels(seed=0):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=(s.d_out, s.d_in)).astype("f4") for p, s in SHAPES.items()}


def of(values, shapes=SHAPES):
    samples = {}
    for path, shape in shapes.items():
        where = places(shape)
        samples[path] = values[path][where.rows, where.columns]
    return fingerprint(shapes, samples)


def bfloat16(values):
    bits = values.view("u4").astype("u8")
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype("u4")).view("f4")


def warned(one, other):
    return differing(Base("one", None, one), Base("two", None, other))


def test_places_lie_in_the_kernel_and_apart():
    for shape in (*SHAPES.values(), LayerShape(4096, 11008), LayerShape(256_000, 4096), LayerShape(0, 5)):  # fmt: skip
        where = places(shape)
        count = min(64, shape.d_in * shape.d_out)
        assert where.rows.shape == where.columns.shape == (count,)
        if count:
            assert where.rows.min() >= 0 and where.rows.max() < shape.d_out
            assert where.columns.min() >= 0 and where.columns.max() < shape.d_in
        assert len({*zip(where.rows.tolist(), where.columns.tolist(), strict=True)}) == count


def test_a_checkpoint_is_known_in_any_dtype_and_under_any_names():
    values = kernels()
    whole = of(values)
    half, brain = ({p: k.astype("f2") for p, k in values.items()}, {p: bfloat16(k) for p, k in values.items()})  # fmt: skip
    assert warned(whole, whole) is None
    assert warned(whole, of(half)) is None and warned(of(brain), whole) is None
    assert warned(whole, of({p: k.astype("f8") for p, k in values.items()})) is None
    assert len({whole, of(half), of(brain)}) == 3
    names = {"a.q": "x.y", "emb": "z", "tiny": "a"}
    renamed = {names[p]: s for p, s in reversed(SHAPES.items())}
    assert of({names[p]: k for p, k in values.items()}, renamed) == whole


@pytest.mark.parametrize("path", SHAPES)
def test_other_kernels_are_another_base(path):
    values = kernels()
    values[path] = values[path] * 1.01
    said = warned(of(kernels()), of(values))
    assert said is not None and said.count("fingerprint") == 2
    assert of(kernels()) in said and of(values) in said and "'one'" in said and "'two'" in said
    assert warned(of(kernels()), of(kernels(1)))


def test_other_sizes_are_another_base():
    values = kernels()
    one = {"tiny": SHAPES["tiny"]}
    assert warned(of(values, one), of({"tiny": values["tiny"].T}, {"tiny": LayerShape(3, 2)}))
    assert warned(of(values, one), of(values, {"tiny": LayerShape(2, 3, "embedding")}))


def test_what_is_not_known_is_not_warned_of():
    known = Base("one", None, of(kernels()))
    for other in (None, Base("two"), Base("two", "abc", None)):
        assert differing(known, other) is None and differing(other, known) is None
    assert fingerprint(SHAPES, None) is None
    assert str(Base("org/x", "abc", "12-34")) == "'org/x' at revision abc (fingerprint 12-34)"
    assert str(Base()) == "a base without a name (fingerprint unknown)"

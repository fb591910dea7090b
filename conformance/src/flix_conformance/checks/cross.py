"""Backends against each other, where they must agree: to rounding, or bit by bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from flix_conformance import oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.checks.files import TENSOR_FILE, description, saved_case, unpack
from flix_conformance.checks.gradients import of_pairs, output_gradient, sizes
from flix_conformance.checks.outputs import output
from flix_conformance.checks.training import (
    SETTINGS,
    STEPS,
    check_trajectory,
    dropout_case,
)
from flix_conformance.compare import close, same_bits, same_pairs
from flix_conformance.harness import Case
from flix_conformance.strategies import Draw
from flix_conformance.table import written


def _case(draw: Draw) -> Case:
    return draw.case(kind=any_kind(draw, draw.shared("kinds")), pool=16)


@check("two backends give the same outputs", examples=32, pair=True)
def cross_forward(draw: Draw, first: Backend, second: Backend) -> None:
    case = _case(draw)
    size = oracle.forward(oracle.magnitude(case))
    close(output(second, case), output(first, case), size, case.dtype, "the output", slack=2.0)


@check("two backends give the same gradients", examples=24, pair=True, uses=("gradients",))
def cross_gradients(draw: Draw, first: Backend, second: Backend) -> None:
    case = _case(draw)
    dy = output_gradient(draw, case)
    found, other = first.gradients(case, dy), second.gradients(case, dy)
    size = sizes(case, dy)
    if case.kind == "linear":
        expected = np.asarray(found["x"], np.float64)
        close(other["x"], expected, size.x, case.dtype, "the gradient of x", 4.0)
    for part in (0, 1):
        mine, theirs = of_pairs(found, case, part), of_pairs(other, case, part)
        for feature, gradient in mine.items():
            label = f"the gradient of {'AB'[part]} of {written(feature)}"
            expected = np.asarray(gradient, np.float64)
            close(theirs[feature], expected, size.pairs[feature][part], case.dtype, label, 4.0)


@check("two backends train along the same way", examples=4, pair=True, uses=("training",))
def cross_trajectory(draw: Draw, first: Backend, second: Backend) -> None:
    case, batches = draw.run(any_kind(draw, draw.shared("kinds")), steps=STEPS)
    found = first.train(case, batches, SETTINGS)["pairs"]
    check_trajectory(case, second.train(case, batches, SETTINGS)["pairs"], found, 2.0, batches)


@check("two backends merge to the same kernel", examples=10, pair=True, uses=("merge",))
def cross_merge(draw: Draw, first: Backend, second: Backend) -> None:
    case = _case(draw)
    row = draw.rows(case.table, 1, full=True)[0]
    size = oracle.merged(oracle.magnitude(case), dict.fromkeys(case.table.features, 4.0))
    found = np.asarray(first.merge(case, row), np.float64)
    close(second.merge(case, row), found, size, case.dtype, "the merged kernel", slack=2.0)


@check("two backends start from the same bytes", examples=8, pair=True)
def cross_initial(draw: Draw, first: Backend, second: Backend) -> None:
    case = _case(draw).but(dtype="float32")
    same_pairs(second.initial(case), first.initial(case), "initial values")


@check("two backends drop the same features", examples=15, pair=True, core="dropout")
def cross_masks(draw: Draw, first: Backend, second: Backend) -> None:
    config, _, case, place = dropout_case(draw)
    assert case.weights is not None
    found = first.dropout(config, case.ids.copy(), case.weights.copy(), **place)
    other = second.dropout(config, case.ids.copy(), case.weights.copy(), **place)
    same_bits(other[0], found[0], "ids after dropout")
    same_bits(other[1], found[1], "weights after dropout")


@check(
    "what one backend writes the other reads, bit by bit, and writes again in the same words and bits",
    examples=6,
    pair=True,
    uses=("files",),
)
def cross_files(draw: Draw, first: Backend, second: Backend) -> None:
    case = saved_case(draw, draw.shared("kinds"))
    blank = case.but(pairs={f: (0 * a, 0 * b) for f, (a, b) in case.pairs.items()})
    with tempfile.TemporaryDirectory() as name:
        for writer, reader in ((first, second), (second, first)):
            written, again = Path(name) / writer.name, Path(name) / f"{writer.name}.again"
            writer.save(case, written)
            pairs = reader.load(blank, written)
            same_pairs(pairs, case.pairs, f"{writer.name}'s file in {reader.name}")
            reader.save(case.but(pairs=pairs), again)
            one, two = ((f / TENSOR_FILE).read_bytes() for f in (written, again))
            said = [description(data) for data in (one, two)]
            for text in said:  # what a backend knows of its base, and what follows from it
                del text["base"], text["digest"]
            assert said[0] == said[1], f"what {writer.name} and {reader.name} say differs"
            tensors = [unpack(data) for data in (one, two)]
            assert [*tensors[0]] == [*tensors[1]], "the files' tensors have another order"
            for tensor, value in tensors[0].items():
                same_bits(tensors[1][tensor], value, tensor)

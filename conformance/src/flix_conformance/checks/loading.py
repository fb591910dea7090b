"""Features that come from files, into models that have others, the same ones, or ones that differ."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import flix
from flix_conformance import bits, oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.checks.files import TENSOR_FILE, description, unpack
from flix_conformance.checks.lifecycle import (
    NEW,
    case_of,
    check_state,
    removable,
    routed_to,
    without,
)
from flix_conformance.checks.outputs import check_output
from flix_conformance.checks.training import SETTINGS, check_trajectory
from flix_conformance.compare import close, same_bits, same_pairs
from flix_conformance.harness import Case
from flix_conformance.signatures import Signature
from flix_conformance.strategies import Draw
from flix_conformance.table import Feature, Table, written


def _donor(draw: Draw, case: Case, group: str) -> Case:
    """Another adapter of the same layer, with the new feature among others."""
    names = {group: ["first", NEW], "elsewhere": ["last"]}
    rank = draw.one_of([1, 2, 4])
    rule = {"alpha": draw.one_of([None, 3.0]), "scaling": draw.one_of(["lora", "rslora"])}
    config = flix.FlixConfig(
        registry=flix.FeatureRegistry(names), ranks=rank, target_modules=(case.path,), **rule
    )
    table = Table.of(names, **rule)
    rng = draw.generator()
    pairs = {
        feature: (
            rng.normal(size=(rank, case.d_in)).astype(np.float32),
            rng.normal(size=(case.d_out, rank)).astype(np.float32),
        )
        for feature in table.features
    }
    return case.but(config=config, table=table, pairs=pairs)


def _check_file(donor: Case, folder: Path, feature: Feature) -> None:
    """Hold a file of one feature to the format."""
    data = (folder / TENSOR_FILE).read_bytes()
    features = description(data)["config"]["registry"]["features"]
    assert features == [list(feature)], f"the file describes the features {features}"
    tensors = unpack(data)
    names = [f"{donor.path}.{part}.{feature[0]}.{feature[1]}" for part in "AB"]
    assert set(tensors) == set(names), f"the file holds {sorted(tensors)}, expected {names}"
    for name, value in zip(names, donor.pairs[feature], strict=True):
        same_bits(tensors[name], value, name)


def _loaded(backend: Backend, model: Any, donor: Case, new: Feature) -> Any:
    """The model with the donor's new feature, by way of a file of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        backend.save_features(backend.adapted(donor), folder, [new])
        _check_file(donor, folder, new)
        return backend.load_features(model, folder)


def _joined(case: Case, donor: Case, new: Feature) -> Table:
    """The features with the donor's, at the donor's scale."""
    return case.table.added(new, oracle.scale(donor, new))


@check(
    "a file of one feature loads into another model with equal values and outputs; the others stay, bit by bit",
    examples=6,
    uses=("files", "changes"),
)
def loaded_feature(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    group = draw.one_of(case.table.groups)
    donor, new = _donor(draw, case, group), (group, NEW)
    model = _loaded(backend, backend.adapted(case), donor, new)
    number = len(case.table)
    fresh = check_state(backend, model, case.table.added(new).ids, case.pairs, "after loading")
    same_pairs(fresh, {new: donor.pairs[new]}, "the loaded feature")
    grown = case.but(table=_joined(case, donor, new), pairs={**case.pairs, **fresh}, model=model)
    check_output(backend, routed_to(draw, grown, number))


@check(
    "what was loaded trains as the formula does, with all others or alone",
    examples=3,
    uses=("training", "files", "changes"),
)
def loaded_trains(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=2)
    group = draw.one_of(case.table.groups)
    donor, new = _donor(draw, case, group), (group, NEW)
    model = _loaded(backend, backend.adapted(case), donor, new)
    pairs = {**case.pairs, new: donor.pairs[new]}
    grown = case.but(table=_joined(case, donor, new), pairs=pairs, model=model)
    steps = []
    for batch in batches:
        given = case.but(ids=batch.ids, weights=batch.weights)
        routed = routed_to(draw, given, len(case.table))
        steps.append(replace(batch, ids=routed.ids, weights=routed.weights))
    found = backend.train(grown, steps, SETTINGS)["pairs"]
    check_trajectory(grown, found, oracle.train(grown.but(model=None), steps, SETTINGS), 1.0, steps)


@check("loading into an adapted model sets A and B of every feature", examples=4, uses=("files",))
def loaded_again(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    model = backend.adapted(case)
    with tempfile.TemporaryDirectory() as name:
        backend.verb("save")(model, Path(name) / "adapter")
        other = {f: (a + 1, b - 2) for f, (a, b) in case.pairs.items()}
        model = backend.primitives.write(model, {case.path: other})
        model = backend.verb("load")(model, Path(name) / "adapter")
    assert not check_state(backend, model, case.table.ids, case.pairs, "after loading again")
    check_output(backend, case.but(model=model))


@check(
    "a feature that both have, and that differs in A or in B, is refused by name, kept or replaced, as conflicts= says",
    examples=6,
    uses=("files", "changes"),
)
def conflicts(draw: Draw, backend: Backend) -> None:
    case, part = case_of(draw, backend), draw.one_of([1, 0])
    shared = draw.one_of(sorted(case.pairs))
    a, b = case.pairs[shared]
    theirs = (a + 1, b) if part == 0 else (a, b + 1)
    model = backend.adapted(case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        other = case.but(pairs={**case.pairs, shared: theirs})
        backend.save_features(backend.adapted(other), folder, [shared])
        load = backend.verb("load_features")
        try:
            load(model, folder, [shared])
        except ValueError as error:
            assert written(shared) in str(error), f"the message does not name it: {error}"
        else:
            raise AssertionError(f"{written(shared)} differs in {'AB'[part]} and was not refused")
        for what, pair in (("keep", (a, b)), ("replace", theirs)):
            model = load(model, folder, [shared], conflicts=what)
            wanted = {**case.pairs, shared: pair}
            check_state(backend, model, case.table.ids, wanted, f"after conflicts={what!r}")


@check(
    "after a feature was added, one renamed, one removed and one loaded, outputs and merging are the formula's",
    examples=4,
    uses=("merge", "files", "changes"),
)
def changed_merge(draw: Draw, backend: Backend) -> None:
    def fits(s: Signature) -> bool:
        # What is implied by "every feature of a group" is a question of two adapters' rules, not of this check.
        return bool(removable(s.table) and not s.table.implies)

    case = case_of(draw, backend, fits)
    group, rank = draw.one_of(case.table.groups), 2
    gone = draw.one_of(removable(case.table))
    origin = draw.one_of(case.table.names(group))
    model = backend.add_feature(backend.adapted(case), group, NEW, rank, [origin])
    model = backend.rename_feature(model, group, NEW, "renamed")
    model = backend.remove_feature(model, *gone)
    table = case.table.added((group, NEW)).renamed((group, NEW), "renamed").removed(gone)
    changed = case.but(table=table)
    donor, new = _donor(draw, case, group), (group, NEW)
    model = _loaded(backend, model, donor, new)
    count = len(case.table)
    pairs = backend.state(model)[1]
    table = _joined(changed, donor, new)
    changed = without(changed.but(table=table, pairs=pairs, model=model), case.table.ids[gone])
    check_output(backend, routed_to(draw, changed, draw.one_of([count, count + 1])))
    row = {group: draw.one_of(["renamed", {"renamed": 0.5, NEW: -2.0}])}
    active = {
        changed.table.features[i]: w for i, w in bits.active_features(changed.table, row).items()
    }
    kernel = np.asarray(backend.merge(changed, row), np.float64)
    size = oracle.merged(oracle.magnitude(changed), {f: abs(w) for f, w in active.items()})
    close(kernel, oracle.merged(changed, active), size, case.dtype, "the merged kernel")

"""Features that join, leave, get other names, and come from files: the others stay, and everything goes on working."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

import flix
from flix_conformance import bits, oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.checks.outputs import check_output
from flix_conformance.checks.training import SETTINGS, TRAJECTORY
from flix_conformance.compare import close, close_in_norm, same_bits, same_pairs
from flix_conformance.harness import Case, Pairs
from flix_conformance.signatures import Signature
from flix_conformance.strategies import Draw
from flix_conformance.table import Feature, Table, written

NEW = "joined: 新"


def removable(table: Table) -> list[Feature]:
    """Features that are not the last of their group."""
    return [f for f in table.live if len(table.names(f[0])) > 1]


def case_of(
    draw: Draw, backend: Backend, where: Callable[[Signature], Any] = lambda _: True
) -> Case:
    return draw.trainable(any_kind(draw, backend.kinds), 6, where)


def check_state(
    backend: Backend, model: Any, ids: dict[Feature, int], pairs: Pairs, what: str
) -> Pairs:
    """Hold ids and pairs of a changed model to the expected ones; features that none are given for are handed back."""
    found_ids, found = backend.state(model)
    assert found_ids == ids, f"{what}: the ids are {found_ids}, expected {ids}"
    others = {f: pair for f, pair in found.items() if f in pairs}
    same_pairs(others, pairs, what)
    return {f: pair for f, pair in found.items() if f not in pairs}


def routed_to(draw: Draw, case: Case, number: int) -> Case:
    """The case with a feature in one entry of every row."""
    entry = draw.integer(0, case.ids.shape[-1] - 1)
    ids, weights = case.ids.copy(), None if case.weights is None else case.weights.copy()
    ids[..., entry] = number
    if weights is not None:
        weights[..., entry] = draw.one_of([1.0, 0.5, -2.0])
    return case.but(ids=ids, weights=weights)


@check(
    "adding a feature keeps ids and values of the others, bit by bit; the new one starts with the defined bytes",
    examples=6,
    uses=("changes",),
)
def added_feature(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    told = {group for group, _ in case.table.alphas}  # the first choice is sure to be tried
    groups = sorted(case.table.groups, key=lambda group: group not in told)
    group, rank = draw.one_of(groups), draw.one_of([1, 3])
    model = backend.add_feature(backend.adapted(case), group, NEW, rank, ())
    new, number = (group, NEW), len(case.table)
    fresh = check_state(backend, model, case.table.added(new).ids, case.pairs, "after adding")
    like = (np.zeros((rank, case.d_in)), np.zeros((case.d_out, rank)))
    same_pairs(fresh, bits.initial_pairs(case.but(pairs={new: like})), "the new feature")
    a, b = fresh[new]
    taught = {new: (a, draw.generator().normal(size=b.shape).astype(np.float32))}
    model = backend.primitives.write(model, {case.path: taught})
    grown = case.but(table=case.table.added(new), pairs={**case.pairs, **taught}, model=model)
    check_output(backend, routed_to(draw, grown, number))


@check(
    "a feature that starts from others has the update nearest to their mean that its rank allows",
    examples=8,
    uses=("changes",),
)
def added_from_others(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    # Origins without an update come first: they count in the mean.
    groups = sorted(case.table.groups, key=lambda g: all((g, n) in case.pairs for n in case.table.names(g)))  # fmt: skip
    group, rank = draw.one_of(groups), draw.one_of([1, 2, 4])
    names = sorted(case.table.names(group), key=lambda name: (group, name) in case.pairs)
    origins = names[: draw.integer(min(2, len(names)), len(names))]
    full = min(case.d_in, case.d_out)
    stacked = sum(len(a) for (own, _), (a, _) in case.pairs.items() if own == group)
    if stacked > full + 1 and draw.one_of([False, True]):
        # The edge: more ranks than the layer's smaller side has dimensions, before and after.
        origins, rank = names, full + 1
    model = backend.add_feature(backend.adapted(case), group, NEW, rank, origins)
    new = (group, NEW)
    ids = case.table.added(new).ids
    a, b = check_state(backend, model, ids, case.pairs, "after adding")[new]
    assert (a.shape, b.shape) == ((rank, case.d_in), (case.d_out, rank)), (
        f"the new feature's shapes are {a.shape} and {b.shape}"
    )
    grown = case.but(table=case.table.added(new), pairs={new: (a, b)})
    mean, best = oracle.nearest(case, [(group, name) for name in origins], rank)
    update = oracle.scale(grown, new) * (b.astype(np.float64) @ a.astype(np.float64))
    assert a[~b.any(0)].any(1).all(), "ranks whose A and B are both 0 would never train"
    far = float(np.linalg.norm(update - mean))
    assert far <= best + 1e-5 * float(np.linalg.norm(mean)), (
        f"the new update is {far:.6g} away from the mean of {list(origins)}; rank {rank} can be {best:.6g} near"
    )


@check(
    "training after a feature was added moves the new one as the formula does, and no other by a bit",
    examples=4,
    uses=("training", "changes"),
)
def added_trains_alone(draw: Draw, backend: Backend) -> None:
    case, batches = draw.run(any_kind(draw, backend.kinds), steps=3)
    group, rank = draw.one_of(case.table.groups), draw.one_of([1, 3])
    origins = draw.one_of([(), case.table.names(group)])
    model = backend.add_feature(backend.adapted(case), group, NEW, rank, origins)
    new, number = (group, NEW), len(case.table)
    pair = backend.state(model)[1][new]
    grown = case.but(table=case.table.added(new), pairs={**case.pairs, new: pair}, model=model)
    steps = []
    for batch in batches:
        given = case.but(ids=batch.ids, weights=batch.weights)
        routed = routed_to(draw, given, number) if (batch.ids >= 0).any() else given
        steps.append(replace(batch, ids=routed.ids, weights=routed.weights))
    frozen, run, clear = set(case.pairs), oracle.Run([grown.but(model=None)], SETTINGS), True
    found = backend.train(grown, steps, SETTINGS)["pairs"]
    assert len(found) == len(steps), f"{len(found)} steps were reported, not {len(steps)}"
    for step, (actual, batch) in enumerate(zip(found, steps, strict=True)):
        clear = clear and oracle.clear(run.layers[0], batch, frozen)
        [wanted] = run.step(batch, frozen)
        for feature, before in case.pairs.items():
            for part in (0, 1):
                label = f"{'AB'[part]} of {written(feature)}, which is frozen, at step {step}"
                same_bits(actual[feature][part], before[part], label)
        for part in (0, 1) if clear else ():  # else it follows rounding from here on
            label = f"{'AB'[part]} of the new feature after step {step}"
            value = np.asarray(wanted[new][part], np.float64)
            close_in_norm(actual[new][part], value, pair[part], TRAJECTORY, label)


def without(case: Case, number: int) -> Case:
    return case.but(ids=np.where(case.ids == number, -1, case.ids).astype(np.int32))


@check(
    "removing a feature keeps ids and values of the others, bit by bit; outputs are those without it",
    examples=6,
    uses=("changes",),
)
def removed_feature(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend, lambda s: removable(s.table))
    gone = draw.one_of(removable(case.table))
    model = backend.remove_feature(backend.adapted(case), *gone)
    number = case.table.ids[gone]
    left = {f: pair for f, pair in case.pairs.items() if f != gone}
    surplus = check_state(backend, model, case.table.removed(gone).ids, left, "after removing")
    assert not surplus, f"{sorted(surplus)} is still there"
    check_output(backend, without(case, number).but(table=case.table.removed(gone), model=model))


@check(
    "routing that names a removed feature is refused by name, and never served",
    examples=4,
    uses=("changes",),
)
def removed_refused(draw: Draw, backend: Backend) -> None:
    def fits(s: Signature) -> bool:
        return bool(s.filled and removable(s.table))

    case = case_of(draw, backend, fits).for_any_rows()
    gone = draw.one_of(removable(case.table))
    number = case.table.ids[gone]
    before = model = backend.adapted(case)
    early: Any = None
    if not backend.lacks(["compiled_forward"]):
        early = backend.harness.compiled_forward(model)
        early(case.batch)
    model = backend.remove_feature(model, *gone)
    good = without(case, number).but(model=model, table=case.table.removed(gone))
    named = good.but(ids=good.ids.copy())
    place = tuple(draw.integer(0, size - 1) for size in named.ids.shape)
    named.ids[place] = number
    error = backend.refuse(named)
    assert isinstance(error, ValueError), f"routing to a removed feature: {error!r}"
    assert written(gone) in str(error), f"the message does not name {written(gone)}: {error}"
    ways: list[Callable[[Any], Any]] = [lambda batch: backend.harness.call(model, batch)]
    if not backend.lacks(["compiled_forward"]):
        ways.append(backend.harness.compiled_forward(model))
    if early is not None and model is before:
        with suppress(Exception):  # what was compiled before the change may refuse to go on
            early(good.batch)
            ways.append(early)
    size = oracle.forward(oracle.magnitude(good))
    for call in ways:
        y = call(good.batch)[0]  # what is refused is the id, not the call
        close(y, oracle.forward(good), size, case.dtype, "the output without it", slack=2.0)
        try:
            y = np.asarray(call(named.batch)[0], np.float64)
        except Exception:
            continue
        assert np.isnan(y[place[:-1]]).all(), (
            f"row {place[0]} names a removed feature and was served"
        )


@check(
    "renaming a feature keeps every id and value, bit by bit, and the outputs",
    examples=6,
    uses=("changes",),
)
def renamed_feature(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    old = draw.one_of([*case.pairs, *(f for f in case.table.features if f not in case.pairs)])
    model = backend.rename_feature(backend.adapted(case), old[0], old[1], NEW)

    def renamed(values: dict[Feature, Any]) -> dict[Feature, Any]:
        return {(f[0], NEW) if f == old else f: value for f, value in values.items()}

    table, pairs = case.table.renamed(old, NEW), renamed(case.pairs)
    surplus = check_state(backend, model, table.ids, pairs, "after renaming")
    assert not surplus, f"{sorted(surplus)} appeared"
    number = case.table.ids[old]
    check_output(backend, routed_to(draw, case.but(table=table, pairs=pairs, model=model), number))


@check(
    "after a feature was added, one renamed and one removed, rows become ids by the same rules as before",
    examples=8,
    uses=("changes",),
    core="encode",
)
def changed_encoding(draw: Draw, backend: Backend) -> None:
    def fits(s: Signature) -> bool:
        return bool(s.table.implies and removable(s.table))

    case = draw.trainable("linear", 24, fits)
    group, table = draw.one_of(case.table.groups), case.table
    old, gone = draw.one_of(table.live), draw.one_of(removable(table))
    model = backend.add_feature(backend.adapted(case), group, NEW, 1, ())
    model = backend.rename_feature(model, old[0], old[1], "renamed")
    table = table.added((group, NEW)).renamed(old, "renamed")
    gone = (old[0], "renamed") if gone == old else gone
    model, table = backend.remove_feature(model, gone[0], gone[1]), table.removed(gone)
    rows = [*draw.rows(table, 3), *({group: name} for group, name in table.live)]
    expected = [bits.active_features(table, row) for row in rows]
    ids, weights = backend.encode(backend.primitives.adapted(model), rows)
    for row, found, wanted in zip(rows, bits.by_row(ids, weights), expected, strict=True):
        assert found == {i: np.float32(w) for i, w in wanted.items()}, (
            f"{row} became {found}, expected {wanted}"
        )


@check(
    "changes leave everything else that the configuration says: dropout, fallbacks, targets, scaling, seed",
    examples=6,
    uses=("changes",),
)
def changed_settings(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend, lambda s: removable(s.table))
    group, old = draw.one_of(case.table.groups), draw.one_of(case.table.live)
    gone = draw.one_of([f for f in removable(case.table) if f[1] != old[1]] or [None])
    rates = {group: draw.one_of([0.0, 0.5])}
    dropout = {"p": 0.25, "per_group": rates, "keep_one": draw.one_of([True, False]), "rescale": True}  # fmt: skip
    told = {
        "feature_dropout": flix.FeatureDropout(**dropout),
        "unknown": draw.one_of(["skip", "mean", {"elsewhere": [old[1]]}]),
        "exclude_modules": ("nothing",),
    }
    alike = any(f != old and f[1] == old[1] for f in case.table.live)
    wanted = {**dropout, "unknown": told["unknown"], "exclude_modules": ["nothing"]}
    if isinstance(told["unknown"], dict) and not alike:
        wanted["unknown"] = {"elsewhere": ["renamed"]}
    model = backend.adapted(case.but(config=replace(case.config, **told)))
    model = backend.add_feature(model, group, NEW, 1, ())
    model = backend.rename_feature(model, old[0], old[1], "renamed")
    if gone is not None:
        model = backend.remove_feature(model, gone[0], gone[1])
    found = backend.primitives.adapted(model).to_dict()
    for name in ("target_modules", "scaling", "seed"):
        now, before = found[name], case.config.to_dict()[name]
        assert now == before, f"{name} is {now!r} after changes, and was {before!r}"
    found |= found["feature_dropout"] or {}
    for name, value in wanted.items():
        if name == "unknown" and alike and isinstance(value, dict):
            continue  # a name that several features have
        assert found.get(name) == value, (
            f"{name} is {found.get(name)!r} after changes, expected {value!r}"
        )

"""Bad input is refused with an error that names what is wrong, and is never served in silence."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from flix_conformance import bits
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import any_kind, check
from flix_conformance.harness import Array, Case
from flix_conformance.strategies import Draw
from flix_conformance.table import written


def _with(array: Array, place: tuple[int, ...], value: Any) -> Array:
    changed = array.copy()
    changed[place] = value
    return changed


def _place(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(draw.integer(0, size - 1) for size in shape)


def _filled(draw: Draw, backend: Backend) -> Case:
    kind = any_kind(draw, backend.kinds)
    case = draw.case(kind=kind, where=lambda s: s.filled)
    return case.for_any_rows()


def malformed(draw: Draw, case: Case) -> list[tuple[str, Case, str]]:
    """(what is wrong, the case, a pattern for the message) for each kind of malformed routing."""
    ids, weights = case.ids, case.weights
    assert weights is not None
    place = _place(draw, ids.shape)
    row, count = place[0], len(case.table)
    feature = draw.integer(0, count - 1)
    named = rf"row {row}\b.*{re.escape(written(case.table.features[feature]))}"
    odd = draw.one_of([np.nan, np.inf, -np.inf])
    longer = np.concatenate([ids, ids[:1]])
    found = [
        ("an id of no feature", case.but(ids=_with(ids, place, count)), rf"{count}.*row {row}\b"),
        ("an id below -1", case.but(ids=_with(ids, place, -2)), rf"-2.*row {row}\b"),
        (
            "an id that 32 bits would take for another",
            case.but(ids=_with(ids.astype(np.int64), place, 2**32 + feature)),
            rf"{2**32 + feature}.*row {row}\b",
        ),
        ("ids that are not integers", case.but(ids=ids.astype(np.float32)), "float32"),
        ("ids of one dimension", case.but(ids=ids.ravel()), rf"\[{ids.size}\]|\({ids.size},\)"),
        (
            "one row of ids too many",
            case.but(ids=longer, weights=np.concatenate([weights, weights[:1]])),
            rf"{len(longer)}.*{len(ids)}|{len(ids)}.*{len(longer)}",
        ),
        ("weights of another shape", case.but(weights=weights[..., :0]), r"flix_weights|weights"),
        (
            "a weight that is not finite",
            case.but(ids=_with(ids, place, feature), weights=_with(weights, place, odd)),
            named,
        ),
        (
            "a weight beyond float32",
            case.but(
                ids=_with(ids, place, feature),
                weights=_with(weights.astype(np.float64), place, -1e39),
            ),
            named,
        ),
        ("weights that are not floats", case.but(weights=weights.astype(np.int32)), "int32"),
    ]
    if ids.ndim == 3:  # by token
        more = [np.concatenate([array, array[:, :1]], 1) for array in (ids, weights)]
        length = ids.shape[1]
        bad = case.but(ids=more[0], weights=more[1])
        pattern = rf"\b{length}\b.*\b{length + 1}\b|\b{length + 1}\b.*\b{length}\b"
        found.append(("ids of one position too many", bad, pattern))
    return found


@check("malformed routing is refused with an error that names the row or the feature", examples=8)
def routing_refused(draw: Draw, backend: Backend) -> None:
    case = _filled(draw, backend)
    for what, bad, pattern in malformed(draw, case):
        error = backend.refuse(bad)
        assert error is not None, f"{what}: not refused"
        assert isinstance(error, ValueError), f"{what}: refused by {type(error).__name__}: {error}"
        assert re.search(pattern, str(error), re.DOTALL), (
            f"{what}: the message does not name it ({pattern}): {error}"
        )


@check("a row with an id of no feature is an error or NaN, never a finite output", examples=12)
def unknown_ids(draw: Draw, backend: Backend) -> None:
    case = _filled(draw, backend)
    place = _place(draw, case.ids.shape)
    number = draw.one_of([len(case.table), len(case.table) + 7, -2])
    bad = case.but(ids=_with(case.ids, place, number))
    try:
        y = np.asarray(backend.forward(bad)[0], np.float64)
    except Exception:
        return
    assert np.isnan(y[place[:-1]]).all(), (
        f"the id {number} in row {place[0]} of {len(case.table)} features gave a finite output"
    )


@check(
    "rows become ids and weights by the rules: names add up, what is implied acts once",
    examples=40,
    core="encode",
)
def encoding(draw: Draw, backend: Backend) -> None:
    case = draw.case()
    rows = draw.rows(case.table, draw.integer(0, 4))
    expected = [bits.active_features(case.table, row) for row in rows]
    width = draw.one_of([None, max([1, *map(len, expected)]) + 1])
    ids, weights = backend.encode(case.config, rows, width=width)
    assert ids.dtype == np.int32, f"ids are {ids.dtype}"
    assert weights.dtype == np.float32, f"weights are {weights.dtype}"
    assert ids.shape == weights.shape, f"ids {ids.shape} and weights {weights.shape} differ"
    assert len(ids) == len(rows), f"{len(ids)} rows came of {len(rows)}"
    if width is not None:
        assert ids.shape[-1] == width, f"the width is {ids.shape[-1]}, not {width}"
    assert not weights[ids < 0].any(), "padding has a weight"
    for number, (found, wanted) in enumerate(zip(bits.by_row(ids, weights), expected, strict=True)):
        assert set(found) == set(wanted), f"row {number}: ids {sorted(found)}, not {sorted(wanted)}"
        for i, weight in wanted.items():
            assert abs(found[i] - weight) <= 1e-6 * max(1.0, abs(weight)), (
                f"row {number}: weight {found[i]} of id {i}, not {weight}"
            )


@check(
    "a row that names an unknown feature or group is refused by name, and skipped only if that was asked for",
    core="encode",
)
def names_refused(draw: Draw, backend: Backend) -> None:
    case = draw.case()
    table = case.table
    rows = draw.rows(table, 3)
    number = draw.integer(0, 2)
    group = draw.one_of(table.groups)
    bad = [
        ({group: "no such feature"}, [f"row {number}", group, "no such feature"]),
        ({"no such group": "x"}, [f"row {number}", "no such group"]),
        ({group: {table.names(group)[0]: float("nan")}}, [f"row {number}"]),
        ({group: 3}, [f"row {number}", group]),
    ]
    for row, named in bad:
        given = [*rows[:number], row, *rows[number + 1 :]]
        try:
            backend.encode(case.config, given, unknown="error")
        except ValueError as error:
            for part in named:
                assert part in str(error), f"{row!r}: the message does not name {part!r}: {error}"
        else:
            raise AssertionError(f"{row!r} was encoded without an error")
    known = table.names(group)[0]
    ids, weights = backend.encode(
        case.config, [{group: [known, "no such feature"]}], unknown="skip"
    )
    wanted = bits.active_features(table, {group: known})
    assert set(bits.by_row(ids, weights)[0]) == set(wanted), "skipping skipped something else too"


@check(
    'under "mean" an unknown name has an equal share in its group and implies nothing; group weights act on what is implied, too',
    examples=16,
    core="encode",
)
def shares(draw: Draw, backend: Backend) -> None:
    case = draw.trainable("linear", 16)
    table, group = case.table, draw.one_of(case.table.groups)
    known, count = draw.one_of(table.names(group)), len(table.names(group))
    wanted = bits.active_features(table, {group: known})
    for name in table.names(group):
        number = table.ids[group, name]
        wanted[number] = wanted.get(number, 0.0) + 1 / count
    row = {group: [known, "no such feature"]}
    _check_row(backend.encode(case.config, [row], unknown="mean"), wanted, f"{row} under 'mean'")
    (row,) = draw.rows(table, 1, full=True)
    factors = {group: draw.one_of([0.5, -2.0]), table.groups[-1]: 0.25}
    wanted = {
        i: weight * factors.get(table.features[i][0], 1.0)
        for i, weight in bits.active_features(table, row).items()
    }
    found = backend.encode(case.config, [row], group_weights=factors)
    _check_row(found, wanted, f"{row} with the group weights {factors}")


@check(
    "an unknown name acts as what it falls back to, in equal shares, and implies what that implies",
    examples=12,
    core="encode",
)
def fallbacks(draw: Draw, backend: Backend) -> None:
    table = (case := draw.trainable("linear", 16)).table
    says = {group for group, _ in table.implies}
    group = draw.one_of(sorted(table.groups, key=lambda group: group not in says))
    names = table.names(group)
    known = names[: draw.integer(1, len(names))]
    one = len(known) == 1 and draw.one_of([True, False])
    weight = draw.one_of([1.0, 0.5, -2.0])
    wanted = bits.active_features(table, {group: {n: weight / len(known) for n in known}})
    told, row = {"elsewhere": known[0] if one else list(known)}, {group: {"elsewhere": weight}}
    _check_row(backend.encode(case.config, [row], unknown=told), wanted, f"{row} under {told}")


def _check_row(found: tuple[Array, Array], wanted: dict[int, float], what: str) -> None:
    (row,) = bits.by_row(*found)
    assert row.keys() == wanted.keys(), f"{what}: ids {sorted(row)}, not {sorted(wanted)}"
    for i, weight in wanted.items():
        assert abs(row[i] - weight) <= 1e-6 * max(1.0, abs(weight)), (
            f"{what}: weight {row[i]} of id {i}, not {weight}"
        )

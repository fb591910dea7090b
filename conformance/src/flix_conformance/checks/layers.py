"""Models of several layers with names that resemble each other, and layers of other forms than the plainest."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import flix
from flix_conformance import bits, oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import check
from flix_conformance.checks.gradients import output_gradient
from flix_conformance.checks.sizes import check_all
from flix_conformance.checks.training import SETTINGS, check_trajectory
from flix_conformance.compare import close, same_bits, same_pairs
from flix_conformance.harness import Array, Batch, Case, Pairs
from flix_conformance.signatures import wide
from flix_conformance.strategies import Draw
from flix_conformance.table import Table, written

_PATHS = ("a.q", "a.q2", "a.b.q", "xa.q", "b.q")
_NAMES = {"language": ["hau", "swa"], "task": ["ner", "pos"]}
_ROW = {"language": "swa", "task": {"ner": 0.5, "pos": -2.0}}
_SIZE = 4
# target_modules, exclude_modules, and what they choose: suffixes of whole names, expressions for whole paths.
_TARGETS: tuple[tuple[Any, Any, set[str]], ...] = (
    (["a.q"], (), {"a.q"}),
    (["q"], (), {"a.q", "a.b.q", "xa.q", "b.q"}),
    (["b.q", "q2"], (), {"a.b.q", "b.q", "a.q2"}),
    (r"a\.q.?", (), {"a.q", "a.q2"}),
    (r".*b\.q", (), {"a.b.q", "b.q"}),
    ("all-linear", ["a.q", "q2"], {"a.b.q", "xa.q", "b.q"}),
    (["q", "q2"], r"a\..*", {"xa.q", "b.q"}),
)
# Ranks by expressions for the last names of a path, of which the first one that fits counts; and what they come to.
_RANKS: tuple[tuple[dict[str, int], dict[str, int]], ...] = (
    ({r"a\.q": 2, "q": 3, ".*": 4}, {"a.q": 2, "a.q2": 4, "a.b.q": 3, "xa.q": 3, "b.q": 3}),
    ({"q": 3, r"a\.q": 2, r"a\..*": 0}, {"a.q": 3, "a.q2": 0, "a.b.q": 3, "xa.q": 3, "b.q": 3}),
    ({r"b\.q": 2, r"x?a\.q": 3}, {"a.q": 3, "a.q2": 1, "a.b.q": 2, "xa.q": 3, "b.q": 2}),
)
# The same for alphas; 3 is what all others have.
_ALPHAS: tuple[tuple[dict[str, float], dict[str, float]], ...] = (
    ({r"a\.q": 1.5, "q": 6.0}, {"a.q": 1.5, "a.b.q": 6.0, "xa.q": 6.0, "b.q": 6.0}),
    ({"q2": 0.5, "q": 2.0, r"b\.q": 7.0}, {"a.q2": 0.5, "a.q": 2.0, "a.b.q": 2.0, "xa.q": 2.0, "b.q": 2.0}),
    ({r"xa?\.q": 5.0}, {"xa.q": 5.0}),
)  # fmt: skip


def _layers(
    draw: Draw,
    targets: Any,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    **settings: Any,
) -> tuple[list[Case], Table]:
    """The layers' cases, in order, each with its own table of alphas; those without a rank have no pairs."""
    rules: dict[str, Any] = {"alpha": 3.0, "seed": 5}
    config = flix.FlixConfig(
        registry=flix.FeatureRegistry(_NAMES), ranks=1, target_modules=targets, **rules, **settings
    )
    table, rng = Table.of(_NAMES, **rules), draw.generator()
    strategy, _ = draw.of_turn(draw.ways("float32"))
    ids = rng.permuted(np.tile(np.arange(4, dtype=np.int32), (3, 1)), axis=1)[:, :2]
    weights = rng.choice([1.0, -0.5, 2.0], ids.shape).astype(np.float32)
    if strategy == "single":
        ids, weights = ids[[0, 0, 0]], weights[[0, 0, 0]]

    def values(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32)

    def pairs(rank: int) -> Pairs:
        made = {f: (values(rank, _SIZE), values(_SIZE, rank)) for f in table.features}
        return made if rank else {}

    x = values(3, 2, _SIZE)
    cases = [
        Case(
            config=config,
            table=replace(table, alpha=alphas.get(path, table.alpha)),
            path=path,
            kind="linear",
            kernel=values(_SIZE, _SIZE),
            bias=values(_SIZE) if place % 2 else None,
            pairs=pairs(ranks.get(path, 0)),
            x=x,
            ids=ids,
            weights=weights,
            dtype="float32",
            strategy=strategy,
        )
        for place, path in enumerate(_PATHS)
    ]
    return cases, table


def _adapted(backend: Backend, cases: Sequence[Case]) -> Any:
    first = cases[0]
    plain = backend.harness.plain([case.layer for case in cases], first.x)
    return backend.verb("adapt")(plain, first.config, strategy=first.strategy)


def _read(backend: Backend, model: Any) -> dict[str, Pairs]:
    return {
        path: {f: (np.array(a), np.array(b)) for f, (a, b) in pairs.items()}
        for path, pairs in backend.primitives.read(model).items()
    }


def _check_output(backend: Backend, model: Any, cases: Sequence[Case], what: str) -> None:
    y, size = cases[0].x, cases[0].x
    for case in cases:
        size = oracle.forward(oracle.magnitude(case.but(x=size)))
        y = oracle.forward(case.but(x=y))
    close(backend.harness.call(model, cases[0].batch)[0], y, size, "float32", what, 2.0)


@check(
    "patterns of targets choose layers by whole names; the first pattern of ranks, and of alphas, that fits counts; each layer starts and acts by its own path",
    examples=7,
    needs=("nested",),
)
def patterns(draw: Draw, backend: Backend) -> None:
    targets, excluded, chosen = draw.of_turn(_TARGETS)
    pattern, ranks = draw.one_of(_RANKS)
    ranks = {path: rank for path, rank in ranks.items() if path in chosen}
    features = [(group, name) for group, names in _NAMES.items() for name in names]
    given = {key: dict.fromkeys(features, rank) for key, rank in pattern.items()}
    scaled, alphas = draw.one_of(_ALPHAS)
    said = {"exclude_modules": excluded, "rank_pattern": given, "alpha_pattern": scaled}
    cases, _ = _layers(draw, targets, ranks, alphas, **said)
    model = _adapted(backend, cases)
    found = _read(backend, model)
    assert set(found) == chosen, f"{targets!r} without {excluded!r} chose {sorted(found)}"
    for case in cases:
        if case.path in chosen:
            what = f"initial values of {case.path} under {pattern}"
            same_pairs(found[case.path], bits.initial_pairs(case), what)
    given_pairs = {case.path: case.pairs for case in cases if case.pairs}
    model = backend.primitives.write(model, given_pairs)
    _check_output(backend, model, cases, f"the output of several layers under alphas {scaled}")


@check(
    "several layers train together, are written and read, and merge, each by its own path",
    examples=1,
    needs=("nested",),
    uses=("training", "files", "merge"),
)
def several_layers(draw: Draw, backend: Backend) -> None:
    scaled, alphas = _ALPHAS[0]
    given = dict(zip(_PATHS, (1, 2, 3, 2, 1), strict=True))
    cases, table = _layers(draw, ["q", "q2"], given, alphas)
    ranks = {
        c.path.replace(".", r"\."): {f: len(a) for f, (a, _) in c.pairs.items()} for c in cases
    }
    config = replace(cases[0].config, rank_pattern=ranks, alpha_pattern=scaled)
    cases = [case.but(config=config) for case in cases]
    model = backend.primitives.write(_adapted(backend, cases), {c.path: c.pairs for c in cases})
    step, run = backend.harness.trainer(model, SETTINGS), oracle.Run(cases, SETTINGS)
    target = draw.generator().normal(size=cases[0].x.shape).astype(np.float32)
    batch = Batch(cases[0].x, cases[0].ids, cases[0].weights, "float32", target)
    for _ in range(4):
        step(batch)
        expected = run.step(batch)
    found = _read(backend, model)
    listed = oracle.listed(cases[0], batch.ids)
    for case, wanted in zip(cases, expected, strict=True):
        check_trajectory(case, [found[case.path]], [wanted], 5.0)
        for feature in set(case.pairs) - set(listed):
            for part in (0, 1):
                what = f"{'AB'[part]} of {written(feature)} in {case.path}, absent,"
                same_bits(found[case.path][feature][part], case.pairs[feature][part], what)
    cases = [case.but(pairs=found[case.path]) for case in cases]
    plain = backend.harness.plain([case.layer for case in cases], cases[0].x)
    with tempfile.TemporaryDirectory() as name:
        backend.verb("save")(model, Path(name) / "adapter")
        loaded = backend.verb("load")(plain, Path(name) / "adapter")
    for path, pairs in _read(backend, loaded).items():
        same_pairs(pairs, found[path], f"{path}, after loading")
    _check_output(backend, loaded, cases, "the output after loading")
    ids = bits.active_features(table, _ROW)
    active = {table.features[i]: w for i, w in ids.items()}
    merged = backend.verb("merge")(model, _ROW)
    for case in cases:
        size = oracle.merged(oracle.magnitude(case), {f: abs(w) for f, w in active.items()})
        kernel = backend.harness.kernel(merged, case.path)
        close(kernel, oracle.merged(case, active), size, "float32", f"{case.path}'s merged kernel")


@check(
    "layers whose kernels stand the other way, or have several axes, start, act, learn, merge, and go by the same files",
    examples=6,
    needs=("forms",),
    uses=("gradients", "files", "merge"),
)
def forms(draw: Draw, backend: Backend) -> None:
    way = draw.one_of(draw.ways("float32"))
    form = draw.of_turn(backend.harness.forms)
    d_in, d_out = draw.one_of([(8, 8), (4, 6), (6, 4)])
    small = replace(wide("linear", d_in), d_out=d_out, lead=(3,), bias=True)
    case = draw.fill(small, way).but(form=form)
    if case.strategy == "single":
        case = case.but(
            ids=np.array([[0, 2], [0, 2]], np.int32), weights=np.ones((2, 2), np.float32)
        )
    else:
        case = case.but(ids=np.array([[0, 2], [2, -1]], np.int32))
    plain = backend.plain(case)
    made = np.asarray(backend.harness.kernel(plain, case.path)).astype(np.float32)
    same_bits(made, case.kernel, "the kernel")
    same_pairs(backend.initial(case), bits.initial_pairs(case), "initial values")
    check_all(backend, case, output_gradient(draw, case))
    if draw.turn < 3 and not backend.lacks(["compiled_forward"]):
        model = backend.adapted(case)
        y, _ = backend.harness.compiled_forward(model)(case.batch)
        size = oracle.forward(oracle.magnitude(case))
        close(y, oracle.forward(case), size, "float32", "the output, compiled,")
    active = {("language", "hau"): 1.0, ("task", "ner"): 0.5}
    kernel = backend.merge(case, {"language": "hau", "task": {"ner": 0.5}})
    size = oracle.merged(oracle.magnitude(case), active)
    close(kernel, oracle.merged(case, active), size, "float32", "the merged kernel")
    for here, there in ((case, case.but(form="")), (case.but(form=""), case)):
        with tempfile.TemporaryDirectory() as name:
            backend.save(here, Path(name) / "adapter")
            found = backend.load(there, Path(name) / "adapter")
        what = f"a file of form {here.form!r}, in form {there.form!r},"
        same_pairs(found, case.pairs, what)

"""The kit catches every mutant; every check catches one; the table in the documentation says which."""

from __future__ import annotations

import pytest
import write_docs
from flix_conformance import Backend, runner
from flix_conformance.checks import CHECKS
from flix_numpy.conformance import Harness
from mutants import MUTANTS, Mutant
from mutants._registry import AnyWay, SeveralWays, made, optional
from mutants.ways import broken_in


def table() -> str:
    """The table of mutants, each with the check that catches it, in the order of the report."""
    order = list(CHECKS)
    rows = [
        f"| {mutant.name} | `{mutant.check}` |"
        for mutant in sorted(MUTANTS, key=lambda m: order.index(m.check))
    ]
    return "\n".join(["| mutant | caught by |", "|---|---|", *rows])


def example() -> Backend:
    """The example backend."""
    return made("numpy")


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if not check.pair])
def test_the_example_backend_passes(name: str) -> None:
    runner.run(name, made("numpy", *optional(name)))


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.pair])
def test_the_example_backend_agrees_with_itself(name: str) -> None:
    runner.run(name, example(), made("numpy again"))


class InFloat64(Harness):
    """The example's, all in float64, whose tolerance forgives no rounding of the kit's own."""

    dtypes = ("float64",)


@pytest.mark.parametrize(
    "name", [n for n, c in CHECKS.items() if c.run.__module__.endswith("laws")]
)
def test_the_laws_hold_to_the_last_bits_of_float64(name: str) -> None:
    runner.run(name, made("numpy", InFloat64))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.part.__name__)
def test_caught(mutant: Mutant) -> None:
    """By its check, and because the rule is broken, not because the mutant crashes."""
    backends = [mutant.backend()]
    if CHECKS[mutant.check].pair:
        backends.insert(0, example())
    with pytest.raises(AssertionError):
        runner.run(mutant.check, *backends)


def test_quick_catches_most_of_them() -> None:
    """It is for the time in which a backend is being written: most mistakes, in a fifth of the time."""
    seen = 0
    for mutant in MUTANTS:
        pair = [example()] if CHECKS[mutant.check].pair else []
        try:
            runner.run(mutant.check, *pair, mutant.backend(), profile="quick")
        except AssertionError:
            seen += 1
    assert seen >= 0.85 * len(MUTANTS), f"{seen} of {len(MUTANTS)}"


def test_training_that_goes_wrong_says_what_its_steps_list() -> None:
    (mutant,) = (m for m in MUTANTS if m.name == "adds decay to the gradient (Adam with L2)")
    with pytest.raises(
        AssertionError, match=r"\(listed at steps \[.*\]; step \d+ lists .*=.*\) is off"
    ):
        runner.run("trajectory", mutant.backend())


WAYS = [(way, dtype) for way in SeveralWays.strategies for dtype in SeveralWays.dtypes]


@pytest.mark.parametrize(("strategy", "dtype"), WAYS)
@pytest.mark.parametrize(
    "name", ["forward", "gradient_x", "gradient_a", "gradient_b", "gradient_weights"]
)
def test_every_strategy_is_tried_in_every_dtype(name: str, strategy: str, dtype: str) -> None:
    with pytest.raises(AssertionError):
        runner.run(name, made("mutant", broken_in(strategy, dtype), AnyWay, SeveralWays))


@pytest.mark.parametrize("strategy", SeveralWays.strategies)
@pytest.mark.parametrize(
    "name",
    [
        "merge",
        "trajectory",
        "added_feature",
        "removed_feature",
        "renamed_feature",
        "loaded_feature",
        "changed_merge",
    ],
)
def test_training_and_changes_are_tried_in_every_strategy(name: str, strategy: str) -> None:
    with pytest.raises(AssertionError):
        runner.run(name, made("mutant", broken_in(strategy, "float32"), AnyWay, SeveralWays))


def test_every_check_catches_a_mutant() -> None:
    assert len(MUTANTS) >= 75
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("part", write_docs.parts(), ids="-".join)
def test_the_documentation_is_up_to_date(part: tuple[str, str]) -> None:
    """``python conformance/tests/write_docs.py`` writes it."""
    assert write_docs.shown(*part) == write_docs.parts()[part]


def test_the_example_is_as_short_as_the_page_says() -> None:
    """Docstrings and blank lines included."""
    for name, most in (("__init__.py", 150), ("conformance.py", 65)):
        assert len((write_docs.EXAMPLE / name).read_text(encoding="utf-8").splitlines()) <= most

"""Is one arm better than another, and by how much? A paired bootstrap over cells, items and seeds. Pure numpy.

Two arms answer the same items of the same cells. They were trained with the same seeds, which fix the order of their
batches. Three things could have been different: the cells (other languages and tasks might have been held out), the
items, and the seeds. So each draw takes new cells, new items within them and new seeds, the same ones for both arms.
The figure is the difference of the arms, averaged first over items and seeds and then over cells: each cell counts
once, however many items it has.

* A draw takes n - 1 of n cells with replacement, and the same for seeds. This estimates the variance of a mean of n
  values without bias, even for small n (Rao and Wu, Resampling inference with complex survey data, 1988, section 2).
* Seeds are drawn for all cells together, because a run with a bad start is bad in all cells (the pigeonhole bootstrap:
  Owen, The pigeonhole bootstrap, 2007). This, and drawing items within drawn cells, makes intervals too wide rather
  than too narrow.
* p is the two-sided p value of "no difference". It is the share of draws that are at least as far from the figure as
  the figure is from 0, where the figure itself counts as one draw (Davison and Hinkley, Bootstrap methods, 1997,
  section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import listed
from flix.report.reading import Part
from flix.study.evidence import NAMES, ArmScores, CellScore, EvidenceError, Study

DRAWS = 10_000
LEVEL = 0.01
Table = NDArray[np.float64]
"""The values of one cell: float64 ``[seeds, items]``, in points."""


@dataclass(frozen=True)
class Estimate:
    """A figure and how certain it is.

    Attributes:
        value: the mean over cells, in points.
        low, high: its 95 % interval.
        p: the two-sided p value of "it is 0".
        cells, items, seeds: how many there are.
        metric: the name of the score.
    """

    value: float
    low: float
    high: float
    p: float
    cells: int
    items: int
    seeds: int
    metric: str = ""


def estimate(tables: Sequence[Table], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean over cells, its interval and its p value.

    Args:
        tables: for each cell, its values ``[seeds, items]``: differences of two arms, or values of one arm.
        draws: how many draws the bootstrap takes.
        seed: the seed of the draws.

    Raises:
        EvidenceError: no cell, a cell without items, or cells with different numbers of seeds.
    """
    if not tables or not all(table.ndim == 2 and table.size for table in tables):
        raise EvidenceError("a bootstrap needs at least one cell, and items in each")
    if len(seeds := {len(table) for table in tables}) > 1:
        raise EvidenceError(f"every cell needs the same number of seeds, got {sorted(seeds)}")
    value = float(np.mean([table.mean() for table in tables]))
    drawn = resampled(tables, draws, np.random.default_rng(seed))
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    far = np.abs(drawn - value) >= abs(value) - 1e-9
    p = (1 + int(far.sum())) / (1 + draws)
    items = sum(table.shape[1] for table in tables)
    return Estimate(value, low, high, p, len(tables), items, len(tables[0]))


def resampled(tables: Sequence[Table], draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The mean over cells in each draw of cells, items and seeds: float64 ``[draws]``."""
    seeds = _shares(len(tables[0]), draws, rng)
    cells = _shares(len(tables), draws, rng)
    total = np.zeros(draws)
    for place, table in enumerate(tables):
        # Items that are alike in all seeds are drawn as one: fewer things to draw, the same distribution.
        kinds, counts = np.unique(table, axis=1, return_counts=True)
        items = table.shape[1]
        drawn = rng.multinomial(items, counts / items, size=draws) / items
        total += cells[:, place] * ((drawn @ kinds.T) * seeds).sum(1)
    return total


def _shares(count: int, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The share of each of ``count`` things in a draw of ``count - 1`` of them: ``[draws, count]``."""
    taken = max(count - 1, 1)
    return rng.multinomial(taken, np.full(count, 1 / count), size=draws) / taken


@dataclass(frozen=True)
class Finding:
    """One arm against one other on one group of cells.

    Attributes:
        arm, against: names.
        group: the group of cells.
        at_least: the points that were claimed; None if the study claims nothing.
        difference: the difference that was found.
    """

    arm: str
    against: str
    group: str
    at_least: float | None
    difference: Estimate

    @property
    def holds(self) -> bool | None:
        """Whether the difference is as large as claimed and p is below 0.01; None if nothing was claimed."""
        if self.at_least is None:
            return None
        return self.difference.value >= self.at_least and self.difference.p < LEVEL


def findings(study: Study, *, draws: int = DRAWS) -> list[Finding]:
    """Test a study's claims: one finding for each arm that a claim is against, and each metric.

    Raises:
        EvidenceError: a claim names an arm or cells that the study does not have, or a run is not finished.
        ReportError: a claim has the wrong form.
    """
    found = []
    for part in study.claims:
        arm, group, others, at_least = _claim(part)
        for other in others:
            for difference in differences(study, arm, other, group, draws=draws):
                found.append(Finding(arm, other, group, at_least, difference))
    return found


def claimed_arms(study: Study) -> list[str]:
    """The arms that a study's claims name, each of them once."""
    return list(dict.fromkeys(name for part in study.claims for name in _named(part)))


def leading_arms(study: Study) -> list[str]:
    """The arms that the study's claims put ahead, or the first arm if there are no claims."""
    found = list(dict.fromkeys(_claim(part)[0] for part in study.claims))
    return found or list(study.planned)[:1]


def _named(part: Part) -> list[str]:
    arm, _, others, _ = _claim(part)
    return [arm, *others]


def _claim(part: Part) -> tuple[str, str, list[str], float | None]:
    group = str(part.get("cells").needed().text())
    if group not in NAMES:
        raise EvidenceError(f"{part.where}: cells must be one of {', '.join(NAMES)}, got {group!r}")
    against = part.get("against").needed()
    others = [str(against.value)] if isinstance(against.value, str) else [str(o.text()) for o in against.parts()]  # fmt: skip
    return str(part.get("arm").needed().text()), group, others, part.get("at_least").number()


def differences(
    study: Study, arm: str, against: str, group: str, *, draws: int = DRAWS
) -> list[Estimate]:
    """By how much one arm is ahead of another, for each metric, on the cells of a group that both have.

    Raises:
        EvidenceError: an arm does not exist or is not finished; the arms have different cells, rows or seeds.
    """
    mine, theirs = study.arm(arm), study.arm(against)
    there = {name for names in by_metric(theirs, group).values() for name in names}
    found = []
    for metric, names in by_metric(mine, group).items():
        if both := [name for name in names if name in there]:
            found.append(_of(metric, estimate(paired(mine, theirs, both), draws=draws)))
    if not found:
        raise EvidenceError(f"the arms {arm!r} and {against!r} have no {group} cell in common")
    return found


def level(study: Study, arm: str, cells: Iterable[str], *, draws: int = 2_000) -> Estimate:
    """The mean of one arm over cells with one metric, with its interval.

    Raises:
        EvidenceError: the arm does not exist or is not finished, or it lacks a cell.
    """
    mine, names = study.arm(arm), list(cells)
    seeds = sorted(mine.runs)
    tables = []
    for name in names:
        runs = [_of_run(mine, seed, name) for seed in seeds]
        tables.append(np.stack([_values(run, _has_items(runs)) for run in runs]))
    return estimate(tables, draws=draws)


def by_metric(arm: ArmScores, group: str) -> dict[str, list[str]]:
    """The names of an arm's cells in a group, by metric, because scores of different metrics have no mean."""
    first = arm.runs[min(arm.runs)].cells
    found: dict[str, list[str]] = {}
    for name, cell in first.items():
        if cell.group == NAMES[group]:
            found.setdefault(cell.metric, []).append(name)
    if not found:
        raise EvidenceError(f"the arm {arm.name!r} has no {group} cell")
    return found


def paired(mine: ArmScores, theirs: ArmScores, names: Sequence[str]) -> list[Table]:
    """The differences of two arms in some cells, seed by seed and item by item.

    An arm with only one seed, such as the untrained base, is compared with every seed of the other arm.

    Raises:
        EvidenceError: the arms have different seeds, cells or rows.
    """
    seeds = sorted(mine.runs if len(mine.runs) >= len(theirs.runs) else theirs.runs)
    for arm in (mine, theirs):
        if len(arm.runs) > 1 and sorted(arm.runs) != seeds:
            raise EvidenceError(
                f"the arms {mine.name!r} and {theirs.name!r} were trained with different seeds, "
                f"{sorted(mine.runs)} and {sorted(theirs.runs)}, and cannot be paired"
            )
    found = []
    for name in names:
        rows = []
        pairs = [(_of_run(mine, seed, name), _of_run(theirs, seed, name)) for seed in seeds]
        by_item = _has_items([run for pair in pairs for run in pair])
        for a, b in pairs:
            if (a.rows, a.metric) != (b.rows, b.metric):
                raise EvidenceError(
                    f"the cell {name!r} has {a.rows} rows by {a.metric} in the arm {mine.name!r} and {b.rows} by "
                    f"{b.metric} in {theirs.name!r}; only the same rows can be paired"
                )
            rows.append(_values(a, by_item) - _values(b, by_item))
        if len({len(row) for row in rows}) > 1:
            raise EvidenceError(f"the cell {name!r} has different rows with different seeds")
        found.append(np.stack(rows))
    return found


def _of_run(arm: ArmScores, seed: int, name: str) -> CellScore:
    run = arm.runs[seed if seed in arm.runs else min(arm.runs)]
    if name not in run.cells:
        raise EvidenceError(
            f"the arm {arm.name!r}, seed {seed}, lacks the cell {name!r}; it has {listed(list(run.cells), 3)}"
        )
    cell = run.cells[name]
    if cell.right is None and np.isnan(cell.score):
        raise EvidenceError(f"the arm {arm.name!r}, seed {seed}, has no score in the cell {name!r}")
    return cell


def _has_items(runs: Sequence[CellScore]) -> bool:
    """Whether all runs tell which rows of a cell they answered correctly; otherwise its score counts as one item."""
    return all(run.right is not None for run in runs)


def _values(cell: CellScore, by_item: bool) -> NDArray[np.float64]:
    """The points of each item, or the score of the cell as a single item."""
    if by_item and cell.right is not None:
        return 100.0 * cell.right.astype(np.float64)
    return np.array([cell.score])


def _of(metric: str, found: Estimate) -> Estimate:
    return Estimate(**{**found.__dict__, "metric": metric})

"""A run's folder, read as far as it goes: what is missing is said, what is damaged is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from flix.core.adapter.adapter import Adapter
from flix.core.adapter.files import CONFIG_FILE, TENSOR_FILE, load_adapter
from flix.core.errors import AdapterError, listed
from flix.report.reading import Part, ReportError, read_json, read_lines
from flix.report.records import Curves, Examples, Metrics, Sampling, read_config

METRICS, MIXTURE, LOG, PREDICTIONS, RUN, CONFIG = (
    "metrics.json", "mixture.json", "log.jsonl", "predictions.jsonl", "run.json", "config.yaml",
)  # fmt: skip
_KNOWN = (METRICS, MIXTURE, LOG, PREDICTIONS, RUN, CONFIG)
_Read = TypeVar("_Read")
_CHECKPOINT, _COMPLETE = "checkpoint-", "flix_checkpoint.json"  # which is written last


@dataclass
class Run:
    """What a run left.

    Attributes:
        folder: the folder.
        name: what the page calls it.
        metrics, mixture, curves, examples, adapter, config: None where the run has none.
        facts: what run.json says; an empty object where the run has none.
        missing: what the page cannot show, and why.
    """

    folder: Path
    name: str
    metrics: Metrics | None = None
    mixture: Sampling | None = None
    curves: Curves | None = None
    examples: Examples | None = None
    adapter: Adapter | None = None
    config: str | None = None
    facts: Part = field(default_factory=lambda: Part({}, RUN))
    missing: list[str] = field(default_factory=list)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of some folders, in their order.

    Raises:
        ReportError: no folder is given, one is given twice or is no run, or a file in it is damaged; or runs that
            cannot be compared: two that share no cell, or a cell that two of them scored by different metrics.
        OSError: a file cannot be read.
    """
    if not folders:
        raise ReportError("a report needs at least one run's folder")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ReportError(f"the run {str(folder)!r} is given twice")
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(places), strict=True)]
    for other in runs[1:]:
        _check_alike(runs[0], other)
    return runs


def read_run(folder: Path, name: str | None = None) -> Run:
    """A run's folder.

    Args:
        folder: the folder.
        name: what to call it; default: the folder's name.

    Raises:
        ReportError: it is no run, or a file in it is damaged.
        OSError: a file cannot be read.
    """
    _check_run(folder)
    run = Run(folder, name or folder.resolve().name)
    lacking = run.missing.append
    run.config = read_config(folder / CONFIG)
    if run.config is None:
        lacking(f"The configuration: there is no {CONFIG}.")
    facts = read_json(folder / RUN)
    if facts is None:
        lacking(f"Command, versions, data fingerprints and cost: there is no {RUN}.")
    else:
        dict(facts.items())  # an object, or an error
        run.facts = facts
    metrics = read_json(folder / METRICS)
    if metrics is None:
        lacking(f"Scores: there is no {METRICS}; the run is not finished, or was not evaluated.")
    else:
        run.metrics = Metrics.read(metrics)
        if not run.metrics.cells:
            lacking(f"Scores: {METRICS} names no cell.")
        elif all(cell.seen for cell in run.metrics.cells):
            lacking("Scores of held-out cells: no cell was held out of training.")
        if not run.metrics.left_out:
            lacking(f"What leaving a feature out costs: {METRICS} does not say (left_out).")
    mixture = read_json(folder / MIXTURE)
    if mixture is None:
        lacking(f"The mixture: there is no {MIXTURE}.")
    else:
        run.mixture = Sampling.read(mixture)
    run.curves = _of_lines(run, LOG, Curves.read, "Learning curves")
    run.examples = _of_lines(run, PREDICTIONS, Examples.read, "Examples")
    run.adapter = _adapter(run)
    return run


def _of_lines(
    run: Run, name: str, read: Callable[[Iterator[Part]], _Read], what: str
) -> _Read | None:
    file = run.folder / name
    if not file.is_file():
        run.missing.append(f"{what}: there is no {name}.")
        return None
    return read(read_lines(file))


def _adapter(run: Run) -> Adapter | None:
    folder = run.folder / "adapter"
    if not any((folder / name).exists() for name in (TENSOR_FILE, CONFIG_FILE)):
        steps = [
            (int(path.name.removeprefix(_CHECKPOINT)), path)
            for path in (run.folder / "checkpoints").glob(f"{_CHECKPOINT}*")
            if path.name.removeprefix(_CHECKPOINT).isdigit() and (path / _COMPLETE).is_file()
        ]
        if not steps:
            run.missing.append(
                "Ranks, parameters and what features share: there is no adapter; none was saved yet."
            )
            return None
        step, folder = max(steps)
        run.missing.append(
            f"The finished adapter: ranks, parameters and what features share are of the checkpoint at step {step}."
        )
    try:
        return load_adapter(folder)
    except AdapterError as error:
        raise ReportError(f"the adapter of {str(run.folder)!r}: {error}") from None


def _check_run(folder: Path) -> None:
    """Refuse what is no run's folder, and say what it is instead."""
    if not folder.exists():
        raise ReportError(f"there is no run {str(folder)!r}")
    if not folder.is_dir():
        raise ReportError(f"a run is a folder, but {str(folder)!r} is a file")
    if any((folder / name).is_file() for name in _KNOWN):
        return
    if (folder / TENSOR_FILE).is_file():
        why = f"it is an adapter; give the run's folder, {str(folder.parent)!r}"
    else:
        inside = [p for p in sorted(folder.iterdir()) if any((p / n).is_file() for n in _KNOWN)]
        names = listed([str(p) for p in inside], 5)
        why = f"the runs in it are: {names}" if inside else "it may be the wrong folder"
    raise ReportError(
        f"{str(folder)!r} is not a run of flix: it holds none of {', '.join(_KNOWN)}; {why}"
    )


def _names(places: Sequence[Path]) -> list[str]:
    """Folders' names, with as much of the path in front as tells them apart."""
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _check_alike(first: Run, other: Run) -> None:
    """Refuse two runs whose scores say nothing of each other."""
    if first.metrics is None or other.metrics is None:
        return
    if not first.metrics.cells or not other.metrics.cells:
        return
    mine = {cell.name: cell for cell in first.metrics.cells}
    common = [cell for cell in other.metrics.cells if cell.name in mine]
    if not common:
        raise ReportError(
            f"the runs {first.name!r} and {other.name!r} have no cell in common, so there is nothing to "
            f"compare: {first.name!r} has {listed(mine, 3)}; {other.name!r} has "
            f"{listed([c.name for c in other.metrics.cells], 3)}; make a report of each"
        )
    for cell in common:
        if cell.metric != mine[cell.name].metric:
            raise ReportError(
                f"the cell {cell.name!r} has the metric {mine[cell.name].metric!r} in the run {first.name!r} and "
                f"{cell.metric!r} in {other.name!r}; only scores of one metric can be compared"
            )

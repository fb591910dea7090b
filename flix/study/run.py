"""``flix study``: choices for every arm by one grid, then every arm with every seed, and what they answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import yaml

from flix.core.errors import RunError, SettingsError, listed, near
from flix.core.features.cells import cell_name, cell_of
from flix.core.files import is_same, make_folder, write_file
from flix.core.holding import LOCK, alone_in
from flix.study.choosing import CHOOSING, best, best_weights, edges, group_of, means
from flix.study.counting import CELL, Counting
from flix.study.differing import difference
from flix.study.display import Display
from flix.study.jobs import Failed, Job, parallel_by_default, run_jobs
from flix.study.plan import LAST, Plan, Run
from flix.study.reading import Study, arm_title
from flix.study.scores import of_run, trainable, write_scores
from flix.study.working import WEIGHTS, combinations, folder_json, is_finished, is_weighed
from flix.training.settings import Settings
from flix.transformers import folders

HALVES = {"choosing": CHOOSING, "last_word": LAST}
SCORES, CHOSEN, RESOLVED = "scores.json", "chosen.json", "config.yaml"


class StudyError(RunError):
    """Some runs of a study failed; the other runs are done."""


@dataclass
class Work:
    """A study that is being done.

    Attributes:
        study: the configuration.
        plan: makes its runs.
        display: told of progress.
        only: the arms that are worked on; the others count as missing.
        parallel: runs at a time.
        failed: the runs that failed, and how.
        chosen: by arm, as ``chosen.json`` has it.
    """

    study: Study
    plan: Plan
    display: Display
    only: Sequence[str]
    parallel: int
    failed: dict[str, Failed] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)

    def all(self, runs: Sequence[Run], weights: Sequence[Mapping[str, Any]], each: Callable[[], object]) -> None:  # fmt: skip
        """Do what is not done of some runs.

        Args:
            runs: the runs.
            weights: with which factors their held-out cells are evaluated.
            each: called when one is done.
        """
        jobs = []
        for run in runs:
            job = job_of(run, self.weights_of(run.arm, run.phase, weights))
            if state(run) == "diverged":
                self.failed[job.name] = Failed(job.beside(".diverged").read_text("utf-8"), "", True)
            elif not is_finished(run.folder) or (job.weights and not is_weighed(run.folder, job.weights)):  # fmt: skip
                make_folder(run.folder.parent)
                write_file(job.beside(".yaml"), text_of(run.settings))
                jobs.append(job)
        if not jobs:
            return
        show = self.display.follow(jobs)

        def follow(job: Job, event: dict[str, Any]) -> None:
            if event["event"] == "failed" and event.get("diverged"):
                write_file(job.beside(".diverged"), event["reason"].encode())
            show(job, event)
            if event["event"] == "done":
                each()

        self.failed |= run_jobs(jobs, follow, self.parallel)

    def weights_of(
        self, arm: str, phase: str, weights: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], ...]:
        """Of some factors for groups those whose groups the arm has any rank in."""
        if not self.plan.arms[arm].adapt:
            return ()
        has = self.plan.counted(arm, phase).by_group
        found = [{g: w for g, w in one.items() if g in has} for one in weights]
        return tuple(one for place, one in enumerate(found) if one and one not in found[:place])


def study(
    settings: Study, *, only: Sequence[str] = (), parallel: int | None = None, display: Display | None = None
) -> dict[str, Any]:  # fmt: skip
    """Run a study, or what is left of it; finished runs are not repeated.

    Args:
        settings: the configuration.
        only: the arms to run; default: all.
        parallel: how many runs at a time; default: as many as there are processors, or one with an accelerator.
        display: shows the progress.

    Returns:
        What ``scores.json`` holds.

    Raises:
        FlixError: a mistake in the settings or data of any arm, found before anything is trained; a finished run with
            other settings or data; another study that is working in the folder; a file in it that is not a study's and
            would be overwritten.
        StudyError: some runs failed; the others are done.
    """
    display = display or Display()
    for name in only:
        if name not in settings.settings.arms:
            arms = settings.settings.arms
            raise SettingsError(f"--only: there is no arm {name!r}{near(name, arms)}; the arms are: {listed(arms, 40)}")  # fmt: skip
    check_place(settings)
    plan = Plan(settings, Counting())
    plan.check()
    work = Work(settings, plan, display, list(only) or list(plan.arms), parallel or parallel_by_default())  # fmt: skip
    make_folder(settings.output)
    with alone_in(settings.output, "flix study", leave=True):
        write_file(settings.output / RESOLVED, resolved(settings))
        choose(work)
        scores = last_runs(work)
    if work.failed:
        told = [f"{name}: {how.reason}" for name, how in work.failed.items()]
        several = "1 run" if len(told) == 1 else f"{len(told)} runs"
        raise StudyError(f"{several} failed, the others are done. {'; '.join(told)}")
    return scores


def planned(settings: Study) -> list[tuple[Run, str]]:
    """All runs, and how far each is. The last runs of an arm without a choice yet have its default settings."""
    plan = Plan(settings, Counting())
    plan.check()
    work = Work(settings, plan, Display(), list(plan.arms), 1)
    found = [(run, state(run)) for arm in plan.arms for run in choosing_runs(work, arm)]
    for arm in plan.arms:
        take_chosen(work, arm)
        # Where no choice is made yet, the run is told without it.
        work.chosen.setdefault(arm, {"choice": {}, "weights": {}})
    return found + [(run, state(run)) for run in final_runs(work, plan.arms)]


def choosing_runs(work: Work, arm: str) -> list[Run]:
    """The runs that an arm's choice is made by."""
    plan, said = work.plan, work.study.settings
    if CHOOSING not in plan.phases(arm) or said.choosing is None:
        return []
    choices = plan.choices(arm)
    if len(choices) == 1 and not said.weights:
        return []
    return [plan.run(arm, CHOOSING, said.choosing.seed, choice) for choice in choices]


def choose(work: Work) -> None:
    """The first phase: one grid for every arm, then factors for held-out cells."""
    runs = {arm: choosing_runs(work, arm) for arm in work.only}
    check_same([run for some in runs.values() for run in some], work)
    order = [run for some in zip_longest(runs.values()) for run in some]
    work.all(order, (), lambda: None)
    chosen = [run for arm in work.only if (run := take_chosen(work, arm)) is not None]
    work.all(chosen, combinations(work.study.settings.weights), lambda: None)
    for arm in work.plan.arms:
        take_chosen(work, arm)
    if work.study.settings.choosing is not None:
        folders.write_json(work.study.output / CHOSEN, work.chosen)
    for arm, said in work.chosen.items():
        for key in said.get("edge", []):
            work.display.say(
                f"note: {arm}: the best {key}, {said['choice'][key]}, is at the edge of the grid; a better one may lie outside"
            )


def zip_longest(lists: Any) -> Iterator[list[Run]]:
    """The first runs of all arms, then their second ones, and so on."""
    some = [list(one) for one in lists]
    for place in range(max(map(len, some), default=0)):
        yield [one[place] for one in some if place < len(one)]


def take_chosen(work: Work, arm: str) -> Run | None:
    """What an arm's finished runs say is best; its run, or None where nothing is left to choose or not all are done."""
    plan, said = work.plan, work.study.settings
    runs = choosing_runs(work, arm)
    if not runs or said.choosing is None:
        work.chosen[arm] = {"choice": plan.choices(arm)[0] if plan.arms[arm].adapt else {}, "by": None, "table": [], "weights": {}}  # fmt: skip
        return None
    work.chosen.pop(arm, None)
    states = [state(run) for run in runs]
    if any(s not in ("finished", "diverged") for s in states):
        return None
    group = grouping(work, arm, CHOOSING)
    table = []
    for run, how in zip(runs, states, strict=True):
        entry: dict[str, Any] = {"choice": dict(run.choice)}
        if how == "diverged":
            entry |= {"seen": None, "choosing": None, "both": None, "diverged": True}
        else:
            entry |= means(folder_json(run.folder / folders.METRICS)["cells"], group)
        table.append(entry)
    place = best(table, said.choosing.by)
    if place is None:
        raise RunError(
            f"arm {arm!r}: no run has a score to choose by ({said.choosing.by}); see {runs[0].folder.parent}"
        )
    weights: dict[str, Any] = {}
    wanted = work.weights_of(arm, CHOOSING, combinations(said.weights))
    of_weights: list[dict[str, Any]] = []
    if wanted and is_weighed(runs[place].folder, wanted):
        found = folder_json(runs[place].folder / WEIGHTS)
        for entry in found:
            entry["cells"] = {k: c for k, c in entry["cells"].items() if group({**c, "seen": False}) == CHOOSING}  # fmt: skip
        weights, of_weights = best_weights(found)
    elif wanted:
        return runs[place]
    work.chosen[arm] = {
        "choice": table[place]["choice"],
        "values": plan.values(arm, table[place]["choice"]),
        "by": said.choosing.by,
        "table": table,
        "edge": edges(table[place]["choice"], plan.grid(arm)),
        "weights": weights,
        "weights_table": of_weights,
    }
    return runs[place]


def grouping(work: Work, arm: str, phase: str) -> Callable[[Mapping[str, Any]], str]:
    """What the cells of an arm's metrics are for."""
    held = work.plan.held_out(CHOOSING), work.plan.held_out(LAST)
    known = work.plan.counted(arm, phase).known
    return lambda cell: group_of(cell, *held, known)


def final_runs(work: Work, arms: Any) -> list[Run]:
    """The last runs of the arms whose choice is made, seed after seed."""
    return [
        work.plan.run(arm, LAST, seed, work.chosen[arm]["choice"], work.chosen[arm]["weights"])
        for seed in work.study.settings.all_seeds
        for arm in arms
        if arm in work.chosen
    ]


def last_runs(work: Work) -> dict[str, Any]:
    """The second phase; ``scores.json`` is written anew after each run."""
    runs = final_runs(work, work.only)
    check_same(runs, work)
    work.all(runs, combinations(work.study.settings.weights), lambda: write(work))
    return write(work)


def write(work: Work) -> dict[str, Any]:
    """Write ``scores.json`` from all finished runs; one of other settings counts as missing."""
    arms: dict[str, Any] = {}
    missing: list[str] = []
    data: dict[str, Any] = {}
    devices: set[str] = set()
    for arm in work.plan.arms:
        counted = work.plan.counted(arm, LAST)
        lora = work.plan.arms[arm].lora
        hidden = CELL if lora is not None and lora.each == CELL else None
        seeds: dict[str, Any] = {}
        count_of = 0
        for seed in work.study.settings.all_seeds:
            run = final_runs_of(work, arm, seed)
            if run is None or not is_finished(run.folder) or difference(run, counted):
                missing.append(f"{arm}, seed {seed}")
                continue
            seeds[str(seed)] = of_run(run.folder, grouping(work, arm, LAST), hidden)
            count_of = trainable(run.folder)
            devices.add(folder_json(run.folder / folders.RUN)["machine"]["device"])
        adapt = work.plan.arms[arm].adapt
        arms[arm] = {
            "title": arm_title(arm, work.plan.arms[arm]),
            "ranks": counted.by_group if adapt else {},
            "active_rank": counted.active if adapt else 0,
            "total_rank": counted.total if adapt else 0,
            "trainable": count_of if seeds else None,
            "choice": (work.chosen.get(arm) or {}).get("choice"),
            "weights": (work.chosen.get(arm) or {}).get("weights"),
            "complete": len(seeds) == len(work.study.settings.all_seeds),
            "seeds": seeds,
        }
        data |= {file["name"]: file["sha256"] for part in counted.files for file in part["files"]}
    said = work.study.settings
    of_study = {
        "study": work.study.title,
        "seeds": said.all_seeds,
        "steps": (work.study.common.get("training") or {}).get("steps"),
        "held_out": {phase: [cell_name(cell_of(c)) for c in work.plan.held_out(of).cells] for phase, of in HALVES.items()},
        "claims": [claim.model_dump(mode="json") for claim in said.claims],
        "planned": {name: arm_title(name, arm) for name, arm in work.plan.arms.items()},
    }  # fmt: skip
    return write_scores(work.study.output / SCORES, of_study, data, arms, missing, devices)


def final_runs_of(work: Work, arm: str, seed: int) -> Run | None:
    """An arm's last run with a seed; None while its choice is not made."""
    said = work.chosen.get(arm)
    return work.plan.run(arm, LAST, seed, said["choice"], said["weights"]) if said else None


def state(run: Run) -> str:
    """How far a run is: ``finished``, ``diverged``, ``begun`` or ``waiting``."""
    job = job_of(run, ())
    with suppress(OSError):
        if job.beside(".diverged").is_file() and job.beside(".yaml").read_bytes() == text_of(run.settings):  # fmt: skip
            return "diverged"
    if is_finished(run.folder):
        return "finished"
    return "begun" if (run.folder / folders.CHECKPOINTS).is_dir() else "waiting"


def check_same(runs: Sequence[Run], work: Work) -> None:
    """Refuse finished runs of other settings or data than they would have now.

    Raises:
        RunError: there is one; what differs is named, and the way out.
    """
    for run in runs:
        if is_finished(run.folder) and (why := difference(run, work.plan.counted(run.arm, run.phase))):  # fmt: skip
            raise RunError(
                f"{run.folder} is a finished run of other settings: {why}; remove the folder to repeat the run, or set "
                "another output:"
            )


def job_of(run: Run, weights: tuple[Mapping[str, Any], ...]) -> Job:
    """What is to be done for a run."""
    return Job(run.name, run.folder, run.settings.training.steps if run.adapt else 0, run.adapt, weights)  # fmt: skip


def text_of(settings: Settings) -> bytes:
    """Settings as YAML."""
    text: str = yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)
    return text.encode("utf-8")


def resolved(settings: Study) -> bytes:
    """A study's configuration with every default spelled out, and what its files hold in the place of their names."""
    said = settings.settings.model_dump(mode="json")
    said["common"] = settings.common
    if settings.choosing is not None:
        said["choosing"]["common"] = settings.choosing
    text: str = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
    return text.encode("utf-8")


def check_place(settings: Study) -> None:
    """Refuse a folder in which the study would overwrite its own configuration, or what is no study's.

    Raises:
        RunError: it would; the file is named.
    """
    output = settings.output
    file = output / RESOLVED
    there = [output / name for name in (RESOLVED, SCORES, CHOSEN) if (output / name).is_file()]
    if not there or (there == [file] and file.read_bytes() == resolved(settings)):
        return
    if any(is_same(file, given) for given in settings.files):
        raise RunError(
            f"output: the study would overwrite its configuration, {str(file)!r}, with the resolved one; give another output:"
        )
    if len(there) < 2 and not (output / LOCK).exists():
        raise RunError(
            f"{str(there[0])!r} belongs to no study, and the study would overwrite it; give another output:"
        )

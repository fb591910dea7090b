"""Adds the seeds of a study that ran in several places: each seed once, and everything else the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flix.core.errors import listed
from flix.study.evidence import EvidenceError
from flix.transformers import folders

#: What every run of an arm has in common, whatever its seed and machine.
_SAME = ("ranks", "active_rank", "total_rank", "trainable", "choice", "weights", "settings")
_MADE = ("command", "commit", "machine", "date", "versions")
#: Of a run's settings, those that its answers depend on; the rest says where and how often something is written.
_SETTINGS = (
    "kind",
    "ranks",
    "alpha",
    "scaling",
    "target_modules",
    "feature_dropout",
    "lora_dropout",
    "temperature",
    "cap",
    "start_from",
    "freeze_start",
)
_TRAINING = (
    "steps",
    "batch_size",
    "learning_rate",
    "learning_rates",
    "schedule",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "gradient_accumulation",
    "similar_lengths",
    "dtype",
    "bf16",
)
_EVALUATION = ("limit", "max_new_tokens", "num_beams", "unseen_group_weights")


def added(kept: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Scores that are kept, with the runs of the same study that were made elsewhere.

    Args:
        kept: the scores in their shorter form, as ``docs/results`` holds them.
        more: the other scores, in the same form.

    Returns:
        The scores and claims of both. ``parts`` says of each part which seeds it has and how it was made.

    Raises:
        EvidenceError: a seed is in both, or the parts differ in data, cells, arms or steps; the first difference is
            named.
    """
    name = more["study"]
    for key in ("data", "cells"):
        _equal(name, key, kept.get(key) or {}, more.get(key) or {})
    arms = {arm: dict(said) for arm, said in kept["arms"].items()}
    for arm, said in more["arms"].items():
        if not said["seeds"]:  # left to the other part
            continue
        if arm not in arms:
            arms[arm] = dict(said)
            continue
        before = arms[arm]
        for key in _SAME:
            if key == "settings" and not (before.get(key) and said.get(key)):
                continue  # kept by an earlier flix, which did not keep them
            if before.get(key) != said.get(key):
                raise _differ(name, f"{arm}: {key}", before.get(key), said.get(key))
        if both := sorted({*before["seeds"]} & {*said["seeds"]}, key=int):
            raise EvidenceError(
                f"{name}: {arm}: both parts have seed {listed(both)}; without --add, a study replaces what is kept"
            )
        steps = {run.get("steps") for part in (before, said) for run in part["seeds"].values()}
        if len(steps) > 1:
            raise EvidenceError(f"{name}: {arm}: runs of {listed(sorted(map(str, steps)))} steps cannot be one study")  # fmt: skip
        runs = {**before["seeds"], **said["seeds"]}
        arms[arm] = {**before, "seeds": {seed: runs[seed] for seed in sorted(runs, key=int)}}
    for arm, said in arms.items():
        arms[arm] = {**said, "complete": False}
    before, after = kept.get("planned") or {}, more.get("planned") or {}
    # A part that knows all arms knows their order.
    planned = {**after} if {*before} <= {*after} else {**before, **after}
    seeds = sorted({*(kept.get("seeds") or ()), *(more.get("seeds") or ())})
    done = {arm: {int(seed) for seed in said["seeds"]} for arm, said in arms.items()}
    for arm, said in arms.items():
        said["complete"] = done[arm] >= {*seeds}
    claims = list(kept.get("claims") or [])
    return {
        **kept,
        "claims": claims + [claim for claim in more.get("claims") or [] if claim not in claims],
        "seeds": seeds,
        "planned": planned,
        "arms": arms,
        "missing": [f"{arm}, seed {s}" for arm in planned for s in seeds if s not in done.get(arm, ())],
        "date": max(str(part.get("date") or "") for part in (kept, more)),
        "parts": [*parts_of(kept), *parts_of(more)],
    }  # fmt: skip


def settings_of(run: Path) -> dict[str, Any]:
    """The settings of a finished run that its answers depend on; empty if its folder is gone."""
    import yaml

    file = run / folders.RESOLVED
    if not file.is_file():
        return {}
    said = yaml.safe_load(file.read_text(encoding="utf-8"))
    prompts = sorted({str(d.get("prompt")) for d in said.get("datasets") or ()})
    found = {key: said[key] for key in _SETTINGS if key in said} | {"prompts": prompts}
    for part, keys in (("training", _TRAINING), ("evaluation", _EVALUATION)):
        found[part] = {key: said[part][key] for key in keys if key in (said.get(part) or {})}
    return found


def parts_of(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How some scores were made: for each part its seeds, command, commit, machine, date and versions."""
    if said.get("parts"):
        return [dict(part) for part in said["parts"]]
    seeds = {int(seed) for arm in (said.get("arms") or {}).values() for seed in arm["seeds"]}
    return [{"seeds": sorted(seeds), **{key: said.get(key) for key in _MADE}}]


def _equal(study: str, key: str, kept: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Whether what both parts have of something is equal; a part may lack an arm's data sets and their cells."""
    for name in kept:
        if name in more and kept[name] != more[name]:
            raise _differ(study, f"{key}: {name}", kept[name], more[name])


def _differ(study: str, what: str, kept: Any, more: Any) -> EvidenceError:
    return EvidenceError(
        f"{study}: {what} is {kept!r} in the scores that are kept and {more!r} in those to add; seeds are added only "
        "where all else is equal; without --add, a study replaces what is kept"
    )

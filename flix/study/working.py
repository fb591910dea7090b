"""What a job does in its process: train, or evaluate the untrained base; then weigh features in held-out cells."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flix.core.adapter.files import load_adapter
from flix.core.errors import SettingsError
from flix.core.files import write_file
from flix.core.progress import Reporter
from flix.study.jobs import Job
from flix.tasks import composing
from flix.training import folder
from flix.training.data import Data, read_data
from flix.training.evaluation import evaluator_of
from flix.training.models import Built, build, build_config
from flix.training.reading import read_settings
from flix.training.run import train
from flix.training.settings import Settings
from flix.transformers import folders
from flix.transformers.checkpoints import last_checkpoint

WEIGHTS = "weights.json"
SEARCHED = "searched"


def do(job: Job, reporter: Reporter) -> None:
    """Do a job. Parts of it that are done already are not repeated."""
    settings = read_settings(job.beside(".yaml"))
    if job.anew or not is_finished(job.folder):
        if job.adapt:
            begun = last_checkpoint(job.folder / folders.CHECKPOINTS) is not None
            resume = begun and not job.anew
            train(settings, resume=resume, overwrite=not resume, reporter=reporter)
        else:
            answer_untrained(settings, reporter)
    if job.weights and not is_weighed(job.folder, job.weights):
        weigh(settings, job.weights, reporter)


def is_finished(output: Path) -> bool:
    """Whether a run was written to its end."""
    # In the order in which a run writes them.
    return all((output / name).is_file() for name in (folders.METRICS, folders.RUN, folders.RESOLVED))  # fmt: skip


def is_weighed(output: Path, weights: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run's held-out cells were evaluated with all of these factors."""
    try:
        found = folder_json(output / WEIGHTS)
    except (OSError, ValueError):
        return False
    return [entry["weights"] for entry in found] == [dict(one) for one in weights]


def folder_json(path: Path) -> Any:
    """A JSON file."""
    import json

    return json.loads(path.read_bytes())


def answer_untrained(settings: Settings, reporter: Reporter) -> None:
    """Evaluate the base without training, and write the files of a run.

    Raises:
        SettingsError: the head of a task would be random.
    """
    import yaml

    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    data = read_data(settings)
    for spec in data.specs:
        if spec.kind not in ("seq2seq", "causal", "masked"):
            raise SettingsError(
                f"adapt: false: the task {spec.name!r} is {spec.kind}, whose head would be random without training"
            )
    built = build(settings, data, build_config(settings, data))
    built.model.eval()
    evaluator = evaluator_of(settings, data, built)
    found = evaluator.answers(built.model, reporter)
    output = settings.output_folder
    output.mkdir(parents=True, exist_ok=True)
    folders.write_lines(output / folders.PREDICTIONS, evaluator.samples(found))
    training = {"steps": 0, "seconds": 0.0, "trainable_parameters": 0, "losses": [], "evaluation_losses": []}  # fmt: skip
    metrics = {**evaluator.scored(found), "left_out": None, "training": training}
    folders.write_json(output / folders.METRICS, metrics)
    said = folder.run_json(settings, data, built, {}, started=started, seconds=0.0, steps=0)
    folders.write_json(output / folders.RUN, said)
    text = yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)
    write_file(output / folders.RESOLVED, text.encode("utf-8"))


def weigh(settings: Settings, weights: Sequence[Mapping[str, Any]], reporter: Reporter) -> None:
    """Evaluate a trained run's held-out cells with each of some factors for groups; writes ``weights.json``."""
    adapter = settings.output_folder / folders.ADAPTER
    loaded = load_adapter(adapter)
    data = read_data(settings)
    found = []
    for one in weights:
        # Anew for each: a search changes the rows.
        built = build(settings, data, loaded.config, adapter=loaded, folder=adapter)
        found.append({"weights": dict(one), "cells": _weighed(settings, data, built, one, reporter)})  # fmt: skip
    folders.write_json(settings.output_folder / WEIGHTS, found)


def _weighed(
    settings: Settings, data: Data, built: Built, weights: Mapping[str, Any], reporter: Reporter
) -> dict[str, Any]:
    evaluator = evaluator_of(settings, data, built)
    evaluator.keep(~evaluator.of_seen)
    if not len(evaluator):
        return {}
    texts = [f"{group}={how}" for group, how in weights.items()]
    composing.apply(composing.parse(texts, evaluator.collator.registry), evaluator, built.model)
    answers = evaluator.answers(built.model, reporter)
    found = {}
    for cell in evaluator.scored(answers)["cells"]:
        mine = [answers[i] for i in np.flatnonzero([evaluator.names[c] == cell["cell"] for c in evaluator.cells])]  # fmt: skip
        right = rights(cell["kind"], [answer.right for answer in mine])
        found[cell["cell"]] = {"features": cell["features"], "rows": cell["rows"], "metric": cell["metric"], "score": cell["score"], "right": right}  # fmt: skip
    return found


def rights(kind: str, right: Sequence[bool | None]) -> list[int | None]:
    """Which rows are right, as 0 and 1, if a cell's score is the share of right rows; otherwise None for each row.

    A tagged sentence may be right as a whole, but the score of its cell counts entities or words.
    """
    counts = kind in ("seq2seq", "causal", "classification")
    return [int(one) if counts and one is not None else None for one in right]


def combinations(weights: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], ...]:
    """Every combination of factors."""
    return tuple(dict(zip(weights, values, strict=True)) for values in itertools.product(*weights.values()))  # fmt: skip

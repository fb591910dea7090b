"""A training run from its settings: data, model, Trainer, and what it leaves behind (``docs/cli.md``)."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.config.config import FlixConfig
from flix.core.errors import RunError
from flix.core.files import write_file
from flix.core.machine import peak_memory
from flix.core.progress import Reporter
from flix.data.display import check_best, described, idle_notes
from flix.data.lengths import SimilarLengths
from flix.report import remove_report
from flix.tasks.evaluation import Evaluator, length_of
from flix.tasks.needing import need
from flix.tasks.starting import features_before
from flix.training import folder
from flix.training.data import Data, read_data
from flix.training.evaluation import evaluator_of
from flix.training.models import Built, build, build_config
from flix.training.settings import Settings, listed_of
from flix.transformers import folders
from flix.transformers.checkpoints import checkpoint_step
from flix.transformers.journal import Journal


class InterruptedRun(KeyboardInterrupt):
    """A run that was interrupted, and saved a checkpoint to go on from."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Attributes:
        output: the run's folder.
        adapter: the adapter's folder.
        metrics: what ``metrics.json`` holds.
        model: the trained model, in evaluation mode.
    """

    output: Path
    adapter: Path
    metrics: dict[str, Any]
    model: Any


@dataclass(frozen=True)
class Run:
    """What the steps of a run share."""

    settings: Settings
    reporter: Reporter
    checkpoint: Path | None
    data: Data
    built: Built
    evaluator: Evaluator
    journal: Journal
    started: str

    @property
    def rows(self) -> int:
        """The rows that the whole run draws, over all processes."""
        t = self.settings.training
        return t.steps * t.batch_size * t.gradient_accumulation * folders.processes()


def prepare(settings: Settings) -> tuple[Data, FlixConfig]:
    """The data and the adapter's configuration; loads no framework.

    Raises:
        FlixError: a mistake in the settings or the data.
    """
    data = read_data(settings)
    check_best(settings.training.best, data.mixture.evaluation_rows())
    return data, build_config(settings, data)


def train(
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train an adapter.

    Args:
        settings: the configuration.
        resume: continue from the last checkpoint; on a CPU the result is that of a run without interruption, bit
            for bit.
        overwrite: discard an earlier run in the output folder.
        reporter: told of progress.

    Raises:
        FlixError: a mistake in settings, data or model; an output folder that holds a run already, or none to
            resume; another run that writes there.
        InterruptedRun: Ctrl-C was pressed; a checkpoint was saved.
    """
    run, earlier = start(settings, resume, overwrite, reporter or Reporter())
    output = settings.output_folder
    with folders.held(output):
        if folders.is_main():
            if folders.claim(output, resume, overwrite) != (run.checkpoint, earlier):
                raise RunError(
                    f"{str(output)!r}: another flix train wrote there meanwhile; start again"
                )
            now = None if run.checkpoint else folder.goes_by(settings, run.data)
            folders.begin(output, earlier, now)
            remove_report(output)  # it tells of what the folder held before
        trainer = go(run)
        metrics = finish(run, trainer) if folders.is_main() else {}
    return TrainResult(output, output / folders.ADAPTER, metrics, run.built.model)


def start(
    settings: Settings, resume: bool, overwrite: bool, reporter: Reporter
) -> tuple[Run, list[Path]]:
    """All that can be found wrong before anything is written, and what an earlier run left to discard."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    checkpoint, earlier = folders.claim(settings.output_folder, resume, overwrite)
    need("training", listed_of(settings.training.report_to))
    data, config = prepare(settings)
    for text in idle_notes(
        data.mixture, config.registry, features_before(settings.start_from, settings.base_folder)
    ):
        reporter.note(f"note: {text}")
    if checkpoint is not None:
        now = folder.goes_by(settings, data)
        folders.check_same(checkpoint, now, folder.FREE, folder.read_again)
    built = made(settings, data, config)
    evaluator = evaluator_of(settings, data, built)
    say(reporter, data, built, evaluator)
    step = checkpoint_step(checkpoint) if checkpoint is not None else 0
    log = settings.output_folder / folders.LOG if folders.is_main() else None
    journal = Journal(log, step, folders.seconds_before(settings.output_folder, step))
    return Run(settings, reporter, checkpoint, data, built, evaluator, journal, started), earlier


def made(settings: Settings, data: Data, config: FlixConfig) -> Built:
    """The model, as the seed makes it."""
    import transformers

    from flix.tasks import enable_checkpointing

    transformers.set_seed(settings.seed)
    built = build(settings, data, config)
    if settings.training.gradient_checkpointing:
        enable_checkpointing(built.model)
    return built


def say(reporter: Reporter, data: Data, built: Built, evaluator: Evaluator) -> None:
    """What is about to be trained."""
    from flix.backends.torch import summary
    from flix.tasks import label_notes

    counts, mixture = summary(built.model), data.mixture
    rows = mixture.evaluation_rows()
    reporter.note(
        f"{sum(mixture.sizes.values()):,} training rows in {len(mixture.cells)} combinations, "
        f"{len(rows):,} evaluation rows; {counts.trainable:,} of {counts.total:,} "
        f"parameters train, in {len(counts.layers)} layers"
    )
    first = mixture.training_rows().limited(50)
    names = [first.names[cell] for cell in first.cells]
    notes = [
        text
        for t, s in zip(built.tasks, data.specs, strict=True)
        for text in label_notes(t, *s.occurring)
    ]
    for text in (*notes, *built.notes(first.__getitems__(range(len(first))), names, refuse=True)):
        reporter.note(f"note: {text}")


def go(run: Run) -> Any:
    """Train; a run that has all its steps already is loaded as it is."""
    from flix.training.trainer import make_trainer

    trainer, watch = make_trainer(
        run.settings,
        run.built,
        folder=run.settings.output_folder / folders.CHECKPOINTS,
        rows=dealt(run),
        evaluator=run.evaluator,
        journal=run.journal,
        reporter=run.reporter,
    )
    try:
        if run.checkpoint is not None and checkpoint_step(run.checkpoint) >= run.settings.training.steps:  # fmt: skip
            take(run, trainer)
        else:
            run.journal.start()
            with watch.listening():
                trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)  # fmt: skip
    finally:
        run.reporter.stop()
    if watch.interrupted and trainer.state.global_step < run.settings.training.steps:
        raise InterruptedRun(
            f"interrupted at step {trainer.state.global_step}, which was saved; --resume goes on from there"
        )
    return trainer


def dealt(run: Run) -> Any:
    """The rows of the run in the order in which they are trained on."""
    t, tasks, mixture = run.settings.training, run.built.tasks, run.data.mixture
    if mixture.streamed:
        return mixture.stream()
    rows = mixture.run(run.rows)
    if not t.similar_lengths:
        return rows
    batch = t.batch_size * folders.processes()
    return SimilarLengths(rows, batch, lambda row: length_of(tasks, row), seed=run.settings.seed)


def take(run: Run, trainer: Any) -> None:
    """Load what a finished run had reached."""
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import TrainerState

    from flix.backends.torch import load

    assert run.checkpoint is not None
    steps = checkpoint_step(run.checkpoint)
    run.reporter.note(f"the run has its {steps} steps already; nothing is left to train")
    trainer.state = TrainerState.load_from_json(str(run.checkpoint / TRAINER_STATE_NAME))
    best = trainer.state.best_model_checkpoint if run.settings.training.best else None
    load(run.built.model, best if best and Path(best).is_dir() else run.checkpoint)


def finish(run: Run, trainer: Any) -> dict[str, Any]:
    """Save the adapter, evaluate, and write what the run was; returns what ``metrics.json`` holds."""
    import yaml

    from flix.backends.torch import save

    output, settings = run.settings.output_folder, run.settings
    seconds, steps = run.journal.seconds, trainer.state.global_step
    run.built.model.eval()
    save(run.built.model, output / folders.ADAPTER)
    folder.write_recipe(output, settings, run.data, run.built)
    metrics = {**evaluated(run, trainer), "training": training(run, trainer, seconds)}
    folders.write_json(output / folders.METRICS, metrics)
    a_step = steps * settings.training.batch_size * settings.training.gradient_accumulation
    drawn = described(run.data.mixture, a_step * folders.processes())
    folders.write_json(output / folders.MIXTURE, {"cap": settings.cap, **drawn})
    cost = {
        "seconds_a_step": round(seconds / max(steps, 1), 4),
        "tokens": int(trainer.state.num_input_tokens_seen) or None,
        "peak_memory_bytes": _peak(trainer.args.device),
    }
    said = folder.run_json(settings, run.data, run.built, cost, started=run.started, seconds=seconds, steps=steps)  # fmt: skip
    folders.write_json(output / folders.RUN, said)
    text = yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)
    write_file(output / folders.RESOLVED, text.encode("utf-8"))
    return metrics


def _peak(device: Any) -> int:
    """The most memory that was held, in bytes: of the accelerator if one is used, else of the process."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def evaluated(run: Run, trainer: Any) -> dict[str, Any]:
    """Scores by cell and what leaving features out costs; the answers that are kept are written."""
    nothing: dict[str, Any] = {"cells": [], "seen": None, "held_out": None, "left_out": None}
    if not run.settings.evaluation.at_end or not len(run.evaluator):
        # What a shorter run answered, which this one went on from, is not this one's.
        (run.settings.output_folder / folders.PREDICTIONS).unlink(missing_ok=True)
        return nothing
    found = run.evaluator.answers(run.built.model, run.reporter)
    folders.write_lines(run.settings.output_folder / folders.PREDICTIONS, run.evaluator.samples(found))  # fmt: skip
    alone = trainer.args.world_size == 1 and run.settings.evaluation.left_out
    left_out = run.evaluator.left_out(trainer) if alone else None
    return {**nothing, **run.evaluator.scored(found), "left_out": left_out}


def training(run: Run, trainer: Any, seconds: float) -> dict[str, Any]:
    """How the training went, as ``metrics.json`` has it."""
    from flix.backends.torch import summary

    counts, state = summary(run.built.model), trainer.state
    best = None
    if run.settings.training.best and state.best_metric is not None:
        best = {"metric": run.settings.training.best, "value": state.best_metric, "step": state.best_global_step}  # fmt: skip
    return {
        "steps": state.global_step,
        "seconds": round(seconds, 2),
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "training_rows": run.data.mixture.sizes,
        "best": best,
        **run.journal.history(),
    }

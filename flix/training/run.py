"""A training run from its settings: data, model, Trainer, and what it leaves behind.

The output folder holds ``adapter/``, ``metrics.json``, ``config.yaml`` (the resolved configuration) and
``checkpoints/``.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.config.config import FlixConfig
from flix.core.errors import FlixError
from flix.core.files import write_file
from flix.training.corpus import Corpus, build_corpus
from flix.training.errors import RunError, missing_extra
from flix.training.features import build_config
from flix.training.progress import Reporter
from flix.training.settings import Settings
from flix.training.sources import read_rows
from flix.transformers.checkpoints import checkpoint_step, last_checkpoint

ADAPTER, METRICS, RESOLVED, CHECKPOINTS = "adapter", "metrics.json", "config.yaml", "checkpoints"

# What may differ between the start of a run and its continuation.
_FREE = {"output", "evaluation"}
_FREE_TRAINING = {"steps", "eval_every", "save_every", "keep_checkpoints", "log_every", "threads", "device"}  # fmt: skip


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


def prepare(settings: Settings) -> tuple[Corpus, FlixConfig]:
    """The data and the adapter's configuration; loads no framework.

    Raises:
        FlixError: a mistake in the settings or the data.
    """
    corpus = build_corpus(settings, read_rows(settings), unknown=settings.unknown)
    return corpus, build_config(settings, corpus)


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
            resume.
    """
    reporter = reporter or Reporter()
    output = settings.output_folder
    checkpoint, earlier = _claim(output, resume, overwrite)
    corpus, config = prepare(settings)
    for text in corpus.notes:
        reporter.note(f"note: {text}")
    try:
        import sacrebleu  # noqa: F401 - asked for now, not after the training
        import torch
        import transformers
        import yaml
        from transformers.trainer import TRAINER_STATE_NAME
        from transformers.trainer_callback import TrainerState

        from flix.training.trainer import make_trainer
    except ImportError as error:
        if isinstance(error, FlixError):
            raise
        raise missing_extra("training", "train", error) from None
    from flix.backends.torch import adapt, load, save, summary
    from flix.training.batches import Collator, RoutingTable, Texts
    from flix.training.checking import unknown_targets
    from flix.training.evaluation import score
    from flix.training.mixture import Mixture
    from flix.training.models import enable_checkpointing, load_model, load_tokenizer, locate

    resolved = settings.to_dict()
    if checkpoint is not None:
        _check_same(checkpoint, resolved)
    t = settings.training
    if t.threads is not None:
        torch.set_num_threads(t.threads)
    transformers.set_seed(settings.seed)
    name = locate(settings.model, settings.base_folder)
    own = settings.tokenizer
    tokenizer = load_tokenizer(locate(own, settings.base_folder) if own else name)
    model = adapt(load_model(name, settings.kind, t.dtype), config)
    if t.gradient_checkpointing:
        enable_checkpointing(model)
    counts = summary(model)
    reporter.note(
        f"{len(corpus.train):,} training rows in {int(corpus.trained.sum())} combinations, "
        f"{len(corpus.evaluation):,} evaluation rows; {counts.trainable:,} of {counts.total:,} "
        f"parameters train, in {len(counts.layers)} layers"
    )
    table = RoutingTable(corpus, settings.unknown, settings.evaluation.unseen_group_weights)
    vocabulary = model.get_input_embeddings().num_embeddings
    texts = Texts(tokenizer, settings.kind, t.max_source_tokens, t.max_target_tokens, vocabulary)
    for text in unknown_targets(texts, corpus, corpus.train):
        reporter.note(f"note: {text}")
    collator = Collator(texts, table, config, seed=settings.seed, batch_size=t.batch_size)
    rows_a_step = t.batch_size * t.gradient_accumulation
    mixture = Mixture(
        corpus.train,
        length=t.steps * rows_a_step,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    checkpoints = output / CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    if checkpoint is None:
        _write(checkpoints / "run.json", resolved)
    trainer = make_trainer(
        model,
        settings,
        checkpoints=checkpoints,
        mixture=mixture,
        evaluation=_halves(settings, corpus),
        collator=collator,
        reporter=reporter,
    )
    before = _seconds_before(output, checkpoint)
    began = time.perf_counter()
    try:
        if checkpoint is not None and checkpoint_step(checkpoint) >= t.steps:
            reporter.note(
                f"the run has its {checkpoint_step(checkpoint)} steps already; nothing is left to train"
            )
            load(model, checkpoint)
            began = time.perf_counter()  # nothing was trained
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        reporter.stop()
    seconds = before + time.perf_counter() - began
    model.eval()
    save(model, output / ADAPTER)
    metrics = {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "training_rows": corpus.cell_sizes(),
        **_history(trainer.state.log_history),
    }
    if settings.evaluation.at_end and len(corpus.evaluation):
        metrics["evaluation"] = score(model, settings, corpus, collator, reporter)
    _write(output / METRICS, metrics)
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    write_file(output / RESOLVED, text.encode("utf-8"))
    return TrainResult(output, output / ADAPTER, metrics, model)


def _claim(output: Path, resume: bool, overwrite: bool) -> tuple[Path | None, list[Path]]:
    """Make sure that the output folder is ours to write.

    Returns:
        The checkpoint to go on from, and what an earlier run left that is to be discarded.
    """
    if output.exists() and not output.is_dir():
        raise RunError(f"output: {str(output)!r} is a file")
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other")
    if resume:
        found = last_checkpoint(output / CHECKPOINTS)
        if found is None:
            raise RunError(f"nothing to resume: {str(output)!r} holds no complete checkpoint")
        return found, []
    used = [p for p in (output / ADAPTER, output / METRICS, output / CHECKPOINTS) if p.exists()]
    if used and not overwrite:
        raise RunError(
            f"{str(output)!r} holds a run already; --resume continues it, --overwrite discards it"
        )
    return None, used


def _seconds_before(output: Path, checkpoint: Path | None) -> float:
    """How long the run had trained before it is continued, as far as it says so."""
    if checkpoint is None:
        return 0.0
    try:
        earlier = json.loads((output / METRICS).read_text(encoding="utf-8"))
        if earlier["steps"] <= checkpoint_step(checkpoint):
            return float(earlier["seconds"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return 0.0


def _check_same(checkpoint: Path, resolved: dict[str, Any]) -> None:
    """Refuse to continue a run under settings that change what its steps mean."""
    file = checkpoint.parent / "run.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file}: cannot be read: {error}") from None
    if not isinstance(before, dict) or not isinstance(before.get("training", {}), dict):
        raise RunError(f"{file}: holds no settings of a run")
    pairs = [
        (key, before.get(key), resolved[key]) for key in resolved if key not in _FREE | {"training"}
    ]
    old, new = before.get("training", {}), resolved["training"]
    pairs += [(f"training.{k}", old.get(k), new[k]) for k in new if k not in _FREE_TRAINING]
    for key, was, now in pairs:
        if was != now:
            raise RunError(f"cannot resume: {key} was {was!r} and is {now!r} now")


def _halves(settings: Settings, corpus: Corpus) -> dict[str, Any]:
    """Evaluation rows for the loss, by whether their cell is trained."""
    from flix.training.evaluation import limited
    from flix.training.mixture import items

    rows = limited(corpus.evaluation, settings.evaluation.limit)
    seen = corpus.trained[rows.cells]
    halves = {"seen": rows.select(seen), "held_out": rows.select(~seen)}
    return {name: items(half) for name, half in halves.items() if len(half)}


def _history(log: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [{"step": e["step"], "loss": e["loss"]} for e in log if "loss" in e]
    evaluations: dict[int, dict[str, Any]] = {}
    for entry in log:
        for key, value in entry.items():
            if key.startswith("eval_") and key.endswith("_loss"):
                step = evaluations.setdefault(entry["step"], {"step": entry["step"]})
                step[key.removeprefix("eval_")] = value
    return {"losses": losses, "evaluation_losses": list(evaluations.values())}


def _write(path: Path, data: Any) -> None:
    write_file(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))

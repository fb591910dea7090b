"""The trainer of a run, with the arguments that its settings say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from flix.core.progress import Reporter
from flix.tasks.evaluation import Evaluator
from flix.tasks.trainer import TaskTrainer
from flix.training.models import Built
from flix.training.settings import Settings
from flix.transformers.journal import Journal
from flix.transformers.watch import Watch


def make_trainer(
    settings: Settings,
    built: Built,
    *,
    folder: Path,
    rows: Any,
    evaluator: Evaluator,
    journal: Journal,
    reporter: Reporter,
) -> tuple[TaskTrainer, Watch]:
    """A trainer with the settings' arguments, and what watches it.

    Args:
        settings: the configuration.
        built: model and collator.
        folder: of checkpoints.
        rows: the training rows.
        evaluator: evaluates on the way; may have no rows.
        journal: writes what is logged.
        reporter: told of progress.
    """
    t, watch = settings.training, Watch(reporter, journal)
    cheap = not any(task.generates for task in built.tasks)
    trainer = TaskTrainer(
        model=built.model,
        args=arguments(settings, folder, len(evaluator) > 0),
        data_collator=built.collator,
        train_dataset=rows,
        learning_rates=t.learning_rates,
        evaluator=evaluator,
        journal=journal,
        scoring=cheap or (t.best is not None and "score" in t.best),
        callbacks=[watch, *([EarlyStoppingCallback(t.patience)] if t.patience else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, watch


def arguments(settings: Settings, folder: Path, evaluates: bool) -> TrainingArguments:
    """The Trainer's arguments."""
    t = settings.training
    warmup = t.warmup_steps
    if warmup is None:
        warmup = math.ceil((t.warmup_ratio or 0.0) * t.steps)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=t.steps,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=settings.evaluation.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.schedule,
        warmup_steps=warmup,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=t.bf16,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=t.device == "cpu" or not torch.accelerator.is_available(),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=(t.eval_every or t.steps) if evaluates else None,
        save_strategy="steps",
        save_steps=(t.eval_every if t.best else t.save_every) or t.steps,
        save_total_limit=t.keep_checkpoints,
        load_best_model_at_end=t.best is not None,
        metric_for_best_model=t.best,
        greater_is_better="score" in t.best if t.best else None,
        logging_steps=t.log_every or max(1, t.steps // 20),
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[t.report_to] if isinstance(t.report_to, str) else list(t.report_to),
    )

"""The Trainer of ``flix train``: its arguments, the order of its rows, and what it says while it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from flix.training.errors import RunError
from flix.training.progress import Reporter
from flix.training.settings import Settings
from flix.transformers import FlixTrainer

_SHOWN = ("loss", "learning_rate")


class MixtureTrainer(FlixTrainer):
    """A Trainer whose rows come in the order of the dataset, which is a mixture drawn beforehand."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        return torch.utils.data.SequentialSampler(data)


class _Report(TrainerCallback):  # type: ignore[misc]
    """Passes on what the Trainer says, and stops a run whose loss is not a number."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reporter.start("training", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reporter.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        logs = logs or {}
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise RunError(
                f"the loss became {loss} at step {state.global_step}; lower training.learning_rate"
            )
        shown = {
            k: float(v)
            for k, v in logs.items()
            if k in _SHOWN or (k[:5] == "eval_" and "loss" in k)
        }
        if shown:
            self.reporter.log(state.global_step, shown)


def make_trainer(
    model: Any,
    settings: Settings,
    *,
    checkpoints: Path,
    mixture: Any,
    evaluation: dict[str, Any],
    collator: Any,
    reporter: Reporter,
) -> MixtureTrainer:
    """A trainer with the settings' arguments.

    Args:
        model: the adapted model.
        settings: the configuration.
        checkpoints: the folder of checkpoints.
        mixture: the training rows.
        evaluation: rows to evaluate the loss on, by name; may be empty.
        collator: makes batches.
        reporter: told of progress.
    """
    trainer = MixtureTrainer(
        model=model,
        loss_by_feature=False,
        args=arguments(settings, checkpoints, bool(evaluation)),
        data_collator=collator,
        train_dataset=mixture,
        eval_dataset=evaluation or None,
        callbacks=[_Report(reporter)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def arguments(settings: Settings, checkpoints: Path, evaluates: bool) -> TrainingArguments:
    """The Trainer's arguments."""
    t = settings.training
    warmup = t.warmup_steps
    if warmup is None:
        warmup = math.ceil((t.warmup_ratio or 0.0) * t.steps)
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=t.steps,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=settings.evaluation.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.schedule,
        warmup_steps=warmup,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim="adamw_torch_fused",  # features are many and small parameters
        bf16=t.bf16,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=t.device == "cpu" or not torch.accelerator.is_available(),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=(t.eval_every or t.steps) if evaluates else None,
        save_strategy="steps",
        save_steps=t.save_every or t.steps,
        save_total_limit=t.keep_checkpoints,
        logging_steps=t.log_every or max(1, t.steps // 20),
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )

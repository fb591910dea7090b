"""transformers' Trainer for adapted models: checkpoints hold the adapter, not the base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from flix.backends.torch import load, save, trainable_parameters
from flix.training.errors import RunError
from flix.training.progress import Reporter
from flix.training.settings import Settings

_SHOWN = ("loss", "learning_rate")


class FlixTrainer(Trainer):  # type: ignore[misc]
    """A Trainer of an adapted model.

    Rows come in the order of the dataset, which is a mixture drawn beforehand. All trainable parameters share one
    weight decay, whatever their features are called. Checkpoints hold the adapter's folder, the optimizer, the
    schedule, the generators' states and the trainer's state.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        return torch.utils.data.SequentialSampler(data)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters; fused, as there are many and small ones."""
        if self.optimizer is None:
            adapted: Any = self.model
            kinds = {p.device.type for p in trainable_parameters(adapted)}
            self.optimizer = torch.optim.AdamW(
                trainable_parameters(adapted),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
                fused=kinds <= {"cpu", "cuda"},
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            adapted: Any = self.model
            save(adapted, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapted: Any = self.model
        load(adapted, resume_from_checkpoint)


class _Report(TrainerCallback):  # type: ignore[misc]
    """Passes on what the Trainer says, and stops a run whose loss is no number."""

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
) -> FlixTrainer:
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
    trainer = FlixTrainer(
        model=model,
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
    args = TrainingArguments(
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
        ddp_find_unused_parameters=True,
        disable_tqdm=True,
        report_to=[],
    )
    if args.n_gpu > 1:
        # One process trains on one device; nn.DataParallel would replicate the model on threads.
        args._n_gpu = 1
    return args

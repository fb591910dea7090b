"""transformers' Trainer for adapted models."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from flix.backends.torch import FlixLinear, RoutedModel, load, save, verbs
from flix.core.errors import ConfigError
from flix.data.callback import TellEpoch
from flix.transformers import checkpoints
from flix.transformers.boundaries import BoundaryCheck
from flix.transformers.checkpoints import last_checkpoint, none_complete
from flix.transformers.collator import FlixCollator
from flix.transformers.losses import FeatureLosses, by_items, unreduced
from flix.transformers.numbering import NumberedRows, NumberedStream, number_prepared
from flix.transformers.processes import ProcessesMixin, check_arguments, deepspeed_error
from flix.transformers.rates import RatesMixin

logger: Final = logging.getLogger(__name__)


class FlixTrainerMixin(ProcessesMixin, RatesMixin):
    """What a Trainer does differently for an adapted model. Put it before a Trainer class in the list of bases.

    - Checkpoints and ``save_model`` hold the adapter's folder and the heads that were unfrozen, but not the base.
      Checkpoints also have the Trainer's own files (optimizer, schedule, generators, state) and the tokenizer.
      Resuming and ``load_best_model_at_end`` read them. ``train(resume_from_checkpoint=True)`` takes the latest
      complete one.
    - With a :class:`FlixCollator`, the feature columns survive ``remove_unused_columns``, and the training rows (not
      those of evaluation) get their feature dropout, keyed by micro-step and row.
    - A training dataset with ``set_epoch``, such as that of a :class:`flix.data.Mixture`, is told every epoch.
      accelerate's loaders do not do this in a resumed epoch, or for shuffling samplers in several processes.
    - All features have the same weight decay, whatever their names are.
    - Logs hold ``loss/<group>=<feature>``: the mean loss, since the last log, of the labels in rows in which the
      feature acted; in evaluation ``eval_loss/...``. It is computed from the logits of the same forward. It is left
      out for models whose loss is not the usual one for their outputs (override :meth:`row_losses`).
    - In several processes (torchrun, ``accelerate launch``) the gradients of the features in use are averaged, and no
      others are sent (:func:`flix.backends.torch.distributed.reduce_features`). DDP wraps the model for the heads that
      train, if any do; ``find_unused_parameters`` is on unless the arguments say otherwise. Several GPUs in one
      process are not used; start one process for each GPU.
    - Under FSDP2 (``fsdp="full_shard"``) accelerate shards the base, and the features are sharded too
      (:func:`flix.backends.torch.shard_features`).

    Args:
        loss_by_feature: whether losses by feature are computed and logged.
        learning_rates: learning rates by group of features, and for trained heads as ``"heads"``; anything that is
            not named has the arguments' ``learning_rate``.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: DeepSpeed or FSDP1 through the Trainer's arguments, or an order of batches whose rows cannot be
            numbered for feature dropout.
    """

    data_collator: Any
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        loss_by_feature: bool = True,
        learning_rates: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.loss_by_feature = loss_by_feature
        self.learning_rates = learning_rates
        given = args[0] if args else kwargs.get("model")
        if given is not None:
            verbs.config_of(type(self).__name__, given)
        arguments = args[1] if len(args) > 1 else kwargs.get("args")
        if arguments is not None:
            _settle(arguments)
        super().__init__(*args, **kwargs)
        if given is None:
            verbs.config_of(type(self).__name__, self.model)
        held: Any = self.model
        if "forward" in vars(held) and isinstance(held.get_output_embeddings(), FlixLinear):
            raise ConfigError(
                f"{type(self).__name__} uses the output head's kernel without calling it, so features there would not act; "
                "leave the head out of target_modules"
            )
        if self.is_deepspeed_enabled:
            raise deepspeed_error()
        self.check_fsdp()
        settings: Any = getattr(self.model, "config", None)
        if getattr(self.data_collator, "per_token", False) and hasattr(settings, "use_cache"):
            settings.use_cache = False  # with a cache, models take a packed row for one example
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(TellEpoch(self.train_dataset))
        self._boundaries = BoundaryCheck()
        self._losses = FeatureLosses(self.model.flix_config.registry)
        self._evaluation_losses = FeatureLosses(self.model.flix_config.registry)

    def call_model_init(self, trial: Any = None) -> Any:
        """The model from ``model_init``, which must be adapted."""
        model = super().call_model_init(trial)
        verbs.config_of(type(self).__name__, model)
        return model

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, FlixCollator):
            held = self._signature_columns
            held += [c for c in self.data_collator.own_columns if c not in held]

    def get_train_dataloader(self) -> Any:
        """The training batches; their rows carry their places in the run if features are dropped."""
        collator, data = self.data_collator, self.train_dataset
        if not isinstance(collator, FlixCollator) or not collator.needs_numbers or data is None:  # fmt: skip
            return self._own_seeds(super().get_train_dataloader())
        rows: NumberedRows | NumberedStream
        if isinstance(data, IterableDataset):
            rows = NumberedStream(data, self._train_batch_size, self._processes())
        else:
            datasets = sys.modules.get("datasets")
            if datasets is not None and isinstance(data, datasets.Dataset):
                # Pruned before it is wrapped: the Trainer would not know it.
                data = self._remove_unused_columns(data, description="training")
            rows = NumberedRows(data)
        kept = self.train_dataset
        self.train_dataset = rows
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = kept
        if isinstance(rows, NumberedRows) and not number_prepared(loader):
            raise ConfigError(
                "feature dropout needs rows that can be numbered, and train_sampling_strategy="
                f"{getattr(self.args, 'train_sampling_strategy', None)!r} makes batches without a sampler; choose another, or "
                "FlixCollator(..., feature_dropout=None)"
            )
        return self._own_seeds(loader)

    def _own_seeds(self, loader: Any) -> Any:
        """Let a loader whose workers live on draw their seeds elsewhere than from the model's generator.

        It draws when the workers are made: once in a run, and once more in a resumed one, whose dropout would from
        there on be another.
        """
        if self.args.dataloader_persistent_workers:
            base = getattr(loader, "base_dataloader", loader)
            if base.generator is None:
                base.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if isinstance(train_dataset, NumberedRows):
            train_dataset = train_dataset.dataset
        return super()._get_train_sampler(train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The evaluation batches; no features are dropped."""
        with self._without_dropout():
            return self._own_seeds(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The batches to predict; no features are dropped."""
        with self._without_dropout():
            return self._own_seeds(super().get_test_dataloader(test_dataset))

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        kept = self.data_collator
        if isinstance(kept, FlixCollator):
            self.data_collator = kept.evaluation()
        try:
            yield
        finally:
            self.data_collator = kept

    def _processes(self) -> int:
        """Batches of the loader in one micro-step."""
        if self.args.accelerator_config.split_batches:
            return 1
        return int(self.accelerator.num_processes)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The names of the parameters with weight decay: those that the Trainer chooses, and all features."""
        adapted: Any = self.model if isinstance(self.model, RoutedModel) else model
        pairs = {id(parameter) for parameter in adapted.flix_bank.parameters()}
        usual = {*super().get_decay_parameter_names(model)}
        return [name for name, p in model.named_parameters() if name in usual or id(p) in pairs]

    # Checkpoints

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' Trainer.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the latest complete one in the output folder. A
                checkpoint that a killed run left half written is skipped.
            args, kwargs: as for the Trainer.

        Raises:
            ConfigError: True without a complete checkpoint, or a checkpoint that is not complete.
        """
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir)
            if found is None:
                raise ConfigError(none_complete(self.args.output_dir))
            resume_from_checkpoint = str(found)
        elif isinstance(resume_from_checkpoint, str | os.PathLike):
            given = Path(resume_from_checkpoint)
            if given.is_dir() and (why := checkpoints.incomplete(given)) is not None:
                raise ConfigError(
                    f"nothing to resume: the checkpoint {str(given)!r} is not complete: {why}; load(model, folder) reads "
                    "its adapter alone"
                )
            resume_from_checkpoint = str(given)
        self._losses.take("cpu")
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            # An evaluation before the training marks the model as prepared; accelerate would then not wrap it in
            # DDP, and the processes would train apart.
            held: Any = self.model
            held.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not (self.args.should_save or self.is_fsdp_enabled):
            return
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        os.makedirs(folder, exist_ok=True)
        save(self.model, folder)
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, file by file; the last one names them all (:mod:`flix.transformers.checkpoints`)."""
        state: Any = self.state
        if self.args.should_save:
            name = f"{checkpoints.PREFIX}{state.global_step}"
            checkpoints.begin(Path(self._get_output_dir(trial=trial), name))
        self.accelerator.wait_for_everyone()  # every process writes into it
        save_state = state.save_to_json

        def save_state_and_finish(path: str) -> None:
            save_state(path)  # the last of the Trainer's files; older checkpoints go after it
            checkpoints.finish(Path(path).parent)

        state.save_to_json = save_state_and_finish
        try:
            super()._save_checkpoint(model, trial)
        finally:
            del state.save_to_json

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every process has written its own file

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info("loading the best adapter, %s (score %s)", best, self.state.best_metric)
        load(self.model, best)

    def row_losses(self, inputs: Any, outputs: Any) -> tuple[Tensor, Tensor] | None:
        """The losses that make up a batch's loss, before any mean. Override it for a model with another kind of loss.

        Args:
            inputs: the batch, with its labels.
            outputs: the model's.

        Returns:
            The losses, and how much each counts, both ``[batch]`` or ``[batch, length]``; None if they are unknown.
            If a model returns ``row_losses`` and ``row_counts``, both ``[batch]``, these are used.
        """
        if not hasattr(outputs, "get") or not isinstance(inputs.get("labels"), Tensor):
            return None
        if isinstance(outputs.get("row_losses"), Tensor):
            return outputs["row_losses"], outputs["row_counts"]
        logits = outputs.get("logits")
        if not isinstance(logits, Tensor):
            return None
        config = getattr(self.model, "config", None)
        shifted = LOSS_MAPPING.get(
            str(getattr(self.model, "loss_type", None))
        ) is ForCausalLMLoss and not getattr(config, "is_encoder_decoder", False)
        problem = getattr(config, "problem_type", None)
        return unreduced(logits, inputs["labels"], shifted=shifted, problem_type=problem)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss, as the Trainer computes it; on the way, its parts are counted for their features."""
        whole = {**inputs}  # the Trainer may take the labels out
        if getattr(self.data_collator, "per_token", False):
            self._boundaries(self.model, inputs)
        told = isinstance(whole.get("labels"), Tensor) or type(self).row_losses is not FlixTrainerMixin.row_losses  # fmt: skip
        if not return_outputs and not (self.loss_by_feature and told):
            # Trainers that have no logits at hand make them for this.
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if self.loss_by_feature and isinstance(ids := whole.get("flix_features"), Tensor):
            with torch.no_grad():
                parts = self.row_losses(whole, outputs)
            if parts is not None:
                self._count(*parts, ids, whole.get("flix_weights"), model.training)
                if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
                    several = self.args.average_tokens_across_devices
                    loss = by_items(loss, *parts, num_items_in_batch, self.accelerator.num_processes if several else 1)  # fmt: skip
        return (loss, outputs) if return_outputs else loss

    def _count(
        self, losses: Tensor, counts: Tensor, ids: Tensor, weights: Tensor | None, training: bool
    ) -> None:
        if training:
            self._losses.add(losses, counts, ids, weights)
            return
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0:
            # The last batch is filled up with rows that were seen already, as gather_for_metrics knows.
            own = state.remainder - self.accelerator.process_index * len(ids)
            keep = min(max(own, 0), len(ids))
            weights = None if weights is None else weights[:keep]
            losses, counts, ids = losses[:keep], counts[:keep], ids[:keep]
        self._evaluation_losses.add(losses, counts, ids, weights)

    def _taken(self, losses: FeatureLosses) -> dict[str, float]:
        several = self.accelerator.num_processes > 1
        reduce = (lambda t: self.accelerator.reduce(t, reduction="sum")) if several else None
        return losses.take(self.args.device, reduce)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the losses by feature in addition to the training loss."""
        if self.loss_by_feature and "loss" in logs:
            found = self._taken(self._losses)
            logs.update({f"loss/{feature}": value for feature, value in found.items()})
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate or predict; the metrics include the losses by feature."""
        self._evaluation_losses.take("cpu")
        with self._whole_features():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self.loss_by_feature:
            found = self._taken(self._evaluation_losses)
            output.metrics.update(
                {f"{metric_key_prefix}_loss/{feature}": value for feature, value in found.items()}
            )
        return output


def _settle(arguments: TrainingArguments) -> None:
    """Refuse settings that cannot work, and make the necessary choices that the user left open."""
    check_arguments(arguments)
    if arguments.ddp_find_unused_parameters is None:
        # A batch uses some features only.
        arguments.ddp_find_unused_parameters = True
    if arguments.n_gpu > 1:
        logger.warning(
            "one process trains on one GPU; start one for each with accelerate launch or torchrun"
        )
        arguments._n_gpu = 1


class FlixTrainer(FlixTrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer for adapted models; see :class:`FlixTrainerMixin`."""


class FlixSeq2SeqTrainer(FlixTrainerMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """transformers' Seq2SeqTrainer for adapted models; see :class:`FlixTrainerMixin`.

    ``predict_with_generate`` passes each row's features on to ``generate()``.
    """

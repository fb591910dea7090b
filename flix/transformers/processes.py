"""What a Trainer does differently in several processes (docs/distributed.md).

Without FSDP a reducer averages the gradients of the features in use, and DDP has the heads. Under FSDP2
(``fsdp="full_shard"``) accelerate shards the base, and the features are sharded beside it, so that a step exchanges
those in use and not all that are registered; what checkpoints need of them all processes write and read together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from flix.backends.torch.distributed import (
    load_checkpoint,
    reduce_features,
    save_checkpoint,
    shard_features,
    whole_features,
)
from flix.backends.torch.heads import base_parameters
from flix.core.errors import ConfigError

if TYPE_CHECKING:
    from typing import Any as _Base  # what a mixin calls is its sibling's
else:
    _Base = object

STATE = "flix_state"
"""The folder in a checkpoint that holds the optimizer's state."""

_SCHEDULE = "scheduler.pt"

_FSDP1 = (
    "FlixTrainer does not train with FSDP1, which flattens all features into one tensor, so that every step would move "
    'those that are absent; use fsdp_config={"version": 2} (fsdp_version: 2 in accelerate\'s files), or DDP'
)


def check_arguments(arguments: TrainingArguments) -> None:
    """Refuse arguments that cannot work.

    Raises:
        ConfigError: DeepSpeed, or FSDP1.
    """
    if getattr(arguments, "deepspeed", None):
        raise deepspeed_error()
    settings: dict[str, Any] = (
        arguments.fsdp_config if isinstance(arguments.fsdp_config, dict) else {}
    )
    usual = 2 if hasattr(arguments, "fsdp_plugin_args") else 1
    version = settings.get("version", settings.get("fsdp_version", usual))
    if arguments.fsdp and int(version or usual) != 2:
        raise ConfigError(_FSDP1)


def deepspeed_error() -> ConfigError:
    return ConfigError(
        "FlixTrainer does not train with DeepSpeed, which gathers and shards the model in ways of its own; use FSDP2 "
        '(fsdp="full_shard"), or DDP (one process for each GPU)'
    )


class ProcessesMixin(_Base):  # type: ignore[misc]
    """A part of :class:`flix.transformers.trainer.FlixTrainerMixin`."""

    def check_fsdp(self) -> None:
        """Look at what accelerate was given, by arguments, a file or the environment.

        Raises:
            ConfigError: FSDP1, or settings of FSDP2 under which features cannot be sharded.
        """
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ConfigError(_FSDP1)
        if plugin.cpu_ram_efficient_loading:
            raise ConfigError(
                "FSDP's cpu_ram_efficient_loading gives all processes but the first a model without values, features "
                "included; set it to False"
            )
        if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy" or plugin.cpu_offload is True:
            raise ConfigError(
                "FSDP's cpu_offload would leave the features on the device, and is not supported with them; set it to "
                "False"
            )

    def _wrap_model(self, model: Any, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which accelerate's DDP follows: features are averaged by a reducer, and DDP has the heads."""
        several = self.args.world_size > 1 and not (
            self.is_fsdp_enabled or self.is_deepspeed_enabled
        )
        if training and several and model is self.model:
            self._reduce_features()
        return super()._wrap_model(model, training, *args, **kwargs)

    def _reduce_features(self) -> None:
        held: Any = self.model
        reduce_features(held)
        accelerator: Any = self.accelerator
        vars(accelerator).pop("prepare_model", None)
        if not any(p.requires_grad for _, p in base_parameters(held)):
            # DDP refuses a model in which nothing is left for it; precision and place are accelerate's in any case.
            accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; under FSDP the features are sharded first."""
        if not self.is_fsdp_enabled:
            return super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        plugin = self.accelerator.state.fsdp_plugin
        others = plugin.ignored_modules
        if isinstance(others, str):
            plugin.ignored_modules = others if "flix_bank" in others else f"{others}|flix_bank"
        else:
            plugin.ignored_modules = [*(m for m in others or () if m is not model.flix_bank), model.flix_bank]  # fmt: skip
        if model.flix_bank.sharding is None:
            model.flix_bank.to(self.accelerator.device)
            shard_features(model, self._mesh())
        made = super().create_optimizer(*args, **kwargs)
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [[names[id(p)] for p in g["params"]] for g in self.optimizer.param_groups]
        return made

    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = getattr(self.accelerator, "torch_device_mesh", None)
        if mesh is not None:
            return mesh[tuple(self.accelerator.parallelism_config.fsdp_dim_names)]
        return init_device_mesh(self.accelerator.device.type, (self.args.world_size,))

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which makes it when accelerate has prepared the optimizer.

        Accelerate finds an optimizer's parameters again by their addresses, of which a feature that is so short that
        this process holds no part of it has none: they are set by name.
        """
        if self.is_fsdp_enabled and self.optimizer is not None:
            parameters = dict(self.model.named_parameters())
            for group, names in zip(self.optimizer.param_groups, self._names, strict=True):
                group["params"] = [parameters[name] for name in names]
        return super().create_scheduler(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's; under FSDP all processes gather, and the first writes."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(str(self.args.output_dir) if output_dir is None else output_dir)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_checkpoint(Path(output_dir) / STATE, self.model, self.optimizer, int(self.state.global_step))  # fmt: skip
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if checkpoint is None:
            return
        if not (Path(checkpoint) / STATE).is_dir():
            raise ConfigError(
                f"the checkpoint {checkpoint!r} was written without FSDP and holds no {STATE}; "
                f"resume it as it was, or load its adapter with load(model, folder) and start again"
            )
        load_checkpoint(Path(checkpoint) / STATE, self.model, self.optimizer)
        schedule = torch.load(Path(checkpoint) / _SCHEDULE, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    @contextmanager
    def _whole_features(self) -> Iterator[None]:
        """Around an evaluation: each process evaluates by itself."""
        model: Any = self.model
        if model.flix_bank.sharding is None or model.flix_bank.sharding.kept is not None:
            yield
            return
        with whole_features(model):
            yield

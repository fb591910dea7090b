"""How flix says what users of PEFT type: settings of ``LoraConfig``, by the names that they have there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from flix.core.errors import ConfigError, near

T = TypeVar("T")

_UNFREEZE = (
    "unfreeze what else should train after adapt, e.g. model.classifier.requires_grad_(True); "
    "save keeps it with the features"
)
_NO_SUCH = "flix has no such variant of LoRA; leave it out"
_OWN_START = 'A starts as init says ("uniform", or "orthogonal"), and B at zero'
_FROM_BASE = "the file names the base by what the model itself says; leave it out"
_NOT_NEEDED = "flix finds out by itself; leave it out"

PEFT: dict[str, str] = {
    "r": "say ranks=8 for every feature, or a rule, ranks=flix.ranks.by_group(language=4, task=8)",
    "lora_alpha": "say alpha, one number or numbers by group; its default, the rank, gives the scale 1",
    "use_rslora": 'say scaling="rslora"',
    "bias": "biases stay frozen; " + _UNFREEZE,
    "modules_to_save": _UNFREEZE,
    "trainable_token_indices": "unfreeze the embedding after adapt, or name it in target_modules",
    "init_lora_weights": _OWN_START,
    "layers_to_transform": "say the layers in target_modules, a regular expression such as r'.*layers\\.(0|1)\\..*'",
    "layers_pattern": "say the layers in target_modules, a regular expression such as r'.*layers\\.(0|1)\\..*'",
    "target_parameters": "say the parameters' paths in target_modules, as those of layers",
    "fan_in_fan_out": _NOT_NEEDED,
    "ensure_weight_tying": _NOT_NEEDED,
    "auto_mapping": _NOT_NEEDED,
    "megatron_config": _NOT_NEEDED,
    "megatron_core": _NOT_NEEDED,
    "runtime_config": _NOT_NEEDED,
    "loftq_config": "quantise the base before adapt; " + _OWN_START,
    "eva_config": _OWN_START,
    "corda_config": _OWN_START,
    "lora_ga_config": _OWN_START,
    "use_dora": _NO_SUCH,
    "use_qalora": _NO_SUCH,
    "qalora_group_size": _NO_SUCH,
    "use_bdlora": _NO_SUCH,
    "kasa_config": _NO_SUCH,
    "velora_config": _NO_SUCH,
    "monteclora_config": _NO_SUCH,
    "alora_invocation_tokens": _NO_SUCH,
    "layer_replication": _NO_SUCH,
    "lora_bias": _NO_SUCH,
    "arrow_config": "each call says which features act, by flix_features",
    "task_type": "adapt takes a model of any kind; leave it out",
    "peft_type": "flix has one kind of adapter; leave it out",
    "peft_version": "leave it out",
    "inference_mode": "freeze(model, {group: names}) holds features as they are; outside training, call the model under torch.no_grad()",
    "base_model_name_or_path": _FROM_BASE,
    "revision": _FROM_BASE,
}
"""What to say in the place of a setting of PEFT's (0.21) that FlixConfig lacks."""


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse settings that there are not.

    Raises:
        ConfigError: one; the message says how flix says it, or what may have been meant.
    """
    names = list(known)
    for name in given:
        if name in names:
            continue
        if name in PEFT:
            raise ConfigError(f"FlixConfig has no setting {name!r}, which is PEFT's: {PEFT[name]}")
        raise ConfigError(
            f"FlixConfig has no setting {name!r}{near(name, names)}; its settings: {', '.join(names)}"
        )


def named(cls: type[T]) -> type[T]:
    """Let a dataclass say what was meant by a setting that it lacks."""
    make: Callable[..., None] = cls.__init__

    @functools.wraps(make)
    def init(self: Any, *args: Any, **given: Any) -> None:
        check_names(given, cls.__dataclass_fields__)  # type: ignore[attr-defined]
        make(self, *args, **given)

    cls.__init__ = init  # type: ignore[method-assign,assignment]
    return cls

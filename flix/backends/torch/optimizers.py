"""What optimizers are given: groups of parameters by feature group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from flix.backends import messages
from flix.backends.torch.heads import base_parameters
from flix.backends.torch.patches.models import RoutedModel
from flix.core.errors import ConfigError, near

HEADS = "heads"
"""The name of the group of trained parameters of the base."""


def parameter_groups(
    model: nn.Module,
    lr: float | Mapping[str, float],
    *,
    weight_decay: float | Mapping[str, float] = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one for each group of features::

        groups = parameter_groups(model, lr={"language": 2e-3, "task": 5e-3}, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups)

    Parameters of the base that train, such as a classifier head, form a group named ``"heads"``. Frozen features are
    left out, and so are groups with nothing to train.

    Args:
        model: an adapted model.
        lr: one learning rate for all, or one for each group that trains.
        weight_decay: the same for weight decay; groups that a mapping leaves out have no decay.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay`` and the group's ``name``.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: an unknown group, a group without a learning rate, or a number that is negative or not finite.
    """
    if not isinstance(model, RoutedModel):
        raise messages.not_adapted("parameter_groups", model)
    bank = model.flix_state.bank
    found: dict[str, list[nn.Parameter]] = {
        group: [] for group in model.flix_config.registry.groups
    }
    for i, parameter in bank.held().items():
        if parameter.requires_grad:
            found[bank.features[i][0]].append(parameter)
    known = set(found)
    heads = {id(p): p for _, p in base_parameters(model) if p.requires_grad}
    name = HEADS if HEADS not in known else "base"
    found[name] = list(heads.values())
    return [
        {
            "params": parameters,
            "lr": _setting("lr", lr, group, found),
            "weight_decay": _setting("weight_decay", weight_decay, group, found, 0.0),
            "name": group,
        }
        for group, parameters in found.items()
        if parameters
    ]


def _setting(
    what: str,
    given: float | Mapping[str, float],
    group: str,
    groups: Mapping[str, Any],
    default: float | None = None,
) -> float:
    """A number for one group."""
    value: Any = given
    if isinstance(given, Mapping):
        for name in given:
            if name not in groups:
                raise ConfigError(
                    f"{what} names the group {name!r}{near(name, groups)}; valid groups: {', '.join(groups)}"
                )
        value = given.get(group, default)
        if value is None:
            raise ConfigError(
                f"{what} must name every group that trains, but {group!r} is missing; groups: {', '.join(groups)}"
            )
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise ConfigError(
            f"{what} of {group!r} must be a finite number of at least 0, got {value!r}"
        )
    return float(value)

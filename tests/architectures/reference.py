"""Ways to compute what an adapted model should, without flix's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flix.backends.torch import named_pairs
from flix.backends.torch.model import flix_layers


@contextmanager
def updated(base: nn.Module, adapted: nn.Module, ids: Any, weights: Any) -> Iterator[None]:
    """Let a plain model's layers add each position's own sum of updates, feature by feature, in a hook.

    Args:
        base: the plain model that was adapted.
        adapted: the adapted one: its pairs and scales are used.
        ids: int ``[B, T, W]``.
        weights: float ``[B, T, W]``.
    """
    settings = adapted.flix_config
    pairs = named_pairs(adapted)
    handles = []
    for path, layer in flix_layers(adapted):

        def hook(
            module: Any, args: Any, y: Any, path: str = path, kind: str = layer.flix_kind
        ) -> Any:
            x, total = args[0], torch.zeros_like(y)
            for number, feature in enumerate(settings.registry.features):
                a = pairs.get(f"{path}.A.{feature[0]}.{feature[1]}")
                if a is None:
                    continue
                b = pairs[f"{path}.B.{feature[0]}.{feature[1]}"]
                h = a.t()[x] if kind == "embedding" else x @ a.t()
                factor = (weights * (ids == number)).sum(-1)[..., None]  # [B, T, 1]
                total = total + factor * settings.scale(path, feature) * (h @ b.t())
            return y + total

        handles.append(base.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
